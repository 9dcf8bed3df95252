"""A recipe is one frozen thing that goes to JSON and back; its ledger is what is counted; its estimators have the area they should."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.lowbit.fp4_training import FP4Linear, FP4Recipe, cast_derivative
from fewer.lowbit.fp4_training.casts import Casts
from fewer.lowbit.fp4_training.gradients import dge
from fewer.lowbit.fp4_training.recipe import PRESETS
from fewer.meters import saved_bytes


@given(
    st.builds(
        dict,
        scale=st.sampled_from(["e8m0", "e4m3", "ue5m3", "fp32", "bf16"]),
        block=st.sampled_from([4, 16, 32]),
        tensor_scale=st.sampled_from(["off", "current", 1, 50]),
        stochastic=st.frozensets(st.sampled_from(["dy", "x_wgrad", "w_dgrad"])),
        sr_bits=st.sampled_from([None, 8]),
        hadamard=st.sampled_from(["none", "wgrad", "backward", "all"]),
        estimator=st.sampled_from(["ste", "dge", "spline", "ramp"]),
        weight_blocks=st.sampled_from(["1d", "2d"]),
        seed=st.integers(0, 2**40),
    )
)
@settings(max_examples=50, deadline=None)
def test_a_recipe_goes_to_json_and_back(words):
    recipe = FP4Recipe(**words)
    assert FP4Recipe.from_json(recipe.to_json()) == recipe
    assert hash(recipe) == hash(FP4Recipe(**words))


def test_numpys_numbers_go_to_json_too():
    recipe = FP4Recipe(block=np.int64(32), seed=np.int64(3))
    assert FP4Recipe.from_json(recipe.to_json()) == recipe


def test_the_presets_are_the_published_ones():
    assert {name: (r.scale, r.block, r.hadamard, r.weight_blocks) for name in PRESETS for r in [FP4Recipe.preset(name)]} == {
        "mxfp4": ("e8m0", 32, "none", "1d"),
        "mxfp4-sr-rht": ("e8m0", 32, "backward", "1d"),
        "nvfp4": ("e4m3", 16, "none", "1d"),
        "nvfp4-te": ("e4m3", 16, "wgrad", "2d"),
        "ue5m3": ("ue5m3", 16, "none", "1d"),
        "paper": ("ue5m3", 32, "backward", "1d"),
        "follow-up": ("ue5m3", 16, "none", "2d"),
    }
    follow_up = FP4Recipe.preset("follow-up")
    assert (follow_up.hold, follow_up.sr_bits, follow_up.zero_scale) == (50, 8, "one")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"element": "e9m9"}, "element is 'e9m9'; expected one of"),
        ({"scale": "e4m4"}, "scale is 'e4m4'; expected one of e8m0, e4m3"),
        ({"hadamard": "some"}, "hadamard is 'some'; expected one of none, wgrad, backward, all"),
        ({"estimator": "st"}, "did you mean 'ste'?"),
        ({"scale_gradient": "max"}, "scale_gradient is 'max'"),
        ({"weight_blocks": "3d"}, "weight_blocks is '3d'"),
        ({"zero_scale": "zero"}, "zero_scale is 'zero'; expected one of floor, one"),
        ({"scale_rule": "up"}, "scale_rule is 'up'; expected one of"),
        ({"stochastic": {"dx"}}, "stochastic is 'dx'; expected one of dy, w_dgrad, x_wgrad"),
        ({"stochastic": "dy"}, "stochastic is 'dy'; expected a set of operands"),
        ({"stochastic": None}, "stochastic is None; expected a set of operands"),
        ({"element": "ue5m3"}, "element is 'ue5m3'; expected one of e2m1"),
        ({"block": 24}, "block is 24; expected a power of two of at least 4"),
        ({"block": 2}, "block is 2; expected a power of two of at least 4"),
        ({"hadamard_size": 12}, "hadamard_size is 12; expected a power of two"),
        ({"scale": "e4m3", "scale_target": 449.0}, "scale_target is 449.0; expected at most 448, the largest e4m3"),
        ({"tensor_scale": 0}, 'tensor_scale is 0; expected "off", "current", or a number of steps from 1'),
        ({"tensor_scale": "sometimes"}, "tensor_scale is 'sometimes'"),
        ({"sr_bits": 3}, "sr_bits is 3; expected None (exact) or 8"),
        ({"clamp": 1.0}, "clamp is 1.0; expected a number between 0 and 1"),
        ({"clamp": 0.9, "estimator": "dge"}, "expected the straight-through gradient beside a clamp"),
        ({"loss_scale": 0.0}, "loss_scale is 0.0; expected a finite number above 0"),
        ({"seed": -1}, "seed is -1; expected a whole number of at least 0"),
    ],
)
def test_odd_words_are_told(words, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        FP4Recipe(**words)


def test_unknown_presets_fields_and_json_are_told():
    with pytest.raises(ValueError, match="preset is 'nvfp'; expected one of .*did you mean 'nvfp4'"):
        FP4Recipe.preset("nvfp")
    with pytest.raises(ValueError, match="field is 'blocks'; expected one of .*did you mean 'block'"):
        FP4Recipe().replace(blocks=3)
    for text, said in (("[]", "expected an object"), ("{", "is no JSON"), ('{"blok": 1}', "did you mean 'block'")):
        with pytest.raises(ValueError, match=said):
            FP4Recipe.from_json(text)


@pytest.mark.parametrize("estimator", ["ste", "ramp", "spline"])
def test_a_derivatives_area_over_an_interval_is_its_width(estimator):
    grid = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for low, high in itertools.pairwise(grid):
        n = 200_000
        u = low + (high - low) * (torch.arange(n, dtype=torch.float64) + 0.5) / n
        assert abs(cast_derivative(u, "e2m1", estimator).mean().item() - 1) < 1e-6
        assert torch.equal(cast_derivative(-u, "e2m1", estimator), cast_derivative(u, "e2m1", estimator))


def test_dge_has_the_area_without_its_cap_and_is_capped_in_the_middle():
    v = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    t = (1 + v**5) / 2  # with |2t - 1| = v^5 the area over half an interval is the integral of 1 over v, halved
    below = v > 0.75
    assert torch.allclose(dge(t)[below] * 5 * v[below] ** 4, torch.ones_like(v[below]))
    assert dge(t)[~below].max() == 3
    assert cast_derivative(torch.tensor([0.25, 1.25, 2.5, -3.5, 5.0]), "e2m1", "dge").tolist() == [3.0] * 5


def test_beyond_the_grid_only_the_straight_through_gradient_is_left():
    u = torch.tensor([6.5, -7.0])
    assert cast_derivative(u, "e2m1", "ste").tolist() == [1, 1]
    for estimator in ("dge", "spline", "ramp"):
        assert cast_derivative(u, "e2m1", estimator).tolist() == [0, 0]


LEDGERED = [
    FP4Recipe.preset("mxfp4"),
    FP4Recipe.preset("nvfp4"),
    FP4Recipe.preset("paper"),
    FP4Recipe.preset("nvfp4-te"),
    FP4Recipe(tensor_scale=4, estimator="dge", scale_gradient="softmax"),
    FP4Recipe(hadamard="all", stochastic=frozenset({"dy", "x_wgrad", "w_dgrad"}), scale_gradient="absmax"),
]


@pytest.mark.parametrize("recipe", LEDGERED, ids=range(len(LEDGERED)))
def test_the_ledger_is_what_an_instrumented_run_counts(recipe, monkeypatch):
    M, K, N = 64, 96, 48
    counted = 0.0
    prepared, rotated = Casts.prepared, Casts.rotated

    def count_cast(self, x, fmt, dim, operand, product):
        nonlocal counted
        each = (
            3 + (1 / recipe.hold if fmt.tensor_scale else 0) + (2 if self.rule(operand, product, x.device).rounding == "stochastic" else 0)
        )
        if operand in ("x", "w"):
            each += {"ste": 0}.get(recipe.estimator, 2) + {"none": 0, "absmax": 3, "softmax": 8}[recipe.scale_gradient]
        counted += each * x.numel()
        return prepared(self, x, fmt, dim, operand, product)

    in_backward = torch._C._current_graph_task_id
    through = []

    def count_turn(self, x, product, dim, inverse=False):
        nonlocal counted
        made = rotated(self, x, product, dim, inverse)
        if made is not x and not (product == "forward" and in_backward() != -1):  # there the gradient is turned, no operand
            counted += (math.log2(self.recipe.rotation_size(x.shape[dim])) + 1) * x.numel()
        through.append(product)
        return made

    monkeypatch.setattr(Casts, "prepared", count_cast)
    monkeypatch.setattr(Casts, "rotated", count_turn)
    layer = FP4Linear(K, N, recipe=recipe)
    x = torch.randn(M, K, requires_grad=True)
    layer(x).sum().backward()
    assert counted == pytest.approx(recipe.overhead(M, K, N).operations, rel=1e-12)
    assert recipe.overhead(M, K, N).relative == pytest.approx(counted / (2 * M * N * K))


@pytest.mark.parametrize(
    "recipe", [*LEDGERED, FP4Recipe.preset("nvfp4").replace(pack_saved=False), FP4Recipe(element="fp32")], ids=range(8)
)
def test_what_is_kept_for_the_backward_pass_is_what_was_promised(recipe):
    M, K, N = 64, 96, 48
    layer = FP4Linear(K, N, bias=False, recipe=recipe)
    x = torch.randn(M, K, requires_grad=True)
    with saved_bytes(layer) as saved:
        layer(x)
    assert saved.total == recipe.overhead(M, K, N).kept_bytes
    if recipe.casts and not recipe.keeps_operands and recipe.pack_saved:
        assert saved.total <= 0.16 * 4 * M * K
