"""The model in transformers: losses, files, generate, Trainer, and what it refuses."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from block_ffn_models import IDS, SIZES, make
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from fewer.language import (
    AdaptiveFactorCallback,
    BlockFFNConfig,
    BlockFFNForCausalLM,
    activation_locality_loss,
    chunk_sparsification_loss,
)


def test_the_loss_is_the_sum_of_three_in_training_and_the_token_loss_in_evaluation():
    model = make(locality_factor=0.1, chunk_factor=0.2)
    doc_ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    words = {"attention_mask": mask, "labels": IDS, "doc_ids": doc_ids}
    plain = model(IDS, **words)
    assert plain.aux_loss is None
    assert plain.router_logits is None
    out = model.train()(IDS, **words)
    locality = torch.stack([activation_locality_loss(logits, doc_ids, mask) for logits in out.router_logits]).mean()
    chunk = torch.stack([chunk_sparsification_loss(logits, mask, 4) for logits in out.router_logits]).mean()
    assert torch.allclose(out.loss, plain.loss + 0.1 * locality + 0.2 * chunk)
    assert torch.equal(model.chunk_loss, chunk.detach())
    assert torch.equal(model.locality_loss, locality.detach())
    model.chunk_factor = 0.4
    assert torch.allclose(model(IDS, **words).loss, plain.loss + 0.1 * locality + 0.4 * chunk)
    asked = model.eval()(IDS, output_router_logits=True, **words)
    assert torch.allclose(asked.loss, plain.loss + 0.1 * locality + 0.4 * chunk)
    assert [logits.shape for logits in asked.router_logits] == [(2, 12, 6)] * 2
    assert all(layer.router_logits is None for layer in model.feed_forwards())
    tupled = model(IDS, return_dict=False, **words)
    assert torch.equal(tupled[0], plain.loss)


def test_the_losses_reach_the_routers_and_not_their_norm_weights():
    model = make().train()
    out = model(IDS, labels=IDS)
    out.aux_loss.backward()
    first, last = model.feed_forwards()[0], model.feed_forwards()[-1]
    assert last.router_proj.weight.grad.any()
    assert last.router_norm.weight.grad is None or not last.router_norm.weight.grad.any()
    assert first.router_norm.weight.grad.any()  # through the hidden states of later layers alone


def test_a_file_gives_the_same_model_bit_for_bit(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, BlockFFNForCausalLM)
    assert loaded.config.intermediate_size == 24
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        for layer in (*loaded.feed_forwards(), *model.feed_forwards()):
            layer.kernel = "union"
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    for other in (copy.deepcopy(loaded), loaded.to(torch.bfloat16)):
        assert torch.equal(other.model.layers[1].mlp.up_proj.float(), model.model.layers[1].mlp.up_proj.to(other.dtype).float())


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["dense", "union"])
def test_writing_with_a_cache_and_with_padding_is_the_same(kernel):
    model = make(torch.float64, kernel=kernel)
    words = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    single = model.generate(IDS[:1], attention_mask=torch.ones(1, 12), **words)
    assert single.tolist() == model.generate(IDS[:1], attention_mask=torch.ones(1, 12), use_cache=False, **words).tolist()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    mask = (torch.arange(15) >= 3).long().expand(2, -1)
    assert model.generate(padded, attention_mask=mask, **words)[0, 3:].tolist() == single[0].tolist()
    apart = model(IDS).logits
    positions = (torch.arange(15) - 3).clamp(min=0).expand(2, -1)
    assert torch.allclose(model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:], apart, atol=1e-10)


def test_checkpointing_teaches_the_same_or_says_that_it_cannot():
    def gradient(model):
        model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
        return model.feed_forwards()[0].router_proj.weight.grad

    wanted, model = gradient(make()), make()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert torch.allclose(gradient(model), wanted, atol=1e-7)
    model = make()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="expected the other kind"):
        gradient(model)


def trainer(model, folder, steps, micro=1, callbacks=(), resume=None):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(2, 48, (16, 8), generator=torch.Generator().manual_seed(2))]
    args = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4 // micro, gradient_accumulation_steps=micro, learning_rate=1e-3,
        save_steps=5, save_strategy="steps", report_to=[], disable_tqdm=True, use_cpu=True, seed=0, max_grad_norm=0.0,
        restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    made = Trainer(model, args, train_dataset=rows, callbacks=list(callbacks))  # pyright: ignore[reportArgumentType]
    made.train(resume_from_checkpoint=resume)
    return made


def test_trainer_follows_the_factor_and_goes_on_from_a_checkpoint(tmp_path):
    def callback():
        return AdaptiveFactorCallback(stable_steps=4, adjust_every=2)

    whole, model = callback(), make(chunk_factor=0.3)
    trainer(model, tmp_path / "whole", 10, callbacks=[whole])
    assert whole.factor.steps == 10
    assert model.chunk_factor == whole.factor.value != 0.3
    again, other = callback(), make(chunk_factor=0.3)
    resumed = trainer(other, tmp_path / "again", 10, callbacks=[again], resume=str(tmp_path / "whole" / "checkpoint-5"))
    kept = next(each for each in resumed.callback_handler.callbacks if isinstance(each, AdaptiveFactorCallback))
    assert kept.factor.state_dict() == whole.factor.state_dict()
    assert other.chunk_factor == model.chunk_factor


def test_micro_batches_weigh_the_losses_once(tmp_path):
    """Trainer hands a model that takes loss words the number of tokens, and then leaves its other losses undivided."""
    one, two = make(), make()
    made = trainer(one, tmp_path / "one", 1)
    assert not made.model_accepts_loss_kwargs
    trainer(two, tmp_path / "two", 1, micro=2)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4)
    calls = AdaptiveFactorCallback(stable_steps=2, adjust_every=1)
    trainer(make(), tmp_path / "three", 3, micro=2, callbacks=[calls])
    assert calls.factor.steps == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0"),
        ({"expert_size": 0}, "expert_size is 0"),
        ({"chunk_len": 0}, "chunk_len is 0"),
        ({"chunk_factor": -1.0}, "chunk_factor is -1.0; expected a finite number of at least 0"),
        ({"locality_factor": -1.0}, "locality_factor is -1.0"),
        ({"locality_alpha": 0.0}, "locality_alpha is 0.0"),
    ],
)
def test_odd_configs_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        BlockFFNConfig(**SIZES | words)


def test_a_sequence_of_no_whole_chunks_is_refused_where_the_chunk_loss_is_on():
    with pytest.raises(ValueError, match="the sequence has 10 tokens; expected a multiple of chunk_len 4: pad it to 12"):
        make().train()(IDS[:, :10], labels=IDS[:, :10])
    assert make(chunk_factor=0.0).train()(IDS[:, :10], labels=IDS[:, :10]).loss.isfinite()
    with pytest.raises(ValueError, match=r"doc_ids is \(2, 11\)"):
        make().train()(IDS, labels=IDS, doc_ids=IDS[:, 1:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"model.layers.0.mlp.gate_proj.weight": torch.zeros(24, 16)}, "which is of gated experts"),
        (lambda w: w | {"model.layers.0.mlp.more": torch.zeros(1)}, "disagree about model.layers.0.mlp.more"),
        (lambda w: {name: each for name, each in w.items() if "router_norm" not in name}, "disagree about .*router_norm.weight"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, change, message):
    make().save_pretrained(tmp_path)
    weights = change(load_file(tmp_path / "model.safetensors"))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_config_round_trips_with_what_it_stands_for(tmp_path):
    config = make(locality_alpha=50.0).config
    config.save_pretrained(tmp_path)
    assert BlockFFNConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "fewer_block_ffn"
