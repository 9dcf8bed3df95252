"""What the study and the bench compare on: the plants with their references, and networks to compile."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fewer.control._shared.plants import Plant, mass_spring_damper, tendon_finger
from fewer.control.smart_composites.kinematics import ForwardKinematics, excitation

DT = 0.025  # seconds a sample
STEPS = 200  # of a simulation
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
