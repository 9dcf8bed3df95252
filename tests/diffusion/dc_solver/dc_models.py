"""Networks whose answers are known in closed form, and sampling with them, for the tests of DC-Solver."""

from __future__ import annotations

from typing import Any

from exact_flows import mixture, randn
from torch import Tensor

from fewer.diffusion import DCSolverMultistepScheduler
from fewer.diffusion._shared import GaussianMixture, NoiseSchedule

VP = NoiseSchedule.from_diffusers(DCSolverMultistepScheduler())
DATA, OTHER = mixture(4, 5), mixture(4, 2, seed=7)
RATIOS = [1, 1, 1.2, 0.9, 1.1, 1.4]


def noise_model(data: GaussianMixture = DATA, schedule: NoiseSchedule = VP) -> Any:
    """(x, training time) -> the noise in x."""

    def model(x: Tensor, t: Any) -> Tensor:
        time = schedule.time(t)
        alpha, sigma = (value.to(x.dtype) for value in (schedule.alpha(time), schedule.sigma(time)))
        return (x - alpha * data.denoiser(x / alpha, sigma / alpha)) / sigma

    return model


def guided_model(scale: float) -> Any:
    plain, towards = noise_model(OTHER), noise_model(DATA)
    return lambda x, t: plain(x, t) + scale * (towards(x, t) - plain(x, t))


def noises(count: int = 16, seed: int = 0) -> Tensor:
    return randn(count, 4, seed=seed)


def sampled(scheduler: Any, steps: int, x: Tensor, model: Any = None) -> Tensor:
    """Where a scheduler of diffusers ends after so many steps."""
    model = model or noise_model()
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
    return x


def states(scheduler: Any, steps: int, x: Tensor, model: Any = None) -> list[Tensor]:
    """The states that the network is called at, and the end."""
    model, passed = model or noise_model(), [x]
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        passed.append(scheduler.step(model(passed[-1], t), t, passed[-1], return_dict=False)[0])
    return passed
