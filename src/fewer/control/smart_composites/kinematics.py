"""Learned forward kinematics: f of y(n+1) = f(u(n), ..., u(n-nd), y(n), ..., y(n-dd)) from a recorded excitation."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import nn

NEARLY_LINEAR = 0.05  # slope of the units that begin nearly linear


def regressors(u: np.ndarray, y: np.ndarray, nd: int, dd: int) -> tuple[np.ndarray, np.ndarray]:
    """z [N, (nd + 1) m + (dd + 1) p] and y(n+1) [N, p]; u[n] is applied from y[n] to y[n+1]."""
    first = max(nd, dd)
    at = np.arange(first, len(u) - 1)
    z = [u[at - k] for k in range(nd + 1)] + [y[at - k] for k in range(dd + 1)]
    return np.concatenate(z, axis=1), y[at + 1]


def excitation(lower: np.ndarray, upper: np.ndarray, steps: int, rng: np.random.Generator, hold: tuple[int, int] = (4, 30)) -> np.ndarray:
    """Inputs [steps, m] that show what a plant does: random steps in the first half, chirps with an offset of random steps in the second."""
    inputs = len(lower)
    levels = np.zeros((steps, inputs))
    for channel in range(inputs):
        n = 0
        while n < steps:
            length = int(rng.integers(*hold))
            levels[n : n + length, channel] = rng.uniform(-1, 1)
            n += length
    half = steps // 2
    time = np.linspace(0, 1, steps - half)
    chirps = np.stack([np.sin(2 * np.pi * (2 + (10 + 3 * channel) * time) * time * 10 + channel) for channel in range(inputs)], axis=1)
    levels[half:] = 0.5 * levels[half:] + 0.5 * chirps
    return (lower + upper) / 2 + 0.98 * (upper - lower) / 2 * levels


class ForwardKinematics:
    """Fits a small network to a plant's recorded inputs and outputs.

    Adam on noisy inputs, then the output layer by ridge regression in closed form. Inputs and outputs are standardised; the scaling is
    folded into the first and the last layer, so that `model` (and the C of it) takes and gives plain units.

    Attributes:
        model: nn.Sequential of Linear and Tanh, in double precision.
        one_step_rmse: on the last fifth of the recording, which is not trained on, [p].

    Examples:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> u, y = rng.uniform(-1, 1, (400, 1)), np.zeros((400, 1))
        >>> for n in range(399):
        ...     y[n + 1] = 0.8 * y[n] + 0.3 * np.tanh(u[n])
        >>> learned = ForwardKinematics(steps=300).fit(u, y, (0, 0), hidden=(8,))
        >>> bool(learned.one_step_rmse < 0.02)
        True
    """

    def __init__(self, steps: int = 400, lr: float = 1e-3, noise: float = 1e-3, ridge: float = 1e-9, seed: int = 0) -> None:
        self.steps, self.lr, self.noise, self.ridge, self.seed = steps, lr, noise, ridge, seed

    def fit(self, u: Any, y: Any, delays: tuple[int, int] = (1, 1), hidden: tuple[int, ...] = (16,)) -> ForwardKinematics:
        """Learn from a recording.

        Args:
            u: [T, m], u[n] applied from y[n] to y[n+1].
            y: [T, p].
            delays: (nd, dd).
            hidden: widths of the tanh layers.

        Raises:
            ValueError: recordings of two lengths, too short, or not finite.
        """
        u, y = (np.asarray(each, float).reshape(len(each), -1) for each in (u, y))
        if len(u) != len(y) or len(u) < 20 + max(delays):
            raise ValueError(f"u has {len(u)} samples and y {len(y)}; expected as many of both, at least {20 + max(delays)}")
        if not (np.isfinite(u).all() and np.isfinite(y).all()):
            raise ValueError("u or y holds NaN or infinity; expected finite samples: cut them out of the recording")
        self.delays, self._u, self._y, self.p = delays, u, y, y.shape[1]
        z, target = regressors(u, y, *delays)
        self._kept = len(z) * 4 // 5
        self._mean, self._deviation = z[: self._kept].mean(0), z[: self._kept].std(0) + 1e-12
        self._target_mean, self._target_deviation = target[: self._kept].mean(0), target[: self._kept].std(0) + 1e-12
        x = torch.as_tensor((z - self._mean) / self._deviation)[: self._kept]
        t = torch.as_tensor((target - self._target_mean) / self._target_deviation)[: self._kept]
        network = self._trained(x, t, hidden)
        self.model = self._in_plain_units(network)
        errors = self._predict(z[self._kept :]) - target[self._kept :]
        self.one_step_rmse = float(np.sqrt(np.mean(errors**2)))
        return self

    def _trained(self, x: torch.Tensor, t: torch.Tensor, hidden: tuple[int, ...]) -> nn.Sequential:
        generator = torch.Generator().manual_seed(self.seed)
        layers: list[nn.Module] = []
        sizes = [x.shape[1], *hidden]
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after).double(), nn.Tanh()]
        layers.append(nn.Linear(sizes[-1], t.shape[1]).double())
        network = nn.Sequential(*layers)
        with torch.no_grad():
            for layer in network:
                if isinstance(layer, nn.Linear):
                    layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (0.7 / layer.in_features**0.5))
                    layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.3)
                    if (
                        layer is not network[-1]
                    ):  # as many units as there are inputs begin nearly linear: the fit is never worse than a line's
                        passed = min(layer.weight.shape)
                        layer.weight[:passed] = NEARLY_LINEAR * torch.eye(passed, layer.in_features, dtype=x.dtype)
                        layer.bias[:passed] = 0.0
            self._ridge(network, x, t)
        outputs = t.shape[1] * (self.delays[1] + 1)  # the last columns of z are y
        optimizer = torch.optim.Adam(network.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for _ in range(self.steps):
            noisy = x.clone()
            noisy[:, -outputs:] += self.noise * torch.randn(len(x), outputs, generator=generator, dtype=x.dtype)
            optimizer.zero_grad()
            ((network(noisy) - t) ** 2).mean().backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            self._ridge(network, x, t)
        return network

    def _ridge(self, network: nn.Sequential, x: torch.Tensor, t: torch.Tensor) -> None:
        """The last layer in closed form: (A^T A + N ridge I) w = A^T t."""
        a = torch.cat([network[:-1](x), torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        w = torch.linalg.solve(a.T @ a + len(a) * self.ridge * torch.eye(a.shape[1], dtype=x.dtype), a.T @ t)
        last = network[-1]
        assert isinstance(last, nn.Linear)
        last.weight.copy_(w[:-1].T)
        last.bias.copy_(w[-1])

    def _in_plain_units(self, network: nn.Sequential) -> nn.Sequential:
        with torch.no_grad():
            first, last = network[0], network[-1]
            assert isinstance(first, nn.Linear)
            assert isinstance(last, nn.Linear)
            first.weight.div_(torch.as_tensor(self._deviation))
            first.bias.sub_(first.weight @ torch.as_tensor(self._mean))
            deviation = torch.as_tensor(self._target_deviation)
            last.weight.mul_(deviation[:, None])
            last.bias.mul_(deviation).add_(torch.as_tensor(self._target_mean))
        return network

    def _predict(self, z: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.as_tensor(z)).numpy()

    def rollout_rmse(self, k: int) -> float:
        """Root mean square error k samples ahead, its own predictions fed back, on what was not trained on."""
        nd, dd = self.delays
        begin = max(nd, dd) + self._kept
        starts = np.arange(begin, len(self._u) - k)
        if k < 1 or not len(starts):
            raise ValueError(f"k = {k}; expected 1 to {len(self._u) - begin - 1}")
        past = [self._y[starts - j] for j in range(dd + 1)]
        for step in range(k):
            z = np.concatenate([self._u[starts + step - j] for j in range(nd + 1)] + past, axis=1)
            past = [self._predict(z), *past[:-1]]
        return float(np.sqrt(np.mean((past[0] - self._y[starts + k]) ** 2)))
