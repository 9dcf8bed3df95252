"""The search of ratios against grids, gradients and its own definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dc_models import DATA, guided_model, noise_model, noises, sampled
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from exact_flows import randn

from fewer.diffusion import DCSolverMultistepScheduler, reference_trajectory, search_ratios
from fewer.diffusion._shared import GaussianMixture
from fewer.diffusion.dc_solver.search import Search, Step, Trajectory
from fewer.diffusion.dc_solver.unipc import State

FINE = 100
STEPS = 6


def problem(model=None, scheduler=None, steps: int = STEPS, count: int = 10, seed: int = 1):
    model, scheduler, x = model or noise_model(), scheduler or DCSolverMultistepScheduler(), noises(count, seed)
    return model, x, reference_trajectory(model, x, scheduler, steps, FINE), scheduler, steps


def at_step(index: int, **words) -> Step:
    """A search at this step, ratios of 1 before it."""
    model, x, reference, scheduler, steps = problem(**words)
    scheduler.set_timesteps(steps)
    search = Search(scheduler, model, reference.states)
    with torch.no_grad():
        state = search.solver.take(State(-1), search.output(0, x), x)
        for i in range(index):
            moved = search.solver.predict(state)
            state = search.solver.take(state, search.output(i + 1, moved), moved)
        return Step(search, state)


def test_the_reference_is_ddim_through_every_sampling_time():
    model, x = noise_model(), noises(4)
    scheduler = DCSolverMultistepScheduler()
    reference = reference_trajectory(model, x, scheduler, STEPS)
    ddim = DDIMScheduler(timestep_spacing="linspace", clip_sample=False, set_alpha_to_one=False, steps_offset=0)
    ddim.set_timesteps(1000)
    alphas, state, passed = ddim.alphas_cumprod.double(), x, {999: x}
    for t in range(999, 0, -1):  # DDIM's formula over every integer time
        clean = (state - (1 - alphas[t]).sqrt() * model(state, t)) / alphas[t].sqrt()
        state = alphas[t - 1].sqrt() * clean + (1 - alphas[t - 1]).sqrt() * (state - alphas[t].sqrt() * clean) / (1 - alphas[t]).sqrt()
        passed[t - 1] = state
    scheduler.set_timesteps(STEPS)
    assert reference.times.tolist() == [*scheduler.timesteps.tolist(), 0]
    for time, found in zip(reference.times, reference.states, strict=True):
        assert torch.allclose(found, passed[int(time)], atol=1e-6), time
    several = reference_trajectory(model, x, scheduler, [5, STEPS])
    assert torch.allclose(several.at(reference.times, reference.sigmas), reference.states, atol=1e-9)


def test_the_search_finds_the_minimum_of_a_grid_and_is_never_worse_than_no_compensation():
    found = search_ratios(*problem())
    step = at_step(2)
    grid = np.linspace(0.2, 3, 2001)
    losses = [float(step.search.outcome(step.state, ratio)[0]) for ratio in grid]
    assert found.values[2] == pytest.approx(grid[int(np.argmin(losses))], abs=2e-3)
    assert found.values[:2] == [1, 1]
    assert all(0 <= share < 1 for share in found.removed)
    assert found.removed[2] == pytest.approx(1 - min(losses) / step.loss_at_one, abs=1e-3)
    assert step(found.values[2]) <= step.loss_at_one


def test_adamw_agrees_with_brent_at_an_interior_minimum():
    by_brent = search_ratios(*problem(steps=5))
    by_adamw = search_ratios(*problem(steps=5), optimizer="adamw", iterations=400, weight_decay=0.0)
    assert by_adamw.values[2] == pytest.approx(by_brent.values[2], abs=1e-2)
    bounded = search_ratios(*problem(steps=5), optimizer="adamw", bound="tanh")
    assert all(0.5 < value < 1.5 for value in bounded.values)


def test_the_loss_has_the_gradient_of_a_central_difference():
    step = at_step(3)
    ratio = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(step.search.outcome(step.state, ratio)[0], ratio)
    above, below = (step(1.2 + shift) for shift in (1e-4, -1e-4))
    assert float(gradient) == pytest.approx((above - below) / 2e-4, rel=1e-4)


@pytest.mark.parametrize("steps", [5, 8])
def test_the_search_makes_few_calls_and_counts_them(steps):
    calls = []

    def counted(x, t):
        calls.append(len(x))
        return noise_model()(x, t)

    _, x, reference, scheduler, _ = problem(steps=steps)
    before = dict(scheduler.config)
    found = search_ratios(counted, x, reference, scheduler, steps)
    assert found.calls == len(calls) <= 14 * steps
    assert dict(scheduler.config) == before
    assert scheduler.solver is None, "the user's scheduler is left as it is"


def test_at_the_optimum_of_a_linear_model_the_error_is_orthogonal_to_what_a_ratio_moves():
    gaussian = GaussianMixture(randn(1, 4), torch.ones(1).double(), torch.rand(1, 4).double() * 0.3 + 0.05)
    model = noise_model(gaussian)
    args = problem(model)
    found = search_ratios(*args, xatol=1e-8, iterations=80)
    _, x, reference, scheduler, steps = args
    scheduler.set_timesteps(steps)
    search = Search(scheduler, model, reference.states)
    interior = 0
    with torch.no_grad():
        state = search.solver.take(State(-1), search.output(0, x), x)
        for i, ratio in enumerate(found.values):

            def ends(rho, state=state, i=i):
                compensated = search.solver.compensated(state, rho)
                moved = search.solver.predict(compensated)
                if i + 1 == steps:
                    return moved
                return search.solver.take(compensated, search.output(i + 1, moved), moved).x

            if 0.21 < ratio < 2.99 and ratio != 1:
                interior += 1
                error = ends(ratio) - reference.states[i + 1]
                slope = (ends(ratio + 1e-4) - ends(ratio - 1e-4)) / 2e-4
                assert abs(float((error * slope).sum())) < 1e-4 * float(error.norm() * slope.norm())
            state = search.solver.compensated(state, ratio)
            moved = search.solver.predict(state)
            if i + 1 < steps:
                state = search.solver.take(state, search.output(i + 1, moved), moved)
    assert interior >= 2


@pytest.mark.parametrize(
    "words", [{}, {"use_corrector": False}, {"solver_order": 3}, {"final_sigmas_type": "zero"}, {"dc_order": 1}], ids=str
)
def test_searched_ratios_bring_other_noises_nearer_too(words):
    model, scheduler = guided_model(2.0), DCSolverMultistepScheduler(**words)
    found = search_ratios(*problem(model, scheduler), guidance_scale=2.0)
    x = noises(50, seed=9)
    exact = reference_trajectory(model, x, scheduler, STEPS, FINE).states[-1]
    plain, ours = (
        float((sampled(each, STEPS, x, model) - exact).square().mean())
        for each in (scheduler, DCSolverMultistepScheduler(**words, ratios=found))
    )
    assert ours < 0.97 * plain


def test_ratios_belong_to_their_config():
    found = search_ratios(*problem())
    for words in ({"solver_order": 3}, {"timestep_spacing": "leading"}, {"dc_order": 1}, {"beta_schedule": "scaled_linear"}):
        with pytest.raises(ValueError, match=f"another config .*{next(iter(words))}"):
            DCSolverMultistepScheduler(**words, ratios=found)
    with pytest.raises(ValueError, match="6 ratios for 5 steps"):
        DCSolverMultistepScheduler(ratios=found).set_timesteps(5)


def test_what_cannot_be_searched_is_refused():
    model, x, reference, scheduler, _ = problem()
    lacking = Trajectory(reference.times[1:], reference.sigmas[1:], reference.states[1:])
    for args, words in (
        ((x, reference, scheduler, 7), "lacks|no state at time"),
        ((x, lacking, scheduler, STEPS), "no state at time 999"),
        ((x + 1, reference, scheduler, STEPS), "begins at other noises"),
        ((x[:3], reference, scheduler, STEPS), "begins at other noises"),
        ((x, reference, scheduler, 2), "expected more than 2"),
        ((x, reference, DCSolverMultistepScheduler(final_sigmas_type="zero"), STEPS), "no state at time -1"),
    ):
        with pytest.raises(ValueError, match=words):
            search_ratios(model, *args)
    for words in ({"optimizer": "sgd"}, {"iterations": 0}, {"bound": "sin"}, {"xatol": math.nan}):
        with pytest.raises(ValueError, match="expected"):
            search_ratios(model, x, reference, scheduler, STEPS, **words)
    with pytest.raises(ValueError, match="fine_steps"):
        reference_trajectory(model, x, scheduler, STEPS, 0)
    assert DATA.dim == 4
