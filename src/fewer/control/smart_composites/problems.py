"""What the study and the bench compare on: the plants with their references, and networks to compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fewer.control._shared.plants import Plant, mass_spring_damper, tendon_finger
from fewer.control.smart_composites.controller import example_of
from fewer.control.smart_composites.kinematics import ForwardKinematics, excitation
from fewer.control.smart_composites.smooth_mlp import SmoothMLP
from fewer.control.smart_composites.to_c.compiler import network_of
from fewer.inputs import read_arrays

DT = 0.025  # seconds a sample
STEPS = 200  # of a simulation
SHORTEST = 400  # samples of a recording
EXCITED = 4_000  # samples of the excitation that a model is learned from
TRIALS = 80  # simulations of all whole references that PID and LQR are tuned by: 64,000 samples
HORIZON, CONTROL_HORIZON, DELAYS = (1, 12), 4, (1, 3)
LAMBDA = 1e-7  # of 1e-5, 1e-6, 1e-7 the best on the plants of seeds 100 and 101, which no study uses; sharpness is the default


def spring_references(steps: int, dt: float = DT) -> dict[str, np.ndarray]:
    """Name -> reference [steps + N2] (m)."""
    t = np.arange(1, steps + HORIZON[1] + 1) * dt
    return {
        "steps": np.where((t // 2) % 2 == 0, 1.0, -0.5),
        "sine 0.5 Hz": 0.8 * np.sin(2 * np.pi * 0.5 * t),
        "sine 2 Hz": 0.05 * np.sin(2 * np.pi * 2 * t),
        "swirl": 0.15 * t * np.sin(2 * np.pi * 0.4 * t),
    }


def circle(steps: int, dt: float = DT) -> np.ndarray:
    """A circle for the finger's tip [steps + N2, 2] (mm), 3 mm in radius, once in 4 s."""
    t = np.arange(1, steps + HORIZON[1] + 1) * dt
    return np.stack([3 * np.sin(np.pi / 2 * t), 54.0 + 3 * np.cos(np.pi / 2 * t)], axis=1)


def learned_from(recording: Recording, seed: int, hidden: int) -> ForwardKinematics:
    """What a controller knows of a recorded plant: a small network, learned from the first half."""
    first = recording.half(0)
    return ForwardKinematics(seed=seed).fit(first.u, first.y, DELAYS, (hidden,))


def learned(plant: Plant, seed: int, hidden: int, samples: int = EXCITED) -> ForwardKinematics:
    """The plant's kinematics, learned from an excitation."""
    rng = np.random.default_rng([seed, 7])
    u = excitation(plant.lower, plant.upper, samples, rng)
    y = [plant.reset(seed)]
    for each in u[:-1]:
        y.append(plant.step(each, DT))
    return ForwardKinematics(seed=seed).fit(u, np.array(y), DELAYS, (hidden,))


def spring(seed: int) -> Plant:
    return mass_spring_damper(seed=seed)


def finger(seed: int) -> Plant:
    return tendon_finger(seed=seed)


@dataclass
class LearnedPlant(Plant):
    """A network in the place of a plant that is not here: y(n+1) = f(u(n), u(n-1), y(n), ..., y(n-3)), a sample a step, whatever dt."""

    f: Callable[[np.ndarray], np.ndarray] = np.zeros_like

    def step(self, u: Any, dt: float) -> np.ndarray:
        u = np.clip(np.asarray(u, float), self.lower, self.upper)
        y = self.f(np.concatenate([u, self.x]))
        past_u, past_y = self.x[: DELAYS[0] * self.inputs], self.x[DELAYS[0] * self.inputs :]
        self.x = np.concatenate([u, past_u, y, past_y])
        self.x = np.concatenate([self.x[: DELAYS[0] * self.inputs], self.x[(DELAYS[0] + 1) * self.inputs : -self.outputs]])
        return self.measure()


