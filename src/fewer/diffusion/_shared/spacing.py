"""At which noise levels a sampler stops: the spacings of the field, as lambda = log(alpha / sigma) of each step's end."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from fewer.checks import check_choice, check_whole
from fewer.diffusion._shared.noise_schedule import NoiseSchedule

SPACINGS = ("logsnr", "time_uniform", "time_quadratic", "edm")
RHO = 7  # of the edm spacing


def noise_levels(sigma_max: float, sigma_min: float, steps: int) -> Float64[Tensor, "steps_plus_1"]:
    """sigma in equal steps of its logarithm.

    >>> noise_levels(100.0, 1.0, 2).round(decimals=6).tolist()
    [100.0, 10.0, 1.0]
    """
    check_whole(steps=steps)
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), steps + 1, dtype=torch.float64).exp()


def spaced_lambdas(schedule: NoiseSchedule, spacing: str, steps: int, t_end: float) -> Float64[Tensor, "steps_plus_1"]:
    """lambda from the schedule's t_max to t_end: in equal steps of lambda ("logsnr"), of t, of its root, or of sigma^(1/7) ("edm")."""
    check_choice(SPACINGS, spacing=spacing)
    times = torch.tensor(schedule.t_max, dtype=torch.float64), torch.tensor(t_end, dtype=torch.float64)
    first, last = (schedule.lambda_(t) for t in times)
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if spacing == "logsnr":
        return first + share * (last - first)
    if spacing == "edm":
        return -_powers((-first).exp(), (-last).exp(), share, RHO).log()
    return schedule.lambda_(_powers(*times, share, 1 if spacing == "time_uniform" else 2))


def _powers(first: Tensor, last: Tensor, share: Tensor, rho: float) -> Tensor:
    """From first to last in equal steps of the rho-th root."""
    return (first ** (1 / rho) + share * (last ** (1 / rho) - first ** (1 / rho))) ** rho
