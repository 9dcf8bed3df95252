"""The solver of DPM-Solver-v3 against exact flows, brute force quadrature, numpy's polynomials and diffusers' DDIM."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from exact_flows import EDM, error, flow, grid, mixture, noise_of, randn, wavy
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.diffusion import EMS, Point, SolverConfig, estimate_ems, local_update, preset, sample
from fewer.diffusion._shared import GaussianMixture, NoiseSchedule
from fewer.diffusion.dpm_solver_v3.multistep import Multistep, make_plan, orders


def test_one_step_solves_a_gaussian_with_its_exact_statistics():
    mu, deviation = torch.tensor([0.5, -1.0, 0.2]).double(), torch.tensor([0.3, 0.7, 1.1]).double()
    gaussian = GaussianMixture(mu[None], torch.ones(1).double(), deviation[None] ** 2)
    x = 20 * randn(64, 3)
    exact = mu + (x - mu) * ((deviation**2 + 0.0004) / (deviation**2 + 400)).sqrt()
    errors = []
    for count in (30, 60, 120):
        lambdas = grid(count)
        l = 1 / (1 + deviation**2 * (2 * lambdas[:, None]).exp())  # noqa: E741 - sigma^2 / (c^2 + sigma^2), alpha = 1
        ems = EMS(lambdas, l.float(), torch.zeros_like(l).float(), (2 * l * (1 - l) * mu).float())  # f = -l mu
        errors.append(error(sample(noise_of(gaussian), x, EDM, ems, 1), exact))
    assert errors[1] < 5e-5
    assert [errors[0] / errors[1], errors[1] / errors[2]] == pytest.approx([4, 4], rel=0.1)


@pytest.mark.parametrize(("order", "pseudo", "slope"), [(1, False, 2), (2, False, 3), (3, False, 4), (3, True, 3)])
def test_the_local_error_has_the_order_of_the_update(order, pseudo, slope):
    data = mixture(2, 3)
    eps, schedule = noise_of(data), NoiseSchedule.edm(math.exp(-1.5), math.exp(0.5))
    lambdas = grid(16000, schedule)
    ems, middle, at = wavy(lambdas, 2), 8000, 0.7 * randn(16, 2)

    def on_the_flow(node: int) -> Point:
        x = flow(data, at, float(torch.exp(-lambdas[middle])), float(torch.exp(-lambdas[node])), 60) if node != middle else at
        return Point(node, x, eps(x, torch.exp(-lambdas[node])))

    lengths, errors = (800, 400, 200), []
    for length in lengths:
        points = [on_the_flow(middle - i * length) for i in range(order)]
        errors.append(error(local_update(points, middle + length, ems, schedule, pseudo), on_the_flow(middle + length).x))
    slopes = np.diff(np.log(errors)) / np.diff(np.log(lengths))
    assert slopes[-1] == pytest.approx(slope, abs=0.15)


@pytest.mark.parametrize(("order", "slope"), [(1, 1), (2, 2), (3, 2)])
def test_the_global_error_has_the_order_that_the_first_step_allows(order, slope):
    """Order 3 begins with one step of order 1, which errs by h^2 for good."""
    data = mixture(3, 3)
    x = 20 * randn(32, 3)
    exact, ems = flow(data, x, 20.0, 0.02), wavy(grid(3840), 3)
    errors = [error(sample(noise_of(data), x, EDM, ems, n, solver_order=order, lower_order_final=False), exact) for n in (80, 160, 320)]
    assert np.log2(errors[-2] / errors[-1]) == pytest.approx(slope, abs=0.2)


def test_with_estimated_statistics_the_error_keeps_falling():
    data = mixture(16, 10)
    eps, x = noise_of(data), 20 * randn(64, 16)
    draw = torch.Generator().manual_seed(1)
    ems = estimate_ems(eps, EDM, data.draw(64, draw), 960, 64, 64, generator=draw, progress=False, mode="double-backward")
    exact = flow(data, x, 20.0, 0.02)
    for options in ({}, {"corrector": "full"}):
        errors = [error(sample(eps, x, EDM, ems, n, **options), exact) for n in (40, 80)]
        assert errors[1] < 0.35 * errors[0]


@pytest.mark.parametrize(("count", "tolerance"), [(240, 1e-3), (960, 1e-4)])
def test_data_prediction_at_order_1_is_ddim(count, tolerance):
    schedule, steps = NoiseSchedule.linear(), 12
    ems = EMS.data_prediction(grid(count, schedule))
    plan = make_plan(ems, schedule, steps, SolverConfig(solver_order=1))
    signal = plan.alphas.flip(0) ** 2  # DDIM on a schedule that has just these noise levels
    betas = 1 - torch.cat([signal[:1], signal[1:] / signal[:-1]])
    ddim = DDIMScheduler(num_train_timesteps=steps + 1, trained_betas=betas.tolist(), set_alpha_to_one=False, clip_sample=False)
    ddim.set_timesteps(steps + 1)
    data, x = mixture(4, 5), randn(16, 4)

    def eps(x: torch.Tensor, i: int) -> torch.Tensor:
        return data.epsilon(x, torch.log(plan.alphas[i] / plan.sigmas[i]))

    theirs, times = x, [float(t) for t in plan.times]
    for i, t in enumerate(ddim.timesteps[:steps]):
        theirs = ddim.step(eps(theirs, i), int(t), theirs, eta=0.0).prev_sample
    ours = sample(lambda x, t: eps(x, times.index(float(t))), x, schedule, ems, steps, solver_order=1)
    assert error(ours, theirs) < tolerance * float(theirs.square().mean().sqrt())


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 3), corrector=st.booleans(), seed=st.integers(0, 99))
def test_the_update_is_the_trapezoid_of_numpys_interpolating_polynomial(n, corrector, seed):
    schedule, rng = NoiseSchedule.linear(), np.random.default_rng(seed)
    ems = wavy(grid(60, schedule), 1)
    lambdas, l, s, b = (  # noqa: E741
        np.asarray(each, dtype=np.float64).reshape(61) for each in (ems.lambdas, ems.l, ems.s, ems.b)
    )
    older = sorted(rng.choice(20, 3, replace=False), reverse=True)
    first, target = 20 + int(rng.integers(5)), 30 + int(rng.integers(30))
    nodes = [first, *([target] if corrector and n else []), *(int(i) for i in older)][: n + 1]
    points = [Point(i, randn(1, 1, seed=seed + i), randn(1, 1, seed=seed - i)) for i in nodes]

    def integral(values: np.ndarray, a: int, z: int) -> float:
        part = slice(min(a, z), max(a, z) + 1)
        return float(np.trapezoid(values[part], lambdas[part])) * (1 if z >= a else -1)

    def exp_s(i: int) -> float:
        return math.exp(-integral(s, first, i))

    def big_b(i: int) -> float:
        return integral(np.array([exp_s(r) * b[r] for r in range(61)]), first, i)

    t = schedule.inverse(ems.lambdas)
    alpha, sigma = (each.numpy() for each in (schedule.alpha(t), schedule.sigma(t)))
    f = [(sigma[p.node] * p.eps.item() - l[p.node] * p.x.item()) / alpha[p.node] for p in points]
    g = [exp_s(p.node) * f_i - big_b(p.node) for p, f_i in zip(points, f, strict=True)]
    scale = lambdas[nodes] - lambdas[first]
    polynomial = np.polyfit(scale, g, n) if n else np.array(g)
    inside = np.zeros(61)
    for i in range(first, target + 1):
        inside[i] = math.exp(integral(l + s, first, i)) * (big_b(i) + np.polyval(polynomial, lambdas[i] - lambdas[first]))
    expected = alpha[target] * math.exp(-integral(l, first, target)) * (points[0].x.item() / alpha[first] - integral(inside, first, target))
    assert local_update(points, target, ems, schedule).item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_the_quantile_of_a_point_stays_along_the_flow():
    one = GaussianMixture(
        torch.tensor([[-1.0], [0.5], [2.0]]).double(),
        torch.tensor([0.2, 0.5, 0.3]).double(),
        torch.tensor([[0.01], [0.04], [0.02]]).double(),
    )
    x, draw = 20 * randn(100, 1), torch.Generator().manual_seed(0)
    quantile = one.tails(x, 20.0)[0]
    assert (one.tails(one.transport(x, 20.0, 0.02), 0.02)[0] - quantile).abs().max() < 1e-9
    ems = estimate_ems(noise_of(one), EDM, one.draw(256, draw), 1000, 256, 256, generator=draw, progress=False, mode="double-backward")
    assert (one.tails(sample(noise_of(one), x, EDM, ems, 200), 0.02)[0] - quantile).abs().max() < 1e-5


def test_a_corrector_moves_the_noise_with_the_state_so_that_g_stays():
    data, schedule = mixture(3, 3), NoiseSchedule.linear()
    ems = wavy(grid(120, schedule), 3)
    plan = make_plan(ems, schedule, 6, SolverConfig(corrector="full", pseudo_corrector=True))
    solver, x, moved = Multistep(plan), randn(8, 3), 0
    for m, t in enumerate(plan.times[:-1]):
        eps = data.epsilon(x, schedule.lambda_(t))
        following = solver.step(eps, x)
        l = ems.l[plan.nodes[m]]  # noqa: E741
        corrected = eps + l * (solver.x - x) / plan.sigmas[m]
        assert torch.allclose(solver.f[0], (plan.sigmas[m] * corrected - l * solver.x) / plan.alphas[m], atol=1e-10, rtol=1e-10)
        moved += not torch.equal(solver.x, x)
        x = following
    assert moved == 5  # all but the first, whose state nothing predicted


@pytest.mark.parametrize(
    "options", [{}, preset(5), preset(5, kind="latent"), preset(5, guided=True), preset(9, guided=True, large_scale=True)]
)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_step_is_one_call(options, steps):
    schedule, data, calls = NoiseSchedule.linear(), mixture(2, 2), []

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(float(t))
        return data.epsilon(x, schedule.lambda_(t))

    assert sample(eps, randn(2, 2), schedule, wavy(grid(60, schedule), 2), steps, **options).shape == (2, 2)
    assert len(calls) == steps
    assert calls == sorted(calls, reverse=True)


def test_orders_build_up_and_run_out():
    assert orders(6, 3, True) == [1, 2, 3, 3, 2, 1]
    assert orders(6, 3, False) == [1, 2, 3, 3, 3, 3]
    assert orders(2, 3, True) == [1, 1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"corrector": "none"}, [0, 0, 0, 0, 0, 0]),
        ({"corrector": "full"}, [0, 0, 2, 3, 3, 2]),  # of order 1 it would change nothing
        ({"corrector": "full", "pseudo_corrector": True}, [0, 2, 3, 4, 4, 3]),
        ({"corrector": "half", "pseudo_corrector": True}, [0, 2, 3, 4, 0, 0]),  # t: 1, 0.84, 0.68, 0.53, ...
    ],
)
def test_correctors_have_the_order_of_the_predictor_before(options, expected):
    schedule = NoiseSchedule.linear()
    plan = make_plan(wavy(grid(120, schedule), 1), schedule, 6, SolverConfig(spacing="time_uniform", end_time=0.05, **options))
    assert [len(each.of_f) if each else 0 for each in plan.correctors] == expected
    assert [len(each.of_f) for each in plan.predictors] == [1, 2, 3, 3, 2, 1]


@pytest.mark.parametrize("spacing", ["logsnr", "time_uniform", "time_quadratic", "edm"])
def test_every_spacing_has_equal_steps_of_its_own_measure_on_the_grid(spacing):
    schedule = NoiseSchedule.linear()
    ems = EMS.data_prediction(grid(4000, schedule))
    times = make_plan(ems, schedule, 8, SolverConfig(spacing=spacing, end_time=1e-3)).times
    sigma = torch.exp(-schedule.lambda_(times))
    measure = {"logsnr": sigma.log(), "time_uniform": times, "time_quadratic": times.sqrt(), "edm": sigma ** (1 / 7)}[spacing]
    steps = measure.diff()
    assert torch.allclose(steps, steps.mean().expand(8), rtol=0.03)
    assert float(times[-1]) == pytest.approx(1e-3, rel=0.01)
    assert (schedule.lambda_(times)[:, None] - ems.lambdas).abs().min(1).values.max() < 1e-9


def test_in_single_precision_the_times_stay_double():
    data, schedule = mixture(2, 2), NoiseSchedule.linear()
    ems, x, seen = wavy(grid(60, schedule), 2), randn(4, 2), []

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t.dtype)
        return data.epsilon(x, schedule.lambda_(t))

    single = sample(eps, x.float(), schedule, ems, 6)
    assert single.dtype == torch.float32
    assert set(seen) == {torch.float64}
    assert torch.allclose(single.double(), sample(eps, x, schedule, ems, 6), atol=1e-5)
