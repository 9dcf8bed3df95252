"""S2FT in its host libraries: adapters on disk and in the weights, ties that hold, transformers' Trainer, accelerate, peft, DDP."""

from __future__ import annotations

import contextlib
import copy
import json

import pytest
import torch
from s2ft_models import EVERY, FAMILIES, LAYOUTS, assert_tied, bits_equal, logits, make, state, train, trained, wrap
from torch import nn

from fewer.language import S2FTConfig, S2FTModel, get_s2ft_model
from fewer.language.s2ft.adapters.adapter import Adapter, Slice, add_slices, fuse
from fewer.language.s2ft.slice_linear import S2Linear


@pytest.fixture
def saved(tmp_path):
    """Two trained adapters of the same base, with different selections: (folder, logits) by name."""
    made = {}
    for seed, name in enumerate(("a", "b", "c")):
        model = wrap(**EVERY, seed=seed)
        train(model, 5)
        model.save_pretrained(tmp_path / name)
        made[name] = logits(model)
    return tmp_path, made


# In and out of the weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merging_and_unmerging_restores_the_bits_in_bfloat16(layout):
    plain = state(make(dtype=torch.bfloat16))
    model = wrap(dtype=torch.bfloat16, **EVERY, **LAYOUTS[layout])
    train(model, 3)
    with_adapter = logits(model)
    off, on = [], []
    for _ in range(3):
        model.unmerge_adapter()
        off.append(logits(model))
        model.merge_adapter()
        on.append(logits(model))
    assert all(torch.equal(each, logits(make(dtype=torch.bfloat16))) for each in off) or layout == "permuted"
    assert torch.allclose(off[0].float(), logits(make(dtype=torch.bfloat16)).float(), atol=0.3)
    assert all(torch.equal(each, off[0]) for each in off)
    assert all(torch.equal(each, with_adapter) for each in on)
    with model.disable_adapter():
        assert torch.equal(logits(model), off[0])
    assert bits_equal(state(model.unload()), plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_switching_a_hundred_times_leaves_no_drift(layout, tmp_path):
    models = [wrap(dtype=torch.bfloat16, **EVERY, **LAYOUTS[layout], seed=seed) for seed in (0, 1)]
    for model, name in zip(models, "ab", strict=True):
        train(model, 3)
        model.save_pretrained(tmp_path / name)
    model = models[0]
    first = model.adapter()
    model.load_adapter(tmp_path / "b", "b")
    model.set_adapter("b")
    second = logits(model)
    for _ in range(50):
        model.set_adapter("default")
        model.set_adapter("b")
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    for path, part in model.adapter().slices.items():
        assert torch.equal(part.delta, first.slices[path].delta)
        assert torch.equal(part.index, first.slices[path].index)
    assert bits_equal(state(model.unload()), state(make(dtype=torch.bfloat16)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_adapter_gives_the_trained_model_in_any_layout(family, layout, tmp_path):
    model = wrap(family, **EVERY, **LAYOUTS[layout])
    train(model, 3)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    for other in LAYOUTS.values():  # the layout is private: a file of one is loaded into another
        (tmp_path / "adapter_config.json").write_text(json.dumps(about | {"layout": "permuted", "in_place": True} | other))
        loaded = S2FTModel.from_pretrained(make(family), tmp_path)
        assert torch.allclose(logits(loaded), wanted, atol=2e-5)
    plain = loaded.merge_and_unload()
    assert torch.allclose(logits(plain), wanted, atol=2e-5)
    assert not any(isinstance(module, S2Linear) for module in plain.modules())
    assert all(parameter.is_contiguous() for parameter in plain.parameters())
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_bfloat16_adapters_are_read_back_bit_for_bit(tmp_path):
    model = wrap(dtype=torch.bfloat16)
    train(model, 3)
    model.save_pretrained(tmp_path)
    merged = state(model.merge_and_unload())
    assert bits_equal(state(S2FTModel.from_pretrained(make(dtype=torch.bfloat16), tmp_path).merge_and_unload()), merged)


def test_training_goes_on_from_a_saved_adapter(tmp_path):
    model = wrap()
    train(model, 2)
    model.save_pretrained(tmp_path)
    loaded = S2FTModel.from_pretrained(make(), tmp_path)
    train(model, 3)
    train(loaded, 3)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)


# Several adapters


def test_disjoint_adapters_add_up_and_keep_their_effects():
    base = make()
    config = S2FTConfig(**EVERY, layout="gather")
    parts = []
    for units in ((0, 3), (1, 7)):
        model = get_s2ft_model(copy.deepcopy(base), S2FTConfig(d_ratio=0.2))
        train(model, 3)
        part = next(iter(model.adapter().slices.values()))
        delta = part.delta[:, :1].repeat(1, 2)
        parts.append(Adapter(config, model.base_hash, {"model.layers.1.mlp.down_proj": Slice("columns", torch.tensor(units), delta, 24)}))
    fusion, reverse = fuse(parts), fuse(parts[::-1])
    (both,), (back,) = fusion.adapter.slices.values(), reverse.adapter.slices.values()
    assert not fusion.overlaps
    assert both.index.tolist() == [0, 1, 3, 7]
    assert torch.equal(both.delta, back.delta)
    for part in parts:
        (own,) = part.slices.values()
        assert torch.equal(both.delta[:, torch.isin(both.index, own.index)], own.delta)


def test_overlapping_adapters_add_up_and_the_overlap_is_told(saved):
    folder, _ = saved
    a, b, c = (Adapter.load(folder / name) for name in "abc")
    fusion = fuse([a, b, c])
    assert fusion.overlaps
    for path, part in fusion.adapter.slices.items():
        dense = torch.zeros(part.shape, dtype=torch.float64)
        touched = torch.zeros(part.size)
        for each in (a, b, c):
            if path in each.slices:
                own = each.slices[path]
                dense.index_add_(own.axis, own.index, own.delta.double())
                touched[own.index] += 1
        assert torch.allclose(dense.index_select(part.axis, part.index), part.delta, rtol=1e-12, atol=1e-12)
        assert fusion.overlaps.get(path, ()) == tuple((touched > 1).nonzero()[:, 0].tolist())
    for order in ([c, a, b], [b, c, a]):
        again = fuse(order).adapter.slices
        assert all(torch.equal(part.delta, again[path].delta) for path, part in fusion.adapter.slices.items())


def test_sums_of_three_do_not_depend_on_their_order_to_the_last_bit():
    draw = torch.Generator().manual_seed(0)
    index = torch.arange(8)
    parts = [Slice("rows", index, torch.randn(8, 50, dtype=torch.float64, generator=draw) * 10.0**scale, 8) for scale in (0, 1, -1)]
    sums = [add_slices([parts[each] for each in order])[0].delta for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0))]
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_a_fused_adapter_is_the_sum_in_the_weights(saved):
    folder, _ = saved
    model = S2FTModel.from_pretrained(make(), folder / "a", adapter_name="a")
    model.load_adapter(folder / "b", "b")
    fusion = model.add_adapters(["a", "b"], "both")
    model.set_adapter("both")
    merged, plain = state(model.merge_and_unload()), state(make())
    for path, part in fusion.adapter.slices.items():
        change = (merged[f"{path}.weight"] - plain[f"{path}.weight"]).index_select(part.axis, part.index)
        assert torch.allclose(change, part.delta.float(), atol=1e-6)


