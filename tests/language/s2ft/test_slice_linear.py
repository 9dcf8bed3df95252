"""S2FT's core: permutations, gradients, trajectories, layouts and saved bytes, each against something written out another way."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from s2ft_models import EVERY, FAMILIES, IDS, LAYOUTS, bits_equal, logits, loss_of, make, state, train, trained
from torch import nn
from torch.nn import functional as F

from fewer.data.fetching import cache_folder
from fewer.language import S2FTConfig, S2Linear, get_s2ft_model, memory_plan, permute_, select_units
from fewer.language._shared.lora import lora_rank, with_lora
from fewer.language._shared.structure import matrix, structure_of
from fewer.language.s2ft.permutation import Permutation, head_order, joint_order
from fewer.language.s2ft.selection import Selection
from fewer.meters import saved_bytes

# Permutation


@pytest.mark.parametrize("family", FAMILIES)
def test_permuting_coupled_structures_leaves_the_logits_and_its_inverse_restores_the_bits(family):
    model = make(family, torch.float64)
    before, at_first = logits(model), state(model)
    selection = select_units(model, S2FTConfig(**EVERY, seed=3))
    permutation = permute_(model, selection)
    assert permutation.heads
    assert permutation.channels
    assert not bits_equal(state(model), at_first)
    assert torch.allclose(logits(model), before, rtol=0, atol=1e-10)
    permutation.inverse().apply_(model)
    assert bits_equal(state(model), at_first)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_legal_order_of_heads_and_channels_leaves_the_logits(family):
    model = make(family, torch.float64)
    before, structure = logits(model), structure_of(model)
    draw = torch.Generator().manual_seed(2)
    groups = torch.randperm(structure.kv_heads, generator=draw)
    heads = torch.cat([structure.group * each + torch.randperm(structure.group, generator=draw) for each in groups])
    permutation = Permutation(structure, {1: torch.randperm(24, generator=draw)}, {0: heads, 2: heads.flip(0)})
    permutation.apply_(model)
    assert torch.allclose(logits(model), before, rtol=0, atol=1e-10)


def test_permuting_a_grouped_models_query_heads_freely_would_change_it():
    """What `head_order` must not do: the reason why attention is gathered."""
    model = make("llama-grouped", torch.float64)
    before, structure = logits(model), structure_of(model)
    Permutation(structure, {}, {0: torch.tensor([0, 2, 1, 3])}).apply_(model)
    assert not torch.allclose(logits(model), before, atol=1e-4)


@given(st.sets(st.integers(0, 19)), st.sets(st.integers(0, 19)))
def test_both_trained_parts_are_ranges_and_the_rest_keeps_its_order(up, down):
    order = joint_order(up, down, 20).tolist()
    only_up, both = len(up - down), len(up & down)
    assert sorted(order) == list(range(20))
    assert set(order[: len(up)]) == up
    assert set(order[only_up : only_up + len(down)]) == down
    rest = order[only_up + both + len(down - up) :]
    assert rest == sorted(rest)


@given(st.sets(st.integers(0, 2)), st.sets(st.integers(0, 5)))
def test_key_value_heads_move_with_their_query_heads(v, o):
    structure = structure_of(make("llama-grouped"))
    structure = type(structure)(structure.family, 6, 3, 4, (24,))
    order = head_order(v, o, structure)
    assert sorted(order.tolist()) == list(range(6))
    assert all(a // 2 == b // 2 for a, b in order.reshape(-1, 2).tolist())
    assert set((order[::2] // 2)[: len(v)].tolist()) == v


# Gradients


def split_loss(layer, x, upstream, parts):
    """The gradient that `parts` micro-batches accumulate."""
    for some_x, some_dy in zip(x.chunk(parts), upstream.chunk(parts), strict=True):
        (layer(some_x) * some_dy).sum().backward()


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("form", ["view", "gather", "delta"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_layers_gradient_is_the_slice_of_the_full_one(side, form, parts):
    torch.manual_seed(0)
    base = nn.Linear(7, 5).double()
    index = torch.tensor([1, 2, 3]) if form == "view" else torch.tensor([0, 2, 4])
    x, dy = torch.randn(6, 4, 7, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, 5, dtype=torch.float64)
    (F.linear(x, full := base.weight.detach().clone().requires_grad_(), base.bias) * dy).sum().backward()
    wanted, wanted_x = full.grad.index_select(0 if side == "rows" else 1, index), x.grad.clone()
    x.grad = None
    layer = S2Linear(base, index, side, form)
    split_loss(layer, x, dy, parts)
    assert torch.allclose(layer.s.grad, wanted, rtol=0, atol=1e-12)
    assert torch.allclose(x.grad, wanted_x, rtol=0, atol=1e-12)
    assert base.weight.grad is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_models_gradients_are_slices_of_the_full_ones(family, layout):
    full = make(family, torch.float64)
    loss_of(full).backward()
    model = get_s2ft_model(make(family, torch.float64), S2FTConfig(**EVERY, **LAYOUTS[layout]))
    loss_of(model).backward()
    orders, kinds = model._orders(), {each.side for each in model.layers.values()}
    assert kinds == {"rows", "columns"}
    for path, layer in model.layers.items():
        linear = full.get_submodule(path)
        gradient = linear.weight.grad.T if type(linear).__name__ == "Conv1D" else linear.weight.grad
        own = orders[path][layer.index] if path in orders else layer.index
        assert torch.allclose(layer.s.grad, gradient.index_select(0 if layer.side == "rows" else 1, own), rtol=0, atol=1e-12), path


def test_the_gradient_is_the_same_with_checkpointing_and_under_autocast():
    def gradients(prepare, **words):
        model = get_s2ft_model(make().train(), S2FTConfig(**EVERY))
        prepare(model)
        with torch.autocast("cpu", **words):
            loss = loss_of(model)
        loss.backward()
        return [parameter.grad for parameter in trained(model)]

    plain = gradients(lambda model: None, enabled=False)
    again = gradients(lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}), enabled=False)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-8) for a, b in zip(plain, again, strict=True))
    rough = gradients(lambda model: None, dtype=torch.bfloat16)
    assert all(
        b.dtype == torch.float32 and torch.allclose(a, b, rtol=0, atol=0.05 * a.abs().max()) for a, b in zip(plain, rough, strict=True)
    )


# Trajectories


def masked_training(model, selection, optimizer, steps=10):
    """Full fine-tuning whose gradients are masked before the optimizer sees them."""
    structure, masks = structure_of(model), {}
    for kind, layers in selection.units.items():
        for layer, units in layers.items():
            target = structure.target(kind, layer)
            mask = masks.setdefault(target.path, torch.zeros_like(matrix(model.get_submodule(target.path))))
            mask.index_fill_(0 if target.side == "rows" else 1, structure.positions(kind, layer, units), 1)
    weights = {path: model.get_submodule(path).weight for path in masks}
    for path, weight in weights.items():
        masks[path] = masks[path].T if type(model.get_submodule(path)).__name__ == "Conv1D" else masks[path]
        weight.register_hook(lambda gradient, mask=masks[path]: gradient * mask)
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    train(model, steps, optimizer(list(weights.values())))
    return masks


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
}


CASES = [("llama-grouped", "adamw"), ("llama-grouped", "sgd"), ("llama-grouped", "fused"), ("gpt2", "fused"), ("opt", "sgd")]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "optimizer"), CASES)
def test_training_is_full_training_with_masked_gradients(family, optimizer, layout):
    model, full, at_first = make(family, torch.float64), make(family, torch.float64), state(make(family, torch.float64))
    config = S2FTConfig(**EVERY, **LAYOUTS[layout])
    masks = masked_training(full, select_units(full, config), OPTIMIZERS[optimizer])
    wrapped = get_s2ft_model(model, config)
    train(wrapped, 10, OPTIMIZERS[optimizer](trained(wrapped)))
    plain = wrapped.merge_and_unload()
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, full.state_dict()[name], rtol=0, atol=1e-6), name
        path = name.removesuffix(".weight")
        mask = masks.get(path)
        if mask is None:
            assert torch.equal(value, at_first[name]), name
        else:
            changed = value != at_first[name]
            assert changed.any()
            assert not (changed & ~mask.bool()).any(), name


@pytest.mark.parametrize(
    ("dtype", "way", "logit", "weight"),
    [
        (torch.float64, torch.optim.AdamW, 1e-12, 1e-14),
        (torch.float32, torch.optim.SGD, 1e-5, 1e-6),
        # Adam divides by the root of squared gradients: where they are all rounding, so is the step, and processors round differently
        (torch.float32, torch.optim.AdamW, 1e-5, 1e-5),
    ],
)
def test_the_three_layouts_give_the_same_trained_model(dtype, way, logit, weight):
    models = {}
    for layout, words in LAYOUTS.items():
        wrapped = get_s2ft_model(make("qwen2", dtype), S2FTConfig(**EVERY, **words))
        train(wrapped, optimizer=way(trained(wrapped), lr=1e-2, weight_decay=0))
        models[layout] = (logits(wrapped), state(wrapped.merge_and_unload()))
    for layout in ("gather", "delta"):
        assert torch.allclose(models[layout][0], models["permuted"][0], rtol=0, atol=logit), layout
        for name, value in models[layout][1].items():
            assert torch.allclose(value, models["permuted"][1][name], rtol=0, atol=weight), (layout, name)


def test_a_step_between_forward_and_backward_is_an_error_as_it_is_for_any_weight():
    model = get_s2ft_model(make(), S2FTConfig(d_ratio=0.2))
    loss = loss_of(model)
    with torch.no_grad():
        trained(model)[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_two_passes_before_a_backward_pass_are_allowed():
    """As in preference training: in the gathered layout each pass sees to it that S is in the weight."""
    model = get_s2ft_model(make(), S2FTConfig(**EVERY, layout="gather"))
    (loss_of(model) - loss_of(model, IDS.flip(0))).backward()
    assert all(parameter.grad is not None for parameter in trained(model))


# Saved bytes


def kept(layer, x):
    with saved_bytes(layer) as saved:
        y = layer(x)
    return saved.total, y


def test_a_layer_keeps_its_own_slice_of_the_input_and_a_frozen_one_nothing():
    x = torch.randn(2, 8, 32, requires_grad=True)
    for form in ("view", "gather", "delta"):
        layer = S2Linear(nn.Linear(32, 16), torch.arange(4, 7), "columns", form)
        delta_bytes = 16 * 3 * 4 if form == "delta" else 0  # S - S0, which that product's backward pass needs
        assert kept(layer, x)[0] == 2 * 8 * 3 * 4 + delta_bytes
    assert kept(nn.Linear(32, 16).requires_grad_(False), x)[0] == 0
    assert kept(nn.Linear(32, 16), x)[0] == 2 * 8 * 32 * 4


def test_down_only_training_keeps_the_chosen_channels_of_downs_input():
    base = make("llama-grouped").requires_grad_(False)
    base.enable_input_require_grads()
    frozen, _ = kept(base, IDS)
    model = get_s2ft_model(make("llama-grouped"), S2FTConfig(d_ratio=0.2))
    model.base_model.enable_input_require_grads()
    channels = sum(len(layer.index) for layer in model.layers.values())
    assert channels == int(0.2 * 24 * 3)
    assert kept(model, IDS)[0] == frozen + IDS.numel() * channels * 4


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2"])
def test_a_model_keeps_less_than_with_lora_of_as_many_parameters(family):
    model = get_s2ft_model(make(family), S2FTConfig(d_ratio=0.3)).train()
    count = sum(parameter.numel() for parameter in trained(model))
    plain = make(family).train()
    lora = with_lora(plain, lora_rank(plain, structure_of(plain), count), structure_of(plain))
    assert kept(model, IDS)[0] <= kept(lora, IDS)[0]


def test_a_model_of_135_million_parameters_keeps_at_most_four_fifths_of_what_lora_keeps():
    folder = cache_folder() / "models" / "smollm2-135m"
    if not (folder / "DONE").is_file():
        pytest.skip("SmolLM2-135M is not in the cache: fewer data fetch smollm2-135m, or a run of the study, brings it")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).train()
    structure, ids = structure_of(model), torch.arange(100, 148).reshape(2, 24)
    wrapped = get_s2ft_model(model, S2FTConfig(d_ratio=0.03125))
    count, ours = sum(parameter.numel() for parameter in trained(wrapped)), kept(wrapped, ids)[0]
    lora = with_lora(wrapped.unload(), 4, structure)
    assert sum(parameter.numel() for parameter in trained(lora)) == count
    assert ours <= 0.8 * kept(lora, ids)[0]


def test_the_plan_counts_what_a_pass_keeps():
    model = make("qwen2").train()
    plan = memory_plan(model, S2FTConfig(d_ratio=0.3), tokens=tuple(IDS.shape))
    with saved_bytes(model) as saved:
        _ = loss_of(model)
    assert plan.rows["full"].activations == saved.total
    wrapped = get_s2ft_model(model, S2FTConfig(d_ratio=0.3))
    with saved_bytes(wrapped) as saved:
        _ = loss_of(wrapped)
    assert plan.rows["s2ft"].activations == saved.total
    assert plan.rows["s2ft"].trained == sum(parameter.numel() for parameter in trained(wrapped))
    assert plan.rows["s2ft"].optimizer == 2 * plan.rows["s2ft"].gradients == 8 * plan.rows["s2ft"].trained
    assert "lora" in str(plan)


# Selection


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 99), st.booleans())
def test_counts_are_int_of_ratio_times_units_times_layers(d, o, seed, per_layer):
    model = make("llama-grouped")
    config = S2FTConfig(d_ratio=d, o_ratio=o, seed=seed, per_layer=per_layer)
    selection = select_units(model, config)
    for kind, ratio, units in (("d", d, 24), ("o", o, 4)):
        wanted = 3 * max(1, int(ratio * units)) if per_layer else max(1, int(ratio * units * 3))
        assert selection.count(kind) == wanted
        assert all(len(set(each)) == len(each) and max(each) < units for each in selection.units[kind].values())
    assert select_units(model, config) == selection


def test_another_seed_draws_other_units_and_layers_differ():
    model = make("llama-grouped")
    chosen = [select_units(model, S2FTConfig(d_ratio=0.2, seed=seed)).units["d"] for seed in range(5)]
    assert len({str(each) for each in chosen}) == 5
    assert any(len({len(units) for units in each.values()}) > 1 for each in chosen)


def by_hand(model, way, ids, mask):
    """Scores of kinds v, o, u, d of every unit, from hooks and gradients written out."""
    size, scores = 4, {kind: [] for kind in "voud"}
    inputs, outputs = {}, {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: outputs.__setitem__(name, out))
        module.register_forward_pre_hook(lambda m, args, name=name: inputs.__setitem__(name, args[0] if args else None))
    model.requires_grad_(True)
    labels = ids.masked_fill(mask == 0, -100)
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    for number in range(3):
        layer = f"model.layers.{number}."
        o, d, v, u = (layer + name for name in ("self_attn.o_proj", "mlp.down_proj", "self_attn.v_proj", "mlp.up_proj"))
        if way == "activation":
            seen = {"v": outputs[v], "o": inputs[o], "d": inputs[d], "u": inputs[d]}
            for kind, values in seen.items():
                mean = values.detach()[mask.bool()].abs().mean(0)
                scores[kind].append(mean if kind in "ud" else mean.reshape(-1, size).mean(1))
        else:
            for kind, path in (("v", v), ("o", o), ("d", d), ("u", u)):
                weight = model.get_submodule(path).weight
                values = weight.detach() if way == "weight" else weight.grad
                norms = values.norm(dim=1 if kind in "vu" else 0)
                scores[kind].append(norms if kind in "ud" else norms.reshape(-1, size).norm(dim=1))
    return scores


@pytest.mark.parametrize("way", ["weight", "activation", "gradient", "product"])
@pytest.mark.parametrize("order", ["smallest", "largest"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_scored_selections_agree_with_scores_written_out_by_hand(way, order, per_layer):
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    if way == "product":
        parts = [by_hand(make("llama-grouped", torch.float64), each, IDS, mask) for each in ("weight", "activation")]
        scores = {kind: [w * a for w, a in zip(parts[0][kind], parts[1][kind], strict=True)] for kind in "voud"}
    else:
        scores = by_hand(make("llama-grouped", torch.float64), way, IDS, mask)
    model = make("llama-grouped", torch.float64)
    config = S2FTConfig(**EVERY, selection=way, order=order, per_layer=per_layer)
    selection = select_units(model, config, calibration=[{"input_ids": IDS, "attention_mask": mask}])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    for kind, layers in scores.items():
        groups = [[(score.item(), number, unit) for unit, score in enumerate(each)] for number, each in enumerate(layers)]
        groups = groups if per_layer else [[entry for group in groups for entry in group]]
        wanted = set()
        for group in groups:
            ranked = sorted(group, reverse=order == "largest")
            wanted |= {(number, unit) for _, number, unit in ranked[: max(1, int(EVERY[f"{kind}_ratio"] * len(group)))]}
        assert {(number, unit) for number, units in selection.units[kind].items() for unit in units} == wanted, kind


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state():
    model = get_s2ft_model(make(), S2FTConfig(**EVERY))
    optimizer = train(model, 2, torch.optim.AdamW(model.parameters(), lr=1e-3))
    own = {layer.s for layer in model.layers.values()}
    assert {parameter for parameter in model.parameters() if parameter.grad is not None} == own
    assert set(optimizer.state) == own
    assert all(optimizer.state[s][moment].shape == s.shape for s in own for moment in ("exp_avg", "exp_avg_sq"))


def test_layers_without_a_chosen_unit_stay_plain():
    model = make()
    plain = copy.deepcopy(model)
    wrapped = get_s2ft_model(model, S2FTConfig(d_ratio=0.02))
    assert list(wrapped.layers) == [
        structure_of(plain).target("d", next(iter(select_units(plain, S2FTConfig(d_ratio=0.02)).units["d"]))).path
    ]
    assert Selection({}).count("d") == 0
