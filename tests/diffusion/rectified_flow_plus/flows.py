"""Flows that are known exactly, for the tests of rectified flows."""

from __future__ import annotations

import itertools

import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

EPS = 1e-5


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Exact(nn.Module):
    """The denoiser of N(0, s^2)."""

    def __init__(self, s: float) -> None:
        super().__init__()
        self.s = s

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma
        return x * self.s**2 / (self.s**2 + sigma**2)


class Points(nn.Module):
    """The denoiser of five points of the plane."""

    points = randn(5, 2, seed=3)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1)
        likely = torch.softmax(-(x[:, None] - self.points).square().sum(-1) / (2 * sigma**2), 1)
        return likely @ self.points


class Noise(nn.Module):
    """The noise predictor of N(0, s^2) under betas: eps = sigma x / (alpha^2 s^2 + sigma^2)."""

    def __init__(self, s: float, schedule) -> None:
        super().__init__()
        self.s, self.schedule = s, schedule

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        t = self.schedule.time(timestep)
        alpha, sigma = (value.to(x).reshape(-1, *[1] * (x.ndim - 1)) for value in (self.schedule.alpha(t), self.schedule.sigma(t)))
        return sigma * x / (alpha**2 * self.s**2 + sigma**2)


def bent(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(2 * x) + t * x / 2 - 0.3 * t**2


def end_of_bent(x: Tensor, start: float = 1 - EPS, end: float = 0.0) -> Tensor:
    """Where the flow of `bent` takes x, to 1e-11."""

    def slope(t, state):
        state = torch.from_numpy(state)
        return bent(state, torch.tensor(t, dtype=torch.float64)).numpy()

    return torch.from_numpy(solve_ivp(slope, (start, end), x.flatten().numpy(), rtol=1e-12, atol=1e-12).y[:, -1]).reshape(x.shape)


def rk4(slope, x: Tensor, times: Tensor) -> Tensor:
    for a, b in itertools.pairwise(times):
        h, m = b - a, (a + b) / 2
        k_1 = slope(x, a)
        k_2 = slope(x + h / 2 * k_1, m)
        k_3 = slope(x + h / 2 * k_2, m)
        k_4 = slope(x + h * k_3, b)
        x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x