@dataclass(frozen=True)
class Recording:
    """A user's recorded inputs [T, m] and outputs [T, p]; u[n] is applied from y[n] to y[n+1]."""

    u: np.ndarray
    y: np.ndarray

    @classmethod
    def read(cls, file: str) -> Recording:
        """From an .npz file with u and y; ValueError naming what is wrong."""
        arrays = read_arrays(file, ["u", "y"])
        for name, each in arrays.items():
            if each.ndim not in (1, 2) or each.dtype.kind not in "fiu" or not np.isfinite(each).all():
                raise ValueError(
                    f"{file}: {name} is {each.shape} {each.dtype}; expected finite numbers [T] or [T, channels]: a row a sample"
                )
        u, y = (arrays[name].reshape(len(arrays[name]), -1).astype(float) for name in ("u", "y"))
        if len(u) != len(y) or len(u) < SHORTEST:
            raise ValueError(f"{file}: u has {len(u)} samples and y {len(y)}; expected as many of both, at least {SHORTEST}")
        if (u.std(axis=0) == 0).any() or (y.std(axis=0) == 0).any():
            raise ValueError(f"{file}: a channel of u or y never changes; expected an excitation that moves all: leave that channel out")
        return cls(u, y)

    def half(self, which: int) -> Recording:
        middle = len(self.u) // 2
        return Recording(self.u[:middle], self.y[:middle]) if which == 0 else Recording(self.u[middle:], self.y[middle:])

    def plant(self, seed: int) -> Plant:
        """A larger network, learned from the second half, which no controller sees."""
        u, y = self.half(1).u, self.half(1).y
        fit = ForwardKinematics(seed=seed + 1).fit(u, y, DELAYS, (32,))
        rest = np.concatenate([np.tile(u[0], DELAYS[0]), np.tile(y[0], DELAYS[1] + 1)])
        at, f = slice(DELAYS[0] * u.shape[1], DELAYS[0] * u.shape[1] + y.shape[1]), SmoothMLP(network_of(fit.model, example_of(fit.model)))
        noise = np.full(y.shape[1], fit.one_step_rmse)
        return LearnedPlant(lambda x, u: x, lambda x: x[at], rest, self.u.min(axis=0), self.u.max(axis=0), noise, seed, f)

    def references(self, steps: int) -> dict[str, np.ndarray]:
        """Name -> reference [steps + N2, p]: two levels that the plant reached, and what it did."""
        low, high = np.quantile(self.y, [0.3, 0.7], axis=0)
        up = (np.arange(steps + HORIZON[1]) // max(steps // 4, 1)) % 2 == 0
        return {"levels": np.where(up[:, None], high, low), "recorded": self.half(1).y[: steps + HORIZON[1]]}

    @property
    def steps(self) -> int:
        return min(STEPS, len(self.half(1).y) - HORIZON[1])

    @property
    def change_weight(self) -> float:
        """Lambda, as large beside this plant's units as LAMBDA beside the mass's."""
        return 1e-5 * float(self.y.var(axis=0).sum() / self.u.var(axis=0).mean())


class LastStep(nn.Module):
    """A recurrent layer and a linear one on its last output."""

    def __init__(self, layer: nn.RNNBase, outputs: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x)[0][:, -1])


@dataclass(frozen=True)
class Case:
    """A network to compile, with an input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def built(self) -> tuple[nn.Module, torch.Tensor]:
        torch.manual_seed(0)
        return self.make().eval(), torch.randn(1, *self.shape)


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def cnn(channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, 10),
    )  # fmt: skip


def signal_cnn(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(3, channels, 5, stride=2), nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(channels, channels, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(channels * 13, 4),
    )  # fmt: skip


CASES: dict[str, Case] = {
    "mlp-4-16-1": Case(lambda: mlp(4, 16, 1, activation=nn.Tanh), (4,)),
    "mlp-10-32-32-4": Case(lambda: mlp(10, 32, 32, 4), (10,)),
    "mlp-64-128-10": Case(lambda: mlp(64, 128, 10), (64,)),
    "mlp-784-512-256-10": Case(lambda: mlp(784, 512, 256, 10), (784,)),
    "mlp-1024-1024-64": Case(lambda: mlp(1024, 1024, 64), (1024,)),
    "cnn-4-12": Case(lambda: cnn(4, 12), (1, 12, 12)),
    "cnn-8-28": Case(lambda: cnn(8, 28), (1, 28, 28)),
    "cnn-16-28": Case(lambda: cnn(16, 28), (1, 28, 28)),
    "signal-cnn-8": Case(lambda: signal_cnn(8), (3, 64)),
    "gru-4-16": Case(lambda: LastStep(nn.GRU(4, 16, batch_first=True), 2), (10, 4)),
    "lstm-4-16": Case(lambda: LastStep(nn.LSTM(4, 16, batch_first=True), 2), (10, 4)),
    "rnn-4-16": Case(lambda: LastStep(nn.RNN(4, 16, batch_first=True), 2), (10, 4)),
}
