"""The linear matrix inequality, what follows from it, and the log-norm that judges the whole field."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from flow_fields import Linear, Smooth
from torch.func import jacrev

from fewer.diffusion.flow_mle import ContractingResidual, ResidualField, iss_bound, log_norm, odeint


def drawn(seed, scale=1.0, **words):
    """A residual whose parameters are all drawn."""
    torch.manual_seed(seed)
    dim = int(torch.randint(1, 33, ()))
    words = {"dim": dim, "width": int(torch.randint(1, 40, ())), "rate": float(3 * torch.rand(())), "columns": 1 + seed % 8} | words
    made = ContractingResidual(**words).double()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name != "gate":
                weight.copy_(scale * torch.randn_like(weight))
    return made


def jacobians(field, t, x):
    """[B, d, d]."""
    rows = [jacrev(lambda z, s=s: field(s[None], z[None])[0])(z) for s, z in zip(t, x, strict=True)]
    return torch.stack(rows)


@pytest.mark.parametrize("activation", ["tanh", "relu", "softplus"])
def test_the_lmi_holds_for_every_parameter_and_the_jacobian_obeys_it(activation):
    for seed in range(34):
        scale = (1.0, 1e-3, 30.0)[seed % 3]
        made = drawn(seed, scale, activation=activation)
        matrix = made.lmi().detach()
        top, size = float(torch.linalg.eigvalsh(matrix).max()), float(torch.linalg.matrix_norm(matrix))
        assert torch.allclose(matrix, matrix.T, rtol=1e-10)
        assert top <= 1e-8 * size
        assert abs(made.certificate() + top) <= 1e-12 * size
        d, size = made.config["dim"], max(1.0, float(made.assembled(torch.float64).detach().norm()))
        J = jacobians(made, torch.rand(3).double(), torch.randn(3, d).double() / scale)
        assert float(torch.linalg.eigvalsh((J + J.mT) / 2).max()) <= -made.rate + 1e-5 * (size if scale > 1 else 1)


def test_the_lmi_is_that_of_the_assembled_matrices():
    """A, B, C and l taken apart from how they are made."""
    made = drawn(3, dim=5, width=4)
    A, zero, t = made.assembled(torch.float64), torch.zeros(1, 5).double(), torch.zeros(1).double()
    L = torch.nn.functional.softplus(made.l) + 1e-6
    far = made.lmi()
    assert torch.allclose(far[:5, :5], A + A.T + 2 * made.rate * torch.eye(5))
    assert torch.allclose(far[:5, 5:], made.B + made.C.T @ L.diag())
    assert torch.allclose(far[5:, 5:], -2 * L.diag())
    x = torch.randn(6, 5).double()
    inputs = torch.cat([torch.zeros(1, 8), torch.ones(1, 8)], 1).double()
    r = x @ A.T + torch.tanh(x @ made.C.T + made.b(inputs)) @ made.B.T + made.e(inputs)
    assert torch.allclose(made(t.expand(6), x), r)
    assert made(t, zero).shape == zero.shape


def test_two_trajectories_approach_at_the_rate():
    for seed in range(3):
        made = drawn(seed, rate=1.5, dim=4, width=6, columns=2)
        x = torch.randn(2, made.config["dim"]).double()
        steps = 50 + int(20 * float(made.assembled(torch.float64).detach().norm()))
        before, after = (float((pair[0] - pair[1]).norm()) for pair in (x, odeint(made, x, steps, method="rk4").detach()))
        assert after <= before * math.exp(-1.5) * (1 + 1e-6)


def test_factors_and_the_assembled_matrix_say_the_same():
    made = drawn(0, dim=32, width=3, columns=2)  # factors are cheaper here
    x, t = torch.randn(4, 32).double(), torch.rand(4).double()
    made.B.data.zero_()  # then r is linear but for e
    assert torch.allclose(made(t, x + 1) - made(t, x), torch.ones_like(x) @ made.assembled(torch.float64).T)


def test_a_metric_contracts_in_its_own_norm():
    T = torch.randn(4, 4).double() + 3 * torch.eye(4)
    made = drawn(1, dim=4, rate=1.0, metric=T)
    t, x = torch.rand(8).double(), torch.randn(8, 4).double()
    plain = drawn(1, dim=4, rate=1.0)
    plain.load_state_dict({name: value for name, value in made.state_dict().items() if name not in ("metric", "inverse")})
    assert torch.allclose(made(t, x), plain(t, x @ T.T) @ torch.linalg.inv(T).T)
    J = T @ jacobians(made, t, x) @ torch.linalg.inv(T)
    assert float(torch.linalg.eigvalsh((J + J.mT) / 2).max()) <= -1 + 1e-5
    assert torch.allclose(log_norm(made, t, x, metric=T), torch.linalg.eigvalsh((J + J.mT) / 2).amax(1), atol=1e-8)


def test_a_metric_of_whole_numbers_has_its_own_inverse():
    metric = torch.tensor([[2, 0], [0, 1]])
    made = ContractingResidual(2, 4, metric=metric)
    assert torch.equal(made.inverse, torch.tensor([[0.5, 0.0], [0.0, 1.0]]))
    with pytest.raises(ValueError, match=r"metric is \(3, 2\); expected a square matrix \(2, 2\)"):
        log_norm(made, torch.rand(3), torch.randn(3, 2), metric=torch.ones(3, 2))
    with pytest.raises(ValueError, match="x has a NaN or infinite number"):
        log_norm(made, torch.rand(3), torch.full((3, 2), math.nan))


def test_the_gate_counts_from_zero_and_is_kept_there():
    made = ContractingResidual(3, 8, 2.0, gate=0.0)
    t, x = torch.rand(5), torch.randn(5, 3)
    assert torch.equal(made(t, x), torch.zeros(5, 3))
    made(t, x).square().sum().backward()
    (made(t, x) - x).square().sum().backward()
    assert float(made.gate.grad) != 0  # it can leave 0
    made.gate.data.fill_(-0.5)
    assert made.certified_rate == 0
    assert torch.equal(made(t, x), torch.zeros(5, 3))
    made.keep_gate()
    assert float(made.gate) == 0
    made.gate.data.fill_(0.5)
    assert made.certified_rate == 1.0


def test_the_sum_with_a_base_has_a_log_norm_lower_by_gate_times_rate():
    base, made = Smooth(), drawn(2, dim=4, rate=1.0)
    made.gate.data.fill_(0.3)
    t, x = torch.rand(16).double(), torch.randn(16, 4).double()
    assert bool((log_norm(ResidualField(base, made), t, x) <= log_norm(base, t, x) - 0.3 + 1e-9).all())


def test_viscosity_is_minus_nu_x():
    made = ContractingResidual.viscosity(5, 0.7, cond_dim=2)
    x, t = torch.randn(3, 5), torch.rand(3)
    assert torch.allclose(made(t, x, torch.randn(3, 2)), -0.7 * x)
    assert made.certificate() >= -1e-12
    assert [name for name, each in made.named_parameters() if each.requires_grad] == ["gate"]
    assert float(log_norm(lambda t, x: made(t, x, torch.ones(3, 2)), t, x)[0]) == pytest.approx(-0.7)


@pytest.mark.parametrize("make", [lambda: Smooth(dim=12), lambda: Linear(torch.randn(30, 30).double()), lambda: drawn(5)])
def test_log_norm_is_the_largest_eigenvalue_of_the_symmetric_jacobian(make):
    field = make()
    dim = 12 if isinstance(field, Smooth) else 30 if isinstance(field, Linear) else field.config["dim"]
    t, x = torch.rand(6).double(), torch.randn(6, dim).double()
    J = jacobians(field, t, x)
    exact = torch.linalg.eigvalsh((J + J.mT) / 2).amax(1)
    assert torch.allclose(log_norm(field, t, x), exact, atol=1e-3 * float(exact.abs().max()))
    assert bool((log_norm(field, t, x, iters=2) <= exact + 1e-9).all())  # from below


def test_log_norm_asks_the_field_once_and_survives_invariant_spaces():
    calls = [0]

    def halves(t, x):
        calls[0] += 1
        return torch.cat([-2 * x[:, :3], -x[:, 3:]], 1)

    x = torch.randn(5, 8)
    assert torch.allclose(log_norm(halves, torch.zeros(5), x), torch.full((5,), -1.0), atol=1e-5)
    assert calls[0] == 1
    assert torch.equal(log_norm(lambda t, x: torch.ones_like(x), torch.zeros(5), x), torch.zeros(5))
    with pytest.raises(ValueError, match="expected float32 or float64"):
        log_norm(halves, torch.zeros(5), x.half())


def test_iss_bounds_two_runs_under_bounded_random_forcing():
    made, D = drawn(7, dim=6, rate=2.0), 0.5
    x, steps = torch.randn(2, 6).double(), 200
    forces = torch.nn.functional.normalize(torch.randn(steps + 1, 6).double(), dim=1) * D

    def forced(t, x):
        push = forces[int(float(t[0]) * steps)]
        return made(t, x) + torch.stack([push, torch.zeros(6)])

    for t in (0.25, 1.0):
        end = odeint(forced, x, steps, 0.0, t, method="rk4").detach()
        assert float((end[0] - end[1]).norm()) <= iss_bound(float((x[0] - x[1]).norm()), D, 2.0, t)
    pushed = odeint(lambda t, x: -2 * x + torch.tensor([[D], [0.0]]), torch.zeros(2, 1).double(), 400, method="rk4")
    assert float(pushed[0] - pushed[1]) == pytest.approx(iss_bound(0.0, D, 2.0), rel=1e-6)  # and is met
    assert iss_bound(1.0, D, 1e-12) == pytest.approx(1 + D)
    with pytest.raises(ValueError, match="rate is 0.0; expected a finite number above 0"):
        iss_bound(1.0, D, 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_residuals_in_every_dtype(dtype):
    made = drawn(4, dim=6)
    x, t = torch.randn(6, 8).T[:, ::1].double(), torch.rand(8).double()
    exact = made(t, x).detach()
    half = copy.deepcopy(made).to(dtype)
    assert half(t.to(dtype), x.to(dtype)).dtype == dtype
    scale = float(made.assembled(torch.float64).detach().norm()) * 10
    assert float((half(t.to(dtype), x.to(dtype)).double() - exact).abs().max()) < scale * torch.finfo(dtype).eps * 10
    assert torch.equal(pickle.loads(pickle.dumps(made))(t, x), exact)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"rate": -1.0}, "rate is -1.0; expected a finite number of at least 0"),
        ({"metric": torch.ones(3, 2)}, r"metric is \(3, 2\); expected a square matrix \(3, 3\)"),
        ({"metric": torch.ones(3, 3)}, "expected an invertible matrix"),
        ({"width": 0}, "width is 0"),
        ({"activation": "sin"}, "expected one of tanh, relu, softplus"),
    ],
)
def test_bad_words_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        ContractingResidual(**({"dim": 3, "width": 4} | words))
