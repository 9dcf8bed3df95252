"""Converted models in their host: forward, generate, padding, training, saving."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fewer.language.spt import attention
from fewer.language.spt.attention import CachedCodes
from fewer.language.spt.model import SPTConfig, SPTModel, get_spt_model
from fewer.language.spt.peers import chosen_by, true_keys
from fewer.language.spt.quantizer import ProductQuantizer

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
OPT: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
    "max_position_embeddings": 64, "pad_token_id": 0, "dropout": 0.0, "init_std": 0.3,
}  # fmt: skip
MADE: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
}
IDS = torch.randint(3, 40, (3, 19), generator=torch.Generator().manual_seed(1))


def base(family: str = "llama") -> Any:
    torch.manual_seed(0)
    return MADE[family]().eval()


def make(family: str = "llama", **words: Any) -> Any:
    model = base(family)
    torch.manual_seed(1)
    return get_spt_model(model, SPTConfig(**{"lora_r": 3} | words)).eval()


@pytest.mark.parametrize("family", list(MADE))
def test_at_its_limit_a_converted_model_is_the_dense_one(family: str) -> None:
    model = make(family, ffn_active=4, attention_keep=1, clamp=None)
    with torch.no_grad():
        for network in model.networks:
            network.router.linear.weight.zero_()
            network.router.linear.bias.zero_()
    dense = base(family)
    torch.testing.assert_close(model(input_ids=IDS).logits, dense(IDS).logits, atol=1e-4, rtol=1e-4)
    words: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(input_ids=IDS, **words), dense.generate(IDS, **words))


@pytest.mark.parametrize("family", list(MADE))
def test_only_adapters_routers_and_code_books_train_and_the_loss_falls(family: str) -> None:
    model = make(family).train()
    frozen = {name: parameter.clone() for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name.rsplit(".", 2)[-2] for name, _ in model.trained()} <= {
        "default",
        "linear",
        "quantizer",
        "lora_embedding_A",
        "lora_embedding_B",
    }
    optimizer = torch.optim.AdamW([parameter for _, parameter in model.trained()], lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(parameter.grad is not None for _, parameter in model.trained())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, dict(model.named_parameters())[name]) for name, value in frozen.items())


def test_the_auxiliary_loss_is_in_the_training_loss_alone() -> None:
    model = make(balance_weight=0.1)
    plain = model(input_ids=IDS, labels=IDS).loss
    trained = model.train()(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(trained, plain + model.auxiliary_loss())
    assert model.auxiliary_loss() > 0


def test_a_later_token_changes_nothing_before_it() -> None:
    model, changed = make(), IDS.clone()
    changed[:, 12] = 5
    assert torch.equal(model(input_ids=IDS).logits[:, :12], model(input_ids=changed).logits[:, :12])


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
def test_writing_with_a_cache_is_reading_at_once_where_rows_keep_their_own_share(family: str) -> None:
    model = make(family, keep_per="row")
    whole = model(input_ids=IDS).logits
    out = model(input_ids=IDS[:, :6], use_cache=True)
    pieces = [out.logits]
    for token in range(6, IDS.shape[1]):
        out = model(input_ids=IDS[:, token : token + 1], cache=out.cache, use_cache=True)
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)


def written(model: Any, **words: Any) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """(what a model writes, (vectors it encoded, keys it saw) at each call of an attention)."""
    seen: list[tuple[int, int]] = []
    given: dict[str, Any] = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(IDS)} | words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProductQuantizer, "encode", counting(ProductQuantizer.encode, seen))
        patch.setattr(attention, "lookup", seeing(attention.lookup, seen))
        return model.generate(input_ids=IDS, **given), seen


def counting(encode: Any, seen: list[tuple[int, int]]) -> Any:
    def counted(self: ProductQuantizer, z: torch.Tensor) -> torch.Tensor:
        seen.append((z.shape[2], 0))
        return encode(self, z)

    return counted


def seeing(lookup: Any, seen: list[tuple[int, int]]) -> Any:
    def seen_by(q_codes: torch.Tensor, k_codes: torch.Tensor, *rest: Any, **words: Any) -> Any:
        (of_q, _), (of_k, _) = seen.pop(), seen.pop()
        seen.append((of_q + of_k, k_codes.shape[2]))
        return lookup(q_codes, k_codes, *rest, **words)

    return seen_by


@pytest.mark.parametrize("family", ["llama", "mistral", "opt"])
@pytest.mark.parametrize("words", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_step_with_a_cache_encodes_new_keys_alone(family: str, words: dict[str, Any]) -> None:
    model = make(family)
    out, seen = written(model, **words)
    assert [each[0] for each in seen] == [2 * 19] * 2 + [2] * 2 * 8  # a prompt's queries and keys, then one of each
    assert seen[-1][1] == (6 if family == "mistral" else 19 + 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedCodes, "codes_of", lambda self, k, new, quantizer: quantizer.encode(k))
        anew, all_of_them = written(model, **words)
    assert torch.equal(out, anew)
    assert sum(each[0] for each in all_of_them) > sum(each[0] for each in seen)


@torch.no_grad()
def test_codes_go_where_a_caches_keys_go() -> None:
    """Cropped, repeated, chosen rows, a copy, other code books: what follows is as without kept codes."""
    model = make("llama", keep_per="row")
    cache = model(input_ids=IDS[:2, :12], use_cache=True).cache
    for change in (
        lambda: cache.crop(-3),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.reorder_cache(torch.tensor([3, 2, 0, 1])),
        lambda: cache.batch_select_indices(torch.tensor([1, 2])),
    ):
        change()
    ids = IDS[[1, 0], :9]
    for more in ([[5, 6, 7]] * 2, [[8], [9]]):
        copied, new = copy.deepcopy(cache), torch.tensor(more)
        ids = torch.cat([ids, new], dim=1)
        whole = model(input_ids=ids, use_cache=False).logits[:, -new.shape[1] :]
        for each in (copied, cache):
            torch.testing.assert_close(model(input_ids=new, cache=each, use_cache=True).logits, whole, atol=1e-5, rtol=1e-5)
        assert all(layer.codes.shape[:3] == layer.keys.shape[:3] for layer in cache.layers)
    for each in model.attentions:
        each.quantizer.codebook.normal_()
    new = torch.tensor([[11], [12]])
    kept = [layer.codes for layer in cache.layers]
    model(input_ids=new, cache=cache, use_cache=True)
    assert not any(torch.equal(layer.codes[:, :, :-1], old) for layer, old in zip(cache.layers, kept, strict=True))
    cache.reset()
    torch.testing.assert_close(model(input_ids=IDS, cache=cache, use_cache=True).logits, model(input_ids=IDS, use_cache=False).logits)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_left_padding_changes_no_row(family: str) -> None:
    model = make(family)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :7], mask[0, :7] = 0, 0
    words: dict[str, Any] = {} if family == "opt" else {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    together = model(input_ids=ids, attention_mask=mask, **words).logits
    torch.testing.assert_close(together[0, 7:], model(input_ids=IDS[:1, 7:]).logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together[1], model(input_ids=IDS[1:2]).logits[0], atol=1e-4, rtol=1e-4)
    written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    alone = model.generate(input_ids=IDS[:1, 7:], attention_mask=mask[:1, 7:], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(written[0, 7:], alone[0])


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    model = make().train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    torch.optim.SGD([parameter for _, parameter in model.trained()], lr=0.1).step()
    model.eval().save_pretrained(tmp_path / "adapter")
    again = SPTModel.from_pretrained(base(), tmp_path / "adapter")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    other = base()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="is an adapter of another base model"):
        SPTModel.from_pretrained(other, tmp_path / "adapter")
    with pytest.raises(FileExistsError, match="is not empty"):
        model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_stats_tell_loads_recall_mass_and_bytes() -> None:
    model = make()
    model(input_ids=IDS)
    stats = model.stats()
    assert len(stats) == 2
    assert all(sum(each.load) == pytest.approx(2) and 0 < each.recall <= 1 and 0 < each.mass < 1 for each in stats)
    kept = sum(min(3, i + 1) for i in range(19)) * 4 * 3
    assert stats[0].stored_bytes == kept * (4 + 2)
    with chosen_by(model, true_keys):
        assert all(each.recall > 0.99 for each in model.stats())


def test_of_a_padded_row_stats_look_at_its_own_tokens_alone() -> None:
    model, mask = make("mistral"), torch.ones_like(IDS)
    mask[:, :7] = 0
    words = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    padded, alone = model.stats(input_ids=IDS, **words), model.stats(input_ids=IDS[:, 7:])
    for one, two in zip(padded, alone, strict=True):
        assert (one.recall, one.mass, one.stored_bytes) == pytest.approx((two.recall, two.mass, two.stored_bytes), abs=1e-5)
    with chosen_by(model, true_keys):
        assert all(each.recall == 1 for each in model.stats(input_ids=IDS, **words))


def test_what_the_mask_cannot_say_is_refused() -> None:
    model = make()
    with pytest.raises(NotImplementedError, match="this mask is more than causal .*position_ids that begin anew"):
        model(input_ids=IDS, position_ids=torch.cat([torch.arange(9), torch.arange(10)]).expand(3, -1), use_cache=False)
    with pytest.raises(NotImplementedError, match="a cache of fixed length .* expected one that grows"):
        model.generate(input_ids=IDS, max_new_tokens=2, cache_implementation="static", disable_compile=True)
    with pytest.raises(ValueError, match=r"key_mask is .* expected \[3, 19\]"):
        model(input_ids=IDS, attention_mask=torch.zeros(3, 1, 19, 19))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_of_another_type_trains_and_answers_in_its_precision(dtype: torch.dtype) -> None:
    expected = make(ffn_active=4, attention_keep=1)  # no choice that rounding may turn
    model = copy.deepcopy(expected).to(dtype)
    out = model.train()(input_ids=IDS, labels=IDS)
    out.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for _, parameter in model.trained())
    exact = expected(input_ids=IDS).logits
    error = (out.logits.float() - exact).norm() / exact.norm()
    assert out.logits.dtype == dtype
    assert error < max(20 * torch.finfo(dtype).eps, 1e-5)


def test_autocast_and_checkpoints_give_the_same_gradients() -> None:
    grads = []
    for way in ("plain", "autocast", "checkpoints"):
        model = make("opt", ffn_active=4, attention_keep=1).train()
        if way == "checkpoints":
            model.plain.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        grads.append(torch.cat([parameter.grad.flatten() for _, parameter in model.trained()]))
    assert torch.allclose(grads[0], grads[2], atol=1e-6)
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 0.05


def test_the_dense_networks_dropout_goes_and_copies_answer_alike() -> None:
    torch.manual_seed(0)
    model = get_spt_model(OPTForCausalLM(OPTConfig(**OPT | {"dropout": 0.5})), SPTConfig(lora_r=3)).train()
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS).logits)
    model(input_ids=IDS, labels=IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.eval()(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)
        twin.load_state_dict(model.state_dict())


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel is of no known family"):
        get_spt_model(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)))
    with pytest.raises(ValueError, match="has 24 channels and ffn_blocks is 5"):
        make(ffn_blocks=5)
    with pytest.raises(ValueError, match="a head has 8 numbers and codeword_dim is 3"):
        make(codeword_dim=3)
    quantised = base()
    quantised.model.layers[1].mlp.up_proj = torch.ao.nn.quantized.dynamic.Linear(32, 24)
    with pytest.raises(ValueError, match="load the model without quantisation"):
        get_spt_model(quantised)
    with pytest.raises(RuntimeError, match="no dense model to merge into"):
        make().merge_and_unload()
    with pytest.raises(ValueError, match="no pass went before"):
        make().stats()
    model = make()
    with torch.no_grad():
        model.plain.model.layers[1].self_attn.q_proj.base_layer.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="queries or keys of layer 1 are not finite"):
        model(input_ids=IDS)
    foreign = base()
    foreign.set_attn_implementation("spt")
    with pytest.raises(NotImplementedError, match="LlamaAttention is no causal self-attention with a code book"):
        foreign(IDS)
    for words, message in (
        ({"attention_keep": 0}, "attention_keep is 0"),
        ({"ffn_active": 5}, "ffn_active is 5"),
        ({"codewords": 300}, "at most 256"),
        ({"clamp": -1.0}, "clamp is -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SPTConfig(**words)  # pyright: ignore[reportArgumentType]
