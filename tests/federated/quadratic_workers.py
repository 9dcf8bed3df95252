"""Workers whose losses are known quadratics (y - c_i)' A_i (y - c_i) / 2, one example each, so that every gradient is the full one."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fewer.federated import FlatModel, History, Return, Shards, Update, UpdateRound

START = np.array([0.3, -0.2, 0.5])


def curvature(worker: int) -> np.ndarray:
    """The diagonal of A_i."""
    return np.array([1 + 0.5 * worker, 0.5 + 0.3 * worker, 2 - 0.4 * worker])


def centre(worker: int) -> np.ndarray:
    return np.array([np.sin(1 + worker), np.cos(2 * worker), 0.5 * worker])


def gradient(worker: int, y: np.ndarray) -> np.ndarray:
    return curvature(worker) * (y - centre(worker))


def minimiser(weights=(1, 1, 1)) -> np.ndarray:
    """Of the weighted mean of f_0, f_1, f_2."""
    a, c = (np.array([each(worker) for worker in range(3)]) for each in (curvature, centre))
    w = np.array(weights)[:, None]
    return (w * a * c).sum(0) / (w * a).sum(0)


class Point(nn.Module):
    """A vector whose loss at an example [a, c] is the quadratic."""

    def __init__(self, dtype=torch.float64, start=START) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=dtype))

    def forward(self, x):
        a, c = x.chunk(2, dim=-1)
        return 0.5 * (a * (self.w - c) ** 2).sum(-1)


def as_it_is(output, y):
    return output


def model(dtype=torch.float64, start=START) -> FlatModel:
    return FlatModel(Point(dtype, start), as_it_is)


def workers(count: int = 3, dtype=torch.float64, alike: bool = False) -> Shards:
    rows = [np.concatenate([curvature(0 if alike else i), centre(0 if alike else i)]) for i in range(count)]
    return Shards(torch.tensor(np.stack(rows), dtype=dtype), torch.zeros(count, dtype=dtype), list(np.arange(count)[:, None]))


def lines(history: History) -> list[UpdateRound]:
    """What happened in each update."""
    return [each for each in history.rounds if isinstance(each, UpdateRound)]


def written(*updates: list[tuple[int, int, int]]) -> list[Update]:
    """Updates from lists of (worker, version, steps), a second apart."""
    return [Update(float(number), [Return(*each) for each in returns]) for number, returns in enumerate(updates, 1)]