@pytest.mark.parametrize("family", ["llama-grouped", "gpt2", "opt"])
def test_a_batch_of_several_adapters_equals_single_runs(family, tmp_path):
    for seed, name in enumerate("abc"):
        other = wrap(family, **EVERY, seed=seed)
        train(other, 4)
        other.save_pretrained(tmp_path / name)
    model = S2FTModel.from_pretrained(make(family), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    model.load_adapter(tmp_path / "c", "c")
    ids, names = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(5)), ["b", "a", "__base__", "c"]
    together = logits(model, ids, adapter_names=names)
    for row, name in enumerate(names):
        with model.disable_adapter() if name == "__base__" else contextlib.nullcontext():
            if name != "__base__":
                model.set_adapter(name)
            assert torch.allclose(logits(model, ids[row : row + 1])[0], together[row], atol=1e-5), name
    words = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    written = model.generate(input_ids=ids, adapter_names=names, **words)
    model.set_adapter("b")
    assert torch.equal(model.generate(input_ids=ids[:1], **words)[0], written[0])


# Ties


def storages(model):
    return len({tensor.untyped_storage().data_ptr() for tensor in model.parameters()})


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_s_and_the_weight_stay_one_through_moves_copies_and_states(family, layout):
    model = wrap(family, **EVERY, **LAYOUTS[layout])
    count, parameters = storages(model), len(trained(model))
    train(model, 2)
    wanted = logits(model)
    other = wrap(family, **EVERY, **LAYOUTS[layout])
    other.base_model.load_state_dict(model.base_model.state_dict())
    small = wrap(family, **EVERY, **LAYOUTS[layout])
    small.load_state_dict(model.state_dict())
    made = {
        "deepcopy": copy.deepcopy(model),
        "to": copy.deepcopy(model).to(torch.float64).to(torch.float32),
        "state of the base": other,
        "state of the adapter": small,
    }
    for way, each in made.items():
        assert torch.allclose(logits(each), wanted, atol=1e-5), way
        assert (storages(each), len(trained(each))) == (count, parameters), way
        assert_tied(each)
        train(each, 1)
    assert torch.equal(logits(model), wanted), "a copy shares nothing with what it was made of"
    assert storages(model.to(torch.bfloat16)) == count


def test_a_weight_that_another_library_replaces_is_tied_again():
    model = wrap(d_ratio=0.2)
    for layer in model.layers.values():
        layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().clone(), requires_grad=False)
    assert_tied(model)
    train(model, 1)
    assert all(layer.s.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr() for layer in model.layers.values())


def test_a_base_state_holds_each_weight_once():
    model = wrap(d_ratio=0.2)
    names = model.base_model.state_dict()
    assert not any(name.endswith(".s") for name in names)
    assert sum(name.endswith("down_proj.base_layer.weight") for name in names) == len(model.layers)
