"""Data whose flow is known exactly, and statistics of no model, for the tests of the solver."""

from __future__ import annotations

import math

import torch

from fewer.diffusion import EMS
from fewer.diffusion._shared import GaussianMixture, NoiseSchedule

EDM = NoiseSchedule.edm(0.02, 20.0)


def grid(count: int, schedule: NoiseSchedule = EDM) -> torch.Tensor:
    ends = [float(schedule.lambda_(torch.tensor(t, dtype=torch.float64))) for t in (schedule.t_max, schedule.t_min)]
    return torch.linspace(*ends, count + 1, dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(dim: int, components: int, seed: int = 0) -> GaussianMixture:
    draw = torch.Generator().manual_seed(seed)
    means = 0.5 * torch.randn(components, dim, generator=draw, dtype=torch.float64)
    u = torch.rand(components, dim, generator=draw, dtype=torch.float64)
    weights = torch.softmax(torch.randn(components, generator=draw, dtype=torch.float64), 0)
    return GaussianMixture(means, weights, 0.02 + 0.1 * u)


def noise_of(data: GaussianMixture):
    return lambda x, t: (x - data.denoiser(x, t)) / t


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x - exact).square().mean().sqrt())


def flow(data: GaussianMixture, x: torch.Tensor, sigma_a: float, sigma_b: float, steps: int = 400) -> torch.Tensor:
    """The exact flow by classical Runge and Kutta in log sigma, whose error is below 1e-8 here: `transport` with fewer steps."""
    h = (math.log(sigma_b) - math.log(sigma_a)) / steps
    for i in range(steps):
        s = math.log(sigma_a) + i * h
        k_1 = x - data.denoiser(x, math.exp(s))
        k_2 = x + h / 2 * k_1 - data.denoiser(x + h / 2 * k_1, math.exp(s + h / 2))
        k_3 = x + h / 2 * k_2 - data.denoiser(x + h / 2 * k_2, math.exp(s + h / 2))
        k_4 = x + h * k_3 - data.denoiser(x + h * k_3, math.exp(s + h))
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x


def wavy(lambdas: torch.Tensor, dim: int) -> EMS:
    """Smooth EMS of no model at all: the solution is exact for any."""
    phase = torch.arange(dim) + lambdas[:, None]
    return EMS(lambdas, (0.6 + 0.3 * phase.sin()).float(), (-0.4 + 0.3 * phase.cos()).float(), (0.5 * (2 * phase).sin()).float())
