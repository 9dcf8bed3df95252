"""An adapter is read back as it was, in each dtype and after each thing that can happen to its model, and only onto its own base."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from s2ft_models import EVERY, LAYOUTS, bits_equal, logits, make, state, train, trained, wrap

from fewer.language import S2FTConfig, S2FTModel, get_s2ft_model, to_peft_lora

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def through_pickle(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # what this test has written itself


def switched(model):
    model.add_adapter("other", model.adapter())
    model.set_adapter("other")
    return model


STATES = {
    "trained": lambda model: model,
    "copied": copy.deepcopy,
    "pickled": through_pickle,
    "unmerged": lambda model: (model.unmerge_adapter(), model)[1],
    "merged and unloaded": lambda model: (model.merge_and_unload(), model)[1],
    "unloaded": lambda model: (model.unload(), model)[1],
    "unmerged and unloaded": lambda model: (model.unmerge_adapter(), model.unload(), model)[2],
    "switched": switched,
    "copied after merging": lambda model: (model.merge_and_unload(), copy.deepcopy(model))[1],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("life", STATES)
def test_an_adapter_is_the_same_whenever_it_is_saved(life, dtype, tmp_path):
    model = wrap(dtype=dtype)
    optimizer = torch.optim.SGD(trained(model), lr=0.5)
    train(model, 2, optimizer)
    wanted = model.adapter()
    STATES[life](model).save_pretrained(tmp_path)
    loaded = S2FTModel.from_pretrained(make(dtype=dtype), tmp_path)
    found = loaded.adapter()
    assert found.base == wanted.base
    assert found.slices.keys() == wanted.slices.keys() != set()
    for path, part in wanted.slices.items():
        assert torch.equal(found.slices[path].index, part.index)
        tolerance = 1e-7 if dtype == torch.float32 else 0.0  # float32's change is stored in float32
        assert torch.allclose(found.slices[path].delta.double(), part.delta.double(), rtol=0, atol=tolerance), path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merged_model_saves_and_loads_as_a_plain_one(layout, tmp_path):
    from transformers import AutoModelForCausalLM

    model = wrap("llama", dtype=torch.bfloat16, **EVERY, **LAYOUTS[layout])
    train(model, 2)
    plain = model.merge_and_unload()
    plain.save_pretrained(tmp_path)
    assert bits_equal(state(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")), state(plain))


@pytest.mark.parametrize("act", ["set_adapter", "merge_adapter", "unmerge_adapter", "unload", "merge_and_unload"])
def test_a_wrapper_that_is_empty_says_so(act):
    model = wrap()
    model.merge_and_unload()
    with pytest.raises(ValueError, match=r"merged or unloaded already; expected .*wrap it again"):
        getattr(model, act)(*(["default"] if act == "set_adapter" else []))


def test_another_base_of_equal_shapes_is_refused_by_its_hash_and_left_as_it_was(tmp_path):
    model = wrap()
    train(model, 2)
    model.save_pretrained(tmp_path)
    other = make(seed=1)
    before = state(other)
    with pytest.raises(
        ValueError, match=rf"trained on other weights than these \(base {model.base_hash}, these are \w+\); expected its base"
    ):
        S2FTModel.from_pretrained(other, tmp_path)
    assert bits_equal(state(other), before)
    assert all(parameter.requires_grad for parameter in other.parameters())
    merged = model.merge_and_unload()
    with pytest.raises(ValueError, match="merged already needs no second merge"):
        S2FTModel.from_pretrained(merged, tmp_path)
    S2FTModel.from_pretrained(other, tmp_path, other_base=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_base_in_other_precision_is_its_base(dtype, tmp_path):
    model = wrap()
    train(model, 1)
    model.save_pretrained(tmp_path)
    S2FTModel.from_pretrained(make(dtype=dtype), tmp_path)


def broken(folder, **words):
    about = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(about | words))


@pytest.mark.parametrize(
    "words",
    [
        {"sizes": None},
        {"sizes": {}},
        {"sizes": [1]},
        {"sizes": {"model.layers.0.mlp.down_proj": None}},
        {"sizes": {"model.layers.9.mlp.down_proj": 24}},
        {"base": None},
        {"base": 5},
        {"peft_type": "LORA"},
        {"d_ratio": "x"},
        {"d_ratio": float("nan")},
        {"seed": 10**30},
        {"seed": None},
        {"in_place": "yes"},
        {"layout": 3},
        {"selection": ["random"]},
        {"target_families": 5},
        {"stranger": 1},
    ],
    ids=str,
)
def test_odd_values_in_an_adapter_are_told_in_one_line(words, tmp_path):
    wrap().save_pretrained(tmp_path)
    broken(tmp_path, **words)
    for read in (lambda: S2FTModel.from_pretrained(make(), tmp_path), lambda: to_peft_lora(tmp_path, tmp_path / "lora")):
        with pytest.raises(ValueError, match="is no S2FT adapter that can be read") as told:
            read()
        assert "\n" not in str(told.value)
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_cut_files_of_an_adapter_are_told_in_one_line(file, tmp_path):
    wrap().save_pretrained(tmp_path)
    content = (tmp_path / file).read_bytes()
    for wrong in (content[: len(content) // 2], b"", b"\xff\xfe not these"):
        (tmp_path / file).write_bytes(wrong)
        with pytest.raises(ValueError, match="is no S2FT adapter that can be read"):
            S2FTModel.from_pretrained(make(), tmp_path)


@pytest.mark.parametrize("share", ["module", "weight"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_that_share_weights_are_refused_by_name(share, layout):
    model = make("qwen2")
    if share == "module":
        model.model.layers[2].mlp = model.model.layers[0].mlp
    else:
        model.model.layers[2].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    before = state(model)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.\w+.weight and model.layers.2.mlp.\w+.weight are one weight"):
        get_s2ft_model(model, S2FTConfig(d_ratio=0.2, **LAYOUTS[layout]))
    assert bits_equal(state(model), before)


def test_tied_embeddings_are_no_hindrance(tmp_path):
    model = make("gemma")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wrapped = get_s2ft_model(model, S2FTConfig(**EVERY))
    train(wrapped, 2)
    plain = wrapped.merge_and_unload()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    wrapped.save_pretrained(tmp_path)
    assert torch.allclose(logits(S2FTModel.from_pretrained(make("gemma"), tmp_path)), logits(plain), atol=1e-5)
