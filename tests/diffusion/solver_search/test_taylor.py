"""One step against mpmath, polynomials, quadrature and the exact flow of a mixture."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from exact_flows import EDM, error, flow, grid, mixture, noise_of, randn, wavy
from scipy.integrate import quad

from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion.dpm_solver_v3 import Point, local_update
from fewer.diffusion.solver_search import SolverSchedule, StepDecision
from fewer.diffusion.solver_search.solver import Values, make_plan
from fewer.diffusion.solver_search.taylor import RELAXATIONS, Integrals, Level, combination, derivative_weights, phi, relaxation

VP = NoiseSchedule.linear()


@pytest.mark.parametrize("k", range(6))
def test_phi_is_mpmaths(k):
    with mpmath.workdps(100):  # the recursion itself loses 8 digits a level at 1e-8
        for size in (1e-8, 1e-3, 0.1, 0.99, 1.0, 10.0):
            for z in (size, -size):
                exact = mpmath.exp(mpmath.mpf(z))
                for level in range(k):
                    exact = (exact - 1 / mpmath.factorial(level)) / mpmath.mpf(z)
                assert abs(mpmath.mpf(phi(k, z)) / exact - 1) < 1e-13, (k, z)


@pytest.mark.parametrize("q", [1, 2, 3, 4])
def test_derivatives_of_polynomials_are_exact(q):
    draw = np.random.default_rng(q)
    for _ in range(10):
        deltas = tuple(float(each) for each in np.cumsum(-draw.uniform(0.2, 1, q)))
        coefficients = draw.normal(size=q + 1)
        values = [sum(c * d**i / math.factorial(i) for i, c in enumerate(coefficients)) for d in deltas]
        for k in range(1, q + 1):
            found = sum(a * (value - coefficients[0]) for a, value in zip(derivative_weights(deltas, k), values, strict=True))
            assert found == pytest.approx(coefficients[k], rel=1e-9, abs=1e-9)
    assert derivative_weights((-0.25,), 1) == pytest.approx((-4.0,))


@pytest.mark.parametrize("prediction", ["noise", "data"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_polynomial_prediction_is_integrated_exactly(prediction, order):
    draw = np.random.default_rng(order)
    coefficients, lambdas = draw.normal(size=order), [-1.0, -0.4, 0.1, 0.5, 1.2][4 - order :]
    times = VP.inverse(torch.tensor(lambdas, dtype=torch.float64))
    alphas = VP.alpha(times).tolist()
    levels = [Level(each, alpha, alpha * math.exp(-each)) for each, alpha in zip(lambdas, alphas, strict=True)]
    s, t = levels[-2], levels[-1]

    def polynomial(at: float) -> float:
        return float(sum(c * (at - s.lambda_) ** i for i, c in enumerate(coefficients)))

    kernel = (lambda at: math.exp(-at)) if prediction == "noise" else math.exp
    integral = quad(lambda at: kernel(at) * polynomial(at), s.lambda_, t.lambda_, epsabs=1e-12, epsrel=1e-12)[0]
    exact = t.alpha / s.alpha * 0.7 - t.alpha * integral if prediction == "noise" else t.sigma / s.sigma * 0.7 + t.sigma * integral
    start = order - 1
    made = combination(prediction, levels, start, order, [list(range(start))] * start, 1.0, None)
    values = [polynomial(each.lambda_) * (1.0 if prediction == "noise" else each.alpha) for each in levels]
    found = made([torch.tensor(0.7, dtype=torch.float64)] * order, [{prediction: torch.tensor(v, dtype=torch.float64)} for v in values])
    assert float(found) == pytest.approx(exact, abs=1e-10)


def test_relaxations_are_the_pages_and_near_one():
    for z in (0.3, -0.7, 2.0):
        e = math.expm1(z)
        assert relaxation("dpmsolver-2", z, 1.0) == pytest.approx(0.5 * z * e / (e - z))
        assert relaxation("unipc-bh2", z, 1.0) == pytest.approx(0.5 * z * e / (e - z))
        assert relaxation("unipc-bh1", z, 1.0) == pytest.approx(0.5 * z * z / (e - z))
        assert relaxation("+0.5exp", z, 1.0) == pytest.approx(1 + 0.5 * e)
        assert relaxation("-0.5exp", z, 1.0) == pytest.approx(1 - 0.5 * e)
    assert relaxation("linear", -0.5, 0.5, 0.3) == 1.15
    for name in RELAXATIONS:
        assert relaxation(name, 1e-6, 1e-6, 0.3) == pytest.approx(1, abs=1e-5)


NARROW = NoiseSchedule.edm(math.exp(-1.5), math.exp(0.5))
DATA = mixture(2, 3)
STATISTICS = Integrals(wavy(grid(16000, NARROW), 2))
MIDDLE = 8000


def on_the_flow(node: int) -> torch.Tensor:
    at = 0.7 * randn(16, 2)
    sigmas = [float(torch.exp(-STATISTICS.lambdas[each])) for each in (MIDDLE, node)]
    return flow(DATA, at, *sigmas, 60) if node != MIDDLE else at


def one_step_error(step: StepDecision, length: int, corrects: bool) -> float:
    """Of the last of order + 1 points, from exact values at all others."""
    nodes = [MIDDLE + (i - step.order + 1) * length for i in range(step.order + 1)]
    lambdas = tuple(STATISTICS.lambdas[nodes].tolist())
    before = tuple(StepDecision("data", 1) for _ in range(step.order - 1))
    after = (StepDecision("data", 1),) if corrects else ()
    ends = (*lambdas, lambdas[-1] + 0.3) if corrects else lambdas
    plan = make_plan(SolverSchedule(ends, (*before, step, *after)), NARROW, STATISTICS)
    states, values = [], []
    for i, node in enumerate(nodes[: step.order + corrects]):
        x, sigma = on_the_flow(node), plan.levels[i].sigma
        states.append(x)
        values.append(Values(x, noise_of(DATA)(x, sigma), sigma, None if plan.linear is None else plan.linear[i]))
    made = plan.correctors[step.order - 1] if corrects else plan.predictors[step.order - 1]
    return error(made(states, values), on_the_flow(nodes[-1]))


@pytest.mark.parametrize("prediction", ["noise", "data", "v3"])
@pytest.mark.parametrize(
    ("words", "slope"),
    [
        ({"order": 1}, 2),
        ({"order": 2}, 3),
        ({"order": 3}, 4),
        ({"order": 3, "points": ((-2,), (-2, -3))}, 3),
        ({"order": 2, "relaxation": "linear", "coefficient": 0.3}, 3),
        ({"order": 3, "relaxation": "linear", "coefficient": 0.3}, 3),
        ({"order": 1, "corrector": "pseudo"}, 3),
        ({"order": 2, "corrector": "pseudo"}, 4),
    ],
    ids=str,
)
def test_the_local_error_has_the_order_of_the_decision(prediction, words, slope):
    step = StepDecision(prediction, **words)
    late = step.coefficient and step.order == 3 and prediction != "v3"  # their h^3 has a small factor beside the h^4's
    lengths = (100, 50, 25) if late else (400, 200, 100)
    errors = [one_step_error(step, length, step.corrector != "none") for length in lengths]
    slopes = np.diff(np.log(errors)) / np.diff(np.log(lengths))
    # with a relaxed F^(1) or a single point the error of order 3 keeps a leading term of h^3
    assert slopes[-1] == pytest.approx(slope, abs=0.15)


def test_steps_of_order_1_are_ddim_in_noise_and_in_data_and_differ_from_order_2_on():
    lambdas = (-2.0, -0.5, 0.4)
    x = randn(8, 3)
    for orders, same in (((1, 1), True), ((1, 2), False)):
        ends = []
        for prediction in ("noise", "data"):
            plan = make_plan(SolverSchedule(lambdas, tuple(StepDecision(prediction, order) for order in orders)), VP)
            states, values = [x], [Values(x, randn(8, 3, seed=1), plan.levels[0].sigma, None)]
            states.append(plan.predictors[0](states, values))
            values.append(Values(states[1], randn(8, 3, seed=2), plan.levels[1].sigma, None))
            ends.append(plan.predictors[1](states, values))
        assert bool((ends[0] - ends[1]).abs().max() < 1e-12) is same


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_v3_step_is_dpm_solver_v3s(order):
    ems = wavy(grid(60), 2)
    nodes, integrals = [20, 15, 9][:order], Integrals(ems)
    times = EDM.inverse(ems.lambdas)
    points = [Point(node, randn(4, 2, seed=node), randn(4, 2, seed=-node)) for node in nodes]
    wanted = local_update(points, 33, ems, EDM)
    levels = [Level(float(ems.lambdas[n]), 1.0, float(times[n]), n) for n in (*nodes, 33)]
    made = combination("v3", levels, 0, order, [list(range(1, order))] * (order - 1), 1.0, integrals)
    values = [Values(p.x, p.eps, float(times[p.node]), integrals.l[p.node]) for p in points]
    assert torch.allclose(made([p.x for p in points], values), wanted, atol=1e-11)
