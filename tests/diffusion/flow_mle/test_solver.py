"""The solver as a map, its gradients, its inverse, and Theorem 1."""

from __future__ import annotations

import math

import pytest
import torch
from flow_fields import Linear, Smooth
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewer.diffusion.flow_mle import VelocityMLP, error_bound, invert, odeint
from fewer.diffusion.flow_mle.solver import METHODS


def test_a_linear_field_under_Euler_is_a_power_of_a_matrix():
    A, x = torch.randn(4, 4).double(), torch.randn(7, 4).double()
    for K in (1, 3, 8):
        power = torch.linalg.matrix_power(torch.eye(4).double() + A / K, K)
        assert torch.allclose(odeint(Linear(A), x, K), x @ power.T, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_methods_converge_in_their_order(method, order):
    field, x = Smooth(), torch.randn(16, 4).double()
    exact = odeint(field, x, 2000, method="rk4").detach()
    coarse, fine = (float((odeint(field, x, K, method=method) - exact).norm()) for K in (8, 16))
    assert abs(math.log2(coarse / fine) - order) < 0.4
    calls = [0]

    def counted(t, x):
        calls[0] += 1
        return field(t, x)

    odeint(counted, x, 3, method=method)
    assert calls[0] == 3 * METHODS[method][1]


def test_invert_then_a_fine_solve_is_the_identity_and_its_order_is_4():
    field, x = Smooth(lipschitz=3.0), torch.randn(16, 4).double()
    latents = invert(field, x)
    assert float((odeint(field, latents, 40, method="rk4") - x).abs().max()) < 1e-6
    exact = odeint(field, x, 2000, 1.0, 0.0, "rk4").detach()
    errors = [float((invert(field, x, steps=K) - exact).norm()) for K in (5, 10, 20)]
    assert 3.6 < math.log2(errors[1] / errors[2]) < 4.6
    assert float((odeint(field, x, 4, 1.0, 0.0) - exact).norm()) > 100 * errors[2]  # the deployed solver is no inverse


def test_the_field_is_inverted_in_eval_mode_and_gets_its_mode_back():
    class Dropping(Linear):
        def forward(self, t, x):
            return nn.functional.dropout(x, 0.5, self.training)

    field, x = Dropping(torch.eye(2)).train(), torch.randn(9, 2)
    assert torch.allclose(invert(field, x), x * math.exp(-1), atol=1e-5)
    assert field.training


@pytest.mark.parametrize("method", METHODS)
def test_gradients_with_checkpoints_are_those_without_and_finite_differences(method):
    field, x = Smooth(dim=3, width=8), torch.randn(5, 3).double()
    target = torch.randn(5, 3).double()

    def loss(checkpoint=False):
        return (odeint(field, x, 3, method=method, checkpoint=checkpoint) - target).square().mean()

    plain, kept = (torch.autograd.grad(loss(each), list(field.parameters())) for each in (False, True))
    for a, b in zip(plain, kept, strict=True):
        assert torch.allclose(a, b, atol=1e-6, rtol=0)
    weight, h = field.second.weight, 1e-5
    with torch.no_grad():
        for i, j in ((0, 0), (3, 5), (7, 1)):
            weight[i, j] += h
            above = loss()
            weight[i, j] -= 2 * h
            below = loss()
            weight[i, j] += h
            assert abs(float((above - below) / (2 * h) - plain[2][i, j])) < 1e-5


def test_checkpoints_keep_one_state_a_step():
    field, x = Smooth(dim=4, width=64), torch.randn(32, 4).double()

    def kept(checkpoint):
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.numel()) or t, lambda t: t):
            odeint(field, x, 6, checkpoint=checkpoint)
        return sum(held)

    assert kept(True) < 0.2 * kept(False)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), L=st.floats(0.2, 3), delta=st.floats(0, 0.5), K=st.integers(1, 20), start=st.floats(0, 1))
def test_theorem_1_bounds_the_error_of_random_smooth_fields(seed, L, delta, K, start):
    """u = A x with |A| = L: psi'' = A^2 psi, so M = L^2 max |psi|."""
    draw = torch.Generator().manual_seed(seed)
    A, x, push, off = (torch.randn(*shape, generator=draw).double() for shape in ((3, 3), (1, 3), (3,), (1, 3)))
    A, push, off = A * L / torch.linalg.matrix_norm(A, 2), delta * push / push.norm(), start * off / off.norm()
    path = torch.stack([x @ torch.linalg.matrix_exp(A * t).T for t in torch.linspace(0, 1, 101).double()])
    M = float((path @ A.T @ A.T).norm(dim=-1).max()) * 1.001
    end = odeint(lambda t, y: y @ A.T + push * torch.sin(20 * y[:, :1] + t[:, None]), x + off, K)
    assert float((end - path[-1]).norm()) <= error_bound(L, delta, M, K, start) * (1 + 1e-9)


def test_theorem_1_is_tight_within_1_6_for_a_linear_field_from_zero():
    delta, K = 0.1, 10
    error = float(odeint(lambda t, x: x + delta, torch.zeros(1, 1).double(), K))
    assert 1 < error_bound(1.0, delta, 0.0, K) / error < 1.6
    assert error_bound(1.0, 0.0, 0.0, K, start=0.5) == pytest.approx(0.5 * math.e)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_states_come_back_in_their_dtype_and_are_held_in_float32(dtype):
    torch.manual_seed(0)
    net, x = VelocityMLP(3, width=16), torch.randn(8, 3)
    exact = odeint(net.double(), x.double(), 64).detach()
    end = odeint(net.to(dtype), x.to(dtype), 64).detach()
    assert end.dtype == dtype
    assert float((end.double() - exact).abs().max()) < 8 * torch.finfo(dtype).eps * float(exact.abs().max() + 1)


def test_inputs_may_be_strided_single_or_images():
    torch.manual_seed(0)
    net = VelocityMLP(12, width=16)
    x = torch.randn(2, 3, 2, 5).transpose(2, 3)[..., ::1][:, :, :2, :]
    before = x.clone()
    rows = odeint(net, x.contiguous().flatten(1), 3)
    assert torch.allclose(odeint(net, x, 3), rows.reshape(x.shape))
    assert torch.allclose(odeint(net, x[:1], 3).flatten(1), rows[:1], atol=1e-6)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"steps": 0}, "steps is 0; expected a whole number of at least 1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"t0": -0.1}, "t0 is -0.1; expected a number from 0 to 1"),
        ({"t1": 1.5}, "t1 is 1.5"),
        ({"method": "ruler"}, "did you mean 'euler'"),
        ({"x": torch.ones(2, 2, dtype=torch.int64)}, "x is torch.int64; expected floating-point"),
        ({"field": lambda t, x: x[:, :1]}, r"gives \(2, 1\) for x \(2, 2\); expected the same shape"),
    ],
)
def test_bad_words_are_refused(words, said):
    given = {"field": lambda t, x: x, "x": torch.ones(2, 2), "steps": 2} | words
    with pytest.raises(ValueError, match=said):
        odeint(**given)


def test_divergence_names_the_step():
    with pytest.raises(FloatingPointError, match="after step 4 of 5; expected at most 1000"):
        odeint(lambda t, x: 45 * x, torch.ones(1, 1), 5)
    with pytest.raises(FloatingPointError, match="nan after step 1"):
        odeint(lambda t, x: x * math.nan, torch.ones(1, 1), 2)
    with pytest.raises(FloatingPointError, match="after step 1 of 2"):  # and comes back
        odeint(lambda t, x: torch.where(x < 10, 4000.0, -7990.0), torch.ones(1, 1), 2)
