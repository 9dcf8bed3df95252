"""Settings and models that are written, read, copied and sent about."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import accelerate
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skip_models import planted, settings, text, written
from transformers import AutoModelForCausalLM

from fewer.language.ffn_skip import FFNSkipConfig, FFNSkipStats, disable_ffn_skip, enable_ffn_skip, ffn_skip, teacher_forced
from fewer.language.ffn_skip.skipping import stats_of

CONFIGS = st.builds(
    FFNSkipConfig,
    cold_start=st.integers(1, 3),
    cold_end=st.integers(4, 9),
    threshold=st.floats(-2, 2),
    max_skips=st.none() | st.integers(0, 9),
    warmup_tokens=st.integers(0, 99),
    warmup_counts=st.sampled_from(["generated", "position"]),
    skip_prefill=st.booleans(),
    mode=st.sampled_from(["adaptive", "static", "random", "layers", "off"]),
    static_layers=st.lists(st.just(3)).map(tuple),
    p=st.floats(0, 1),
    seed=st.integers(0, 2**70),
    rearm=st.booleans(),
    num_layers=st.none() | st.integers(9, 20),
)


@given(config=CONFIGS)
def test_settings_come_back_as_they_were_written(tmp_path_factory, config):
    file = tmp_path_factory.mktemp("settings") / "skip.json"
    assert FFNSkipConfig.load(config.save(file)) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == dataclasses.replace(config) == config


def test_a_file_is_replaced_only_when_told(tmp_path):
    (tmp_path / "skip.json").write_text("years of work")
    with pytest.raises(FileExistsError, match="overwrite"):
        settings().save(tmp_path / "skip.json")
    assert (tmp_path / "skip.json").read_text() == "years of work"
    settings().save(tmp_path / "skip.json", overwrite=True)
    assert FFNSkipConfig.load(tmp_path / "skip.json") == settings()


def through_pickle(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_of_an_enabled_model_skips_and_counts_for_itself(copied):
    model = enable_ffn_skip(planted(), settings(threshold=-1))
    twin = copied(model)
    out = written(twin, text(1, 5), 6)[0]
    assert stats_of(twin).tokens == 5
    assert stats_of(model).tokens == 0
    assert torch.equal(out, written(model, text(1, 5), 6)[0])
    disable_ffn_skip(twin)
    assert stats_of(model).skipped_blocks == 15
    assert torch.equal(written(twin, text(1, 5), 6)[0], written(planted(), text(1, 5), 6)[0])
    assert not any("forward" in vars(module) for module in twin.modules())


def test_an_enabled_model_is_saved_as_the_plain_one(tmp_path):
    model = enable_ffn_skip(planted(), settings())
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(written(read, text(1, 5), 6)[1], written(planted(), text(1, 5), 6)[1], atol=1e-6)


def test_stats_are_copied_and_sent(tmp_path):
    _, stats = teacher_forced(planted(), text(2, 9), settings(), 0, per_token=True)
    for twin in (copy.deepcopy(stats), pickle.loads(pickle.dumps(stats))):
        assert twin.ratio == stats.ratio
        assert torch.equal(twin.per_token, stats.per_token)
    assert FFNSkipStats(4, 10).ratio == FFNSkipStats(4, 10).ratio_all == FFNSkipStats(4, 10).untouched_ratio == 0
    assert FFNSkipStats(4, 10, keeps_tokens=True).per_token.shape == (0, 0, 4)


def test_with_adapters_beside_attention_and_ffn():
    model = planted()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    config, ids = settings(threshold=-1), text(1, 14)
    with ffn_skip(adapted, config) as stats:
        out, of_steps = written(adapted, ids[:, :6], 8)
    assert stats.ratio == 0.5
    assert torch.allclose(of_steps, teacher_forced(adapted, out[:, :-1], config, 6)[0][:, 5:], atol=1e-4)


def test_with_quantised_weights():
    model = torch.ao.quantization.quantize_dynamic(planted(), {torch.nn.Linear})
    config, ids = settings(), text(2, 14)
    with ffn_skip(model, config, per_token=True) as stats:
        out, _ = written(model, ids[:, :6], 8)
    assert type(model.model.layers[2].mlp.up_proj) is not torch.nn.Linear
    assert stats.skipped_blocks > 0
    assert stats.flops_per_block == 6 * 32 * 48
    emptied = teacher_forced(model, out[:, :-1], settings(threshold=-1), 0)[1]
    assert emptied.ratio == 0.5


def test_with_the_hooks_of_accelerate():
    model = planted()
    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))
    config, ids = settings(), text(1, 14)
    with ffn_skip(model, config, per_token=True) as stats:
        mine = written(model, ids[:, :6], 8)[1]
    twin = planted()
    with ffn_skip(twin, config, per_token=True) as plain:
        theirs = written(twin, ids[:, :6], 8)[1]
    assert torch.equal(mine, theirs)
    assert torch.equal(stats.per_token, plain.per_token)
    assert stats.skipped_blocks > 0
    assert torch.equal(written(model, ids, 4)[1], written(twin, ids, 4)[1])
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(written(model, ids, 4)[1], written(twin, ids, 4)[1])


def test_states_that_are_not_contiguous_and_embeddings_given_in_place_of_ids():
    model, ids, config = planted(), text(2, 12), settings()
    embedded = model.get_input_embeddings()(ids)
    strided = embedded.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    with torch.no_grad(), ffn_skip(model, settings(skip_prefill=True)) as stats:
        mine = model(inputs_embeds=strided, use_cache=False).logits
    expected, forced = teacher_forced(model, ids, config, 0)
    assert torch.allclose(mine, expected, atol=1e-5)
    assert stats.per_layer == forced.per_layer


def test_layers_take_their_arguments_by_place_too():
    model, ids = planted(), text(1, 8)
    expected = teacher_forced(model, ids, settings(), 0)[0]
    for layer in model.model.layers:
        names = ["attention_mask", "position_ids", "cache", "use_cache", "position_embeddings"]

        def by_place(module, args, kwargs, names=names):
            return (*args, *(kwargs.pop(name) for name in names)), kwargs

        layer.register_forward_pre_hook(by_place, with_kwargs=True)
    assert torch.equal(teacher_forced(model, ids, settings(), 0)[0], expected)
