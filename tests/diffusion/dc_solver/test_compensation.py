"""Compensation against interpolation written down otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact_flows import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import lagrange

from fewer.diffusion import compensate
from fewer.diffusion.dc_solver.compensation import interpolation_weights

TIMES = [200.0, 500.0, 850.0, 999.0]
grids = st.lists(st.integers(0, 999), min_size=2, max_size=4, unique=True).map(sorted)
ratios = st.floats(-1, 3, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(grids, ratios, st.floats(0.1, 10), st.floats(-50, 50))
def test_weights_sum_to_one_and_know_no_unit_and_no_origin_of_time(times, ratio, scale, shift):
    weights = interpolation_weights(times, ratio)
    size = max(1.0, sum(map(abs, weights)))
    assert sum(weights) == pytest.approx(1, abs=1e-9 * size)
    assert interpolation_weights([scale * time + shift for time in times], ratio) == pytest.approx(weights, abs=1e-6 * size)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_gives_the_newest_and_zero_the_one_before_bit_for_bit(k, dtype):
    outputs = [randn(3, 5, seed=seed).to(dtype) for seed in range(k + 1)]
    for ratio, wanted in ((1.0, outputs[0]), (1, outputs[0]), (0.0, outputs[1])):
        assert torch.equal(compensate(outputs, TIMES[: k + 1], ratio), wanted)
    outputs[-1] = torch.full_like(outputs[0], math.inf)
    assert torch.equal(compensate(outputs, TIMES[: k + 1], 1.0), outputs[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), ratios, st.integers(0, 1000))
def test_polynomials_of_the_order_are_read_off_exactly(k, ratio, seed):
    coefficients = randn(k + 1, seed=seed)

    def polynomial(time: float) -> torch.Tensor:
        return sum(coefficient * (time / 1000) ** power for power, coefficient in enumerate(coefficients)) * torch.ones(2).double()

    times = TIMES[: k + 1]
    at = times[1] + ratio * (times[0] - times[1])
    found = compensate([polynomial(time) for time in times], times, ratio)
    assert torch.allclose(found, polynomial(at), atol=1e-10)


@pytest.mark.parametrize("ratio", [-0.5, 0.3, 1.16, 1.59])
def test_it_is_scipys_lagrange(ratio):
    outputs = randn(3, 1, seed=3)
    at = TIMES[1] + ratio * (TIMES[0] - TIMES[1])
    wanted = lagrange(np.array(TIMES[:3]) / 1000, outputs[:, 0].numpy())(at / 1000)
    assert float(compensate(list(outputs), TIMES[:3], ratio)) == pytest.approx(float(wanted), abs=1e-9)


def test_a_ratio_that_is_a_tensor_has_its_gradient():
    outputs, ratio = list(randn(3, 4)), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(compensate(outputs, TIMES[:3], ratio), compensate(outputs, TIMES[:3], 1.3))
    assert torch.autograd.gradcheck(lambda rho: compensate(outputs, TIMES[:3], rho), ratio)


@pytest.mark.parametrize(
    ("outputs", "times", "ratio"),
    [(1, [1.0], 1.0), (2, [1.0], 1.0), (2, [3.0, 3.0], 1.0), (2, [1.0, 2.0], math.nan), (2, [1.0, 2.0], "1")],
)
def test_what_cannot_be_interpolated_is_refused(outputs, times, ratio):
    with pytest.raises(ValueError, match="expected"):
        compensate([torch.zeros(2)] * outputs, times, ratio)
