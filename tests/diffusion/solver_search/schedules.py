"""Schedules, spaces and networks that the tests of the solver search share."""

from __future__ import annotations

import random

import torch
from exact_flows import EDM, grid, mixture, noise_of, wavy

from fewer.diffusion import SearchSpace, SolverSchedule, StepDecision

EMS_OF_NONE = wavy(grid(240), 3)
DATA = mixture(3, 3)
EPS = noise_of(DATA)
MEAN = (DATA.weights[:, None] * DATA.means).sum(0)
SPACE = SearchSpace(EDM, tuple(EMS_OF_NONE.lambdas.tolist()), True)


def random_schedules(count: int, nfe: int = 5, seed: int = 0) -> list[SolverSchedule]:
    draw = random.Random(seed)
    return [SPACE.random(nfe, draw) for _ in range(count)]


def implicit(schedule: SolverSchedule, at: int) -> SolverSchedule:
    """The same with an implicit corrector after a step."""
    from dataclasses import replace

    steps = [replace(step, corrector="implicit") if i == at else step for i, step in enumerate(schedule.steps)]
    return replace(schedule, steps=tuple(steps))


class Counted:
    """A network that counts its calls."""

    def __init__(self, eps=EPS) -> None:
        self.eps, self.calls, self.times = eps, 0, []

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.times.append(float(t))
        return self.eps(x, t)


def plain(*orders: int, lambdas=(-2.9, -1.0, 0.5, 2.0), prediction: str = "data", **words) -> SolverSchedule:
    return SolverSchedule(tuple(lambdas[: len(orders) + 1]), tuple(StepDecision(prediction, order) for order in orders), **words)
