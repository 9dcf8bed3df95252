"""The search of ratios: step by step, the one number that brings the next state nearest to a trajectory of many steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fewer.checks import check_choice, check_positive, check_whole
from fewer.diffusion.dc_solver.ratios import Ratios, finite_share, key_of
from fewer.diffusion.dc_solver.scheduler import DCSolverMultistepScheduler, own_levels
from fewer.diffusion.dc_solver.unipc import State

Model = Callable[[Tensor, Tensor], Tensor]  # (x, training time) -> guided output in the scheduler's prediction type
BOUNDS = (0.2, 3.0)
EVALUATIONS = {"brent": 12, "adamw": 40}  # of the loss, a step
SAME = 1e-6  # noise levels nearer than this, relatively, are one
ZERO = -1.0  # the time of a clean image, where sampling ends there


@dataclass(frozen=True, eq=False)
class Trajectory:
    """States on the way from noises to images, by many steps.

    Attributes:
        times: [n] training times, descending; -1 stands for the clean image.
        sigmas: [n] sigma / alpha of each.
        states: [n, B, *shape].
    """

    times: Float64[np.ndarray, "n"]
    sigmas: Float64[np.ndarray, "n"]
    states: Float[Tensor, "n B *shape"]

    def at(self, times: Float64[np.ndarray, "m"], sigmas: Float64[np.ndarray, "m"]) -> Float[Tensor, "m B *shape"]:
        """The states at these levels; ValueError naming the first that it lacks."""
        rows = []
        for time, sigma in zip(times, sigmas, strict=True):
            near = np.flatnonzero(np.abs(self.sigmas - sigma) <= SAME * sigma)
            if not len(near):
                raise ValueError(
                    f"the reference has no state at time {time:g} (sigma / alpha {sigma:.6g}); expected one at every sampling time and the end: "
                    "make it by reference_trajectory for these steps"
                )
            rows.append(int(near[0]))
        return self.states[rows]


def sampling_levels(
    scheduler: DCSolverMultistepScheduler, num_steps: int | Sequence[int]
) -> tuple[Float64[np.ndarray, "n"], Float64[np.ndarray, "n"]]:
    """(times, sigma / alpha) of the calls and the end of a sampling, descending; of several numbers of steps those of all."""
    grids = [own_levels(scheduler, steps) for steps in ([num_steps] if isinstance(num_steps, int) else num_steps)]
    if len({(sigmas[0], sigmas[-1]) for _, sigmas in grids}) > 1:
        raise ValueError(
            f"{num_steps} steps begin or end at different noise levels; expected one trajectory for each: ask for them one by one"
        )
    levels = {float(s): float(t) for times, sigmas in grids for t, s in zip((*times, 0.0 if sigmas[-1] else ZERO), sigmas, strict=True)}
    sigmas = np.array(sorted(levels, reverse=True))
    return np.array([levels[float(sigma)] for sigma in sigmas]), sigmas


@torch.no_grad()
def reference_trajectory(
    model: Model,
    x_T: Float[Tensor, "B *shape"],
    scheduler: DCSolverMultistepScheduler,
    num_steps: int | Sequence[int],
    fine_steps: int = 999,
) -> Trajectory:
    """DDIM over the training schedule, its grid joined with the sampling times; the sampling times and the end are kept.

    Args:
        model: guided as the sampler will be.
        x_T: noises at the first sampling time.
        scheduler: whose grid and end are meant.
        num_steps: of the sampler; several may share one trajectory where their grids begin and end alike.
        fine_steps: of DDIM, over the whole schedule.
    """
    check_whole(fine_steps=fine_steps)
    times, kept = sampling_levels(scheduler, num_steps)
    table = (((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod) ** 0.5).double().numpy()
    fine = [t for t in np.linspace(len(table) - 1, 0, fine_steps + 1).round().astype(int) if kept[-1] < table[t] < kept[0]]
    levels = dict(zip(kept.tolist(), times.tolist(), strict=True))
    levels |= {float(table[t]): float(t) for t in fine if np.abs(kept - table[t]).min() > SAME * table[t]}
    sigmas = np.array(sorted(levels, reverse=True))
    ddim = DCSolverMultistepScheduler.from_config(scheduler.config, solver_order=1, use_corrector=False, ratios=None)
    ddim.take_levels(torch.tensor([levels[float(sigma)] for sigma in sigmas[:-1]]), torch.from_numpy(sigmas))
    ddim.set_begin_index(0)
    x, states = x_T, [x_T]
    for t, sigma in zip(ddim.timesteps, sigmas[1:], strict=True):
        x = ddim.step(model(x, t), t, x, return_dict=False)[0]
        if sigma in kept:
            states.append(x)
    return Trajectory(times, kept, torch.stack(states))


class Search:
    """A sampler, its network, and the states that it should pass; counts calls of the network."""

    def __init__(self, scheduler: DCSolverMultistepScheduler, model: Model, targets: Float[Tensor, "M_plus_1 B *shape"]) -> None:
        assert scheduler.solver is not None
        self.scheduler, self.solver, self.model, self.targets, self.calls = scheduler, scheduler.solver, model, targets, 0

    def output(self, index: int, x: Tensor) -> Tensor:
        """The network's output at step `index`, as the solver buffers it."""
        self.calls += 1
        return self.scheduler.converted(self.model(x, self.scheduler.timesteps[index]), x, index)

    def outcome(self, state: State, ratio: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss, where the step ends, the output there): the loss is that of the corrected state, where it is corrected."""
        compensated = self.solver.compensated(state, ratio)
        moved = ends = self.solver.predict(compensated)
        output = None
        if self.solver.corrects(compensated):
            output = self.output(state.index + 1, moved)
            ends = self.solver.take(compensated, output, moved).x
        assert ends is not None
        return (ends - self.targets[state.index + 1]).square().mean(), moved, output


class Step:
    """The choice of one ratio: called with a ratio it tells the loss, and it keeps the best, beginning with 1."""

    def __init__(self, search: Search, state: State) -> None:
        self.search, self.state = search, state
        self.ratio, (self.loss, self.moved, self.output) = 1.0, self._try(1.0)
        self.loss_at_one = self.loss

    def _try(self, ratio: float) -> tuple[float, Tensor, Tensor | None]:
        loss, moved, output = self.search.outcome(self.state, ratio)
        return float(loss), moved, output

    def __call__(self, ratio: float) -> float:
        loss, moved, output = self._try(ratio)
        if loss < self.loss:
            self.ratio, self.loss, self.moved, self.output = float(ratio), loss, moved, output
        return loss


def by_brent(step: Step, iterations: int, xatol: float) -> None:
    """One number, bounded: a handful of evaluations and no backward pass."""
    from scipy.optimize import minimize_scalar

    minimize_scalar(step, bounds=BOUNDS, method="bounded", options={"xatol": xatol, "maxiter": iterations})


def by_adamw(step: Step, iterations: int, bound: str | None, weight_decay: float) -> None:
    """The released search: AdamW with rate 0.1 through the network."""
    u = torch.full((), 0.0 if bound else 1.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([u], lr=0.1, weight_decay=weight_decay)

    def ratio() -> Tensor:
        return 1 + torch.tanh(u) / 2 if bound else u

    with torch.enable_grad():
        for _ in range(iterations):
            optimizer.zero_grad()
            step.search.outcome(step.state, ratio())[0].backward()
            optimizer.step()
    step(float(ratio().detach()))


def search_ratios(
    model: Model,
    x_T: Float[Tensor, "N *shape"],
    reference: Trajectory,
    scheduler: DCSolverMultistepScheduler,
    num_steps: int,
    guidance_scale: float = 1.0,
    optimizer: str = "brent",
    iterations: int | None = None,
    *,
    bound: str | None = None,
    weight_decay: float = 0.01,
    xatol: float = 1e-3,
) -> Ratios:
    """The ratios of one setting, greedily: each minimises the mean squared error of the next state (arXiv 2409.03755, Algorithm 1).

    Args:
        model: (x, time) -> guided output in the scheduler's prediction type; differentiable for "adamw".
        x_T: N noises at the first sampling time; ten suffice.
        reference: of the same model, guidance and noises.
        scheduler: whose config the ratios will belong to; left as it is.
        num_steps: network calls of a sample; more than max(2, K).
        guidance_scale: of `model`; kept with the ratios.
        optimizer: "brent" (a bounded search on [0.2, 3], no backward pass), or "adamw" with rate 0.1, as released.
        iterations: evaluations of the loss a step at most; by default 12 and 40.
        bound: "tanh": 1 + tanh(u) / 2 for "adamw".
        weight_decay: of "adamw", pulls towards 0.
        xatol: of "brent".

    Returns:
        Ratios, whose loss is at no step above that of the ratio 1.

    Raises:
        ValueError: settings that cannot be, or a reference that lacks a sampling time or holds other noises.
    """
    check_choice(EVALUATIONS, optimizer=optimizer)
    check_choice((None, "tanh"), bound=bound)
    check_whole(optional=("iterations",), iterations=iterations)
    check_positive(xatol=xatol)
    sampler = DCSolverMultistepScheduler.from_config(scheduler.config, ratios=None)
    sampler.set_timesteps(num_steps)
    solver = sampler.solver
    assert solver is not None
    if num_steps <= solver.first_compensated:
        raise ValueError(f"num_steps is {num_steps}; expected more than {solver.first_compensated}: with fewer nothing is compensated")
    targets = reference.at(*sampling_levels(scheduler, num_steps))
    if targets[0].shape != x_T.shape or not torch.allclose(targets[0].to(x_T), x_T):
        raise ValueError(
            "the reference begins at other noises than x_T; expected the trajectory of the same: reference_trajectory(model, x_T, ...)"
        )
    search, most = Search(sampler, model, targets), iterations or EVALUATIONS[optimizer]
    values, removed = [], []
    with torch.no_grad():
        state, x, output = State(-1), x_T, search.output(0, x_T)
        for i in range(num_steps):
            state = solver.take(state, output, x)
            step = Step(search, state)
            if i >= solver.first_compensated and optimizer == "brent":
                by_brent(step, most, xatol)
            elif i >= solver.first_compensated:
                by_adamw(step, most, bound, weight_decay)
            values.append(step.ratio)
            removed.append(finite_share(step.loss_at_one, step.loss))
            state, x = solver.compensated(state, step.ratio), step.moved
            if i + 1 < num_steps:
                output = search.output(i + 1, x) if step.output is None else step.output
    return Ratios(values, num_steps, guidance_scale, key_of(sampler.config), removed, search.calls)
