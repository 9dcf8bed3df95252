"""DP-SGD's step gradient: per-example gradients by either way, Opacus on the same model, the clipping and the noise."""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from adapted import CLASSES, WIDTH, Tokens, TokensFirst, drawn, lora, net, points
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewer.federated import FlatModel, cross_entropy, private_gradient
from fewer.federated.ffa_lora import per_example
from fewer.federated.ffa_lora.per_example import Gradients, clipped_sum, factors_of, per_example_gradients


def tokens(count=7, length=5, dtype=torch.float32):
    draw = torch.Generator().manual_seed(2)
    return torch.randn(count, length, WIDTH, generator=draw, dtype=dtype), torch.arange(count) % CLASSES


def one_by_one(flat, vector, x, y):
    return torch.stack([flat.gradient(vector, x[row : row + 1], y[row : row + 1]) for row in range(len(y))])


def whole(factors):
    return torch.cat([(each if isinstance(each, Gradients) else each.multiplied()).g.flatten(1) for each in factors], 1)


CASES = {
    "points": (net, points, True),
    "tokens": (Tokens, tokens, True),
    "tokens first": (TokensFirst, tokens, False),
}


@pytest.mark.parametrize("frozen", [True, False], ids=["ffa", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_per_example_gradients_equal_one_by_one(case, frozen):
    base, data, closed = CASES[case]
    targets = ["0", "2"] if base is net else ["body.0", "body.2"]
    flat = FlatModel(lora(base(torch.float64), frozen=frozen, targets=targets))
    x, y = data(dtype=torch.float64) if data is tokens else data(9, torch.float64)
    vector = drawn(flat)
    each = one_by_one(flat, vector, x, y)
    assert (per_example_gradients(flat, vector, x, y) - each).abs().max() <= 1e-6 * each.abs().max()
    factors = factors_of(flat, vector, x, y)
    assert (factors is not None) == closed
    if factors is not None:
        assert (whole(factors) - each).abs().max() <= 1e-6 * each.abs().max()
        norms = torch.stack([factor.squared_norms() for factor in factors]).sum(0).sqrt()
        assert torch.allclose(norms, each.norm(dim=1), rtol=1e-9)
    clip = float(each.norm(dim=1).median())
    expected = (each * (clip / (each.norm(dim=1) + 1e-6)).clamp(max=1)[:, None]).sum(0)
    assert (clipped_sum(flat, vector, x, y, clip) - expected).norm() <= 1e-6 * expected.norm()


def test_tokens_first_is_seen_though_there_are_as_many_tokens_as_examples():
    flat = FlatModel(lora(TokensFirst(torch.float64), targets=["body.0", "body.2"]))
    x, y = tokens(6, 6, torch.float64)
    assert factors_of(flat, drawn(flat), x, y) is None


def test_the_closed_form_is_the_papers(monkeypatch):
    """dL/dB = s sum_t (dL/dz_t)(A x_t)^T, by autograd on the layer's own output z."""
    model = lora(Tokens(torch.float64), targets=["body.0", "body.2"])
    flat = FlatModel(model)
    vector, (x, y) = drawn(flat), tokens(dtype=torch.float64)
    module = flat.module_at(vector)
    layer: Any = module.get_submodule("base_model.model.body.2")
    seen = {}
    layer.register_forward_hook(lambda _, arguments, output: seen.update(x=arguments[0], z=output))
    losses = cross_entropy(module(x), y)
    (dz,) = torch.autograd.grad(losses.sum(), seen["z"])
    A = layer.lora_A["default"].weight
    expected = layer.scaling["default"] * torch.einsum("bto,bti->boi", dz, seen["x"] @ A.T)
    factors = factors_of(flat, vector, x, y)
    assert factors is not None
    assert isinstance(factors[1], Gradients)
    assert layer.scaling["default"] == 2.0
    assert torch.allclose(factors[1].g, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False], ids=["ffa", "lora"])
def test_without_noise_it_equals_opacus(frozen):
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model = lora(frozen=frozen)
    flat = FlatModel(model)
    vector, (x, y) = drawn(flat), points(40)
    clip = float(one_by_one(flat, vector, x, y).norm(dim=1).median())
    ours = private_gradient(flat, vector, x, y, clip, 0.0, 25)
    model.load_state_dict(flat.named(vector), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = GradSampleModule(model)
        optimizer = DPOptimizer(
            torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1.0),
            noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=25,
        )  # fmt: skip
        nn.functional.cross_entropy(theirs(x), y, reduction="mean").backward()
        optimizer.step()
    assert (vector - flat.initial() - ours).abs().max() <= 1e-6
    assert ours.norm() > 1e-2


SIGMA, CLIP, DRAWS = 1.5, 0.7, 20_000


@cache
def one_layer():
    return FlatModel(lora(nn.Sequential(nn.Linear(WIDTH, CLASSES)), rank=2, targets=["0"]))


@cache
def noise_alone():
    """Many draws of the step gradient of an empty batch."""
    flat, generator, (x, y) = one_layer(), torch.Generator().manual_seed(5), points(1)
    return torch.stack([private_gradient(flat, flat.initial(), x[:0], y[:0], CLIP, SIGMA, 10, generator) for _ in range(DRAWS)])


@pytest.mark.parametrize("rows", [0, 3, 40])
def test_noise_is_of_one_size_and_the_batch_expected(rows):
    """Each coordinate's variance is (sigma C / 10)^2, whatever was drawn, and the mean is the clipped sum over 10."""
    flat, seen, still = one_layer(), noise_alone(), torch.zeros(one_layer().size)
    vector, (x, y) = drawn(flat), points(max(rows, 1))
    if rows:  # the noise of a batch is that of the first draw above, and the sum beside it is not random
        noisy = private_gradient(flat, vector, x, y, CLIP, SIGMA, 10, torch.Generator().manual_seed(5))
        still = private_gradient(flat, vector, x, y, CLIP, 0.0, 10)
        assert torch.allclose(noisy - still, seen[0], atol=1e-6)
        assert torch.allclose(still, clipped_sum(flat, vector, x, y, CLIP) / 10)
    std = SIGMA * CLIP / 10
    assert ((seen + still).var(0) / std**2 - 1).abs().max() <= 0.05
    assert (((seen + still).mean(0) - still).abs() / (std / math.sqrt(DRAWS))).max() <= 4


@given(st.integers(1, 12), st.floats(0.01, 5.0))
@settings(max_examples=25, deadline=None)
def test_one_example_moves_the_sum_by_at_most_the_clip(rows, clip):
    flat = FlatModel(lora(frozen=False))
    vector, (x, y) = drawn(flat, seed=rows), points(rows, seed=rows)
    with_it, without = (
        private_gradient(flat, vector, x[:end], y[:end], clip, 0.0, 1.0) if end else torch.zeros(flat.size) for end in (rows, rows - 1)
    )
    assert (with_it - without).norm() <= clip * (1 + 1e-4)


def test_all_layers_are_clipped_together():
    flat = FlatModel(lora())
    vector, (x, y) = drawn(flat), points(1)
    whole_norm = flat.gradient(vector, x, y).norm()
    assert private_gradient(flat, vector, x, y, float(whole_norm) / 3, 0.0, 1.0).norm() == pytest.approx(float(whole_norm) / 3, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_clipped_and_summed_in_float32(dtype):
    flat = FlatModel(lora().to(dtype))
    vector, (x, y) = drawn(flat), points(30)
    got = private_gradient(flat, vector, x.to(dtype), y, 0.5, 0.0, 30)
    each = one_by_one(flat, vector, x.to(dtype), y)
    expected = (each * (0.5 / (each.norm(dim=1) + 1e-6)).clamp(max=1)[:, None]).sum(0) / 30
    assert got.dtype == each.dtype == torch.float32
    assert (got - expected).norm() <= 4 * torch.finfo(dtype).eps * 0.5
    noisy = private_gradient(flat, vector, x.to(dtype), y, 0.5, 1.0, 30, torch.Generator().manual_seed(0))
    assert noisy.dtype == torch.float32


class Twice(nn.Module):
    """One layer, gone through twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.layer(self.layer(x).relu())


def test_what_is_not_of_this_form_goes_the_other_way():
    """A trained bias, a layer called twice, a loss that is one number: none may be taken for a product of factors."""
    shared = nn.Linear(4, 4, bias=False)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    models = [
        FlatModel(nn.Linear(4, 3)),
        FlatModel(nn.Sequential(shared, nn.ReLU(), shared)),
        FlatModel(Twice()),
        FlatModel(nn.Linear(4, 3, bias=False), nn.CrossEntropyLoss()),
    ]
    for flat in models:
        vector = flat.initial()
        assert factors_of(flat, vector, x, y) is None
        each = one_by_one(flat, vector, x, y)
        expected = (each * (0.3 / (each.norm(dim=1) + 1e-6)).clamp(max=1)[:, None]).sum(0)
        assert torch.allclose(clipped_sum(flat, vector, x, y, 0.3), expected, atol=1e-6)


def test_chunks_add_up(monkeypatch):
    flat = FlatModel(nn.Linear(WIDTH, CLASSES))
    vector, (x, y) = flat.initial(), points(10)
    at_once = clipped_sum(flat, vector, x, y, 0.2)
    monkeypatch.setattr(per_example, "CHUNK", 3 * flat.size * 4)
    assert torch.allclose(clipped_sum(flat, vector, x, y, 0.2), at_once, atol=1e-6)


def test_rows_that_do_not_lie_together_and_one_row():
    flat = FlatModel(lora())
    vector, (x, y) = drawn(flat), points(8)
    strided = torch.stack([x, x], 2)[:, :, 0]
    assert not strided.is_contiguous()
    assert torch.equal(private_gradient(flat, vector, strided, y, 1.0, 0.0, 8), private_gradient(flat, vector, x, y, 1.0, 0.0, 8))
    one = private_gradient(flat, vector, x[:1], y[:1], 1e6, 0.0, 1)
    assert torch.allclose(one, flat.gradient(vector, x[:1], y[:1]), atol=1e-7)


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"noise_multiplier": -1.0}, {"expected_batch": 0}])
def test_numbers_out_of_range_are_refused(wrong):
    flat = FlatModel(lora())
    words = {"clip": 1.0, "noise_multiplier": 0.0, "expected_batch": 1} | wrong
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
        private_gradient(flat, flat.initial(), *points(2), **words)
