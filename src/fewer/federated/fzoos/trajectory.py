"""All that a client has asked: points and values in the order of asking, in the flat vectors that it keeps between rounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewer.federated._shared.black_box import BlackBox

Bounds = tuple[float, float] | None


class Trajectory:
    """Up to `history` points [d] and their values; when full the oldest goes.

    Args:
        points: [history d], as kept.
        values: [history], as kept.
        asked: how many were asked so far.
        box: the function to ask.
        bounds: of every number of a point that is asked.
    """

    def __init__(self, points: Tensor, values: Tensor, asked: int, box: BlackBox, bounds: Bounds) -> None:
        self._points, self._values = points.view(len(values), -1), values
        self.asked, self.box, self.bounds = asked, box, bounds

    def __len__(self) -> int:
        return min(self.asked, len(self._values))

    def value(self, point: Tensor) -> float:
        """The function's value at a point: known, or asked now."""
        for place in (self._points[: len(self), 0] == point[0]).nonzero()[:, 0]:
            if torch.equal(self._points[place], point):
                return float(self._values[place])
        value = self.box.ask(point)
        place = self.asked % len(self._values)
        self._points[place], self._values[place] = point, value
        self.asked += 1
        return value

    def ask_around(self, point: Tensor, radius: float, count: int, rng: Any) -> None:
        """Ask at points drawn from point + U(-radius, radius)^d."""
        for each in around(point, radius, count, self.bounds, rng):
            self.value(each)

    def ask_uncertain(self, surrogate: Any, point: Tensor, radius: float, candidates: int, most: int, rng: Any) -> None:
        """Ask where the surrogate's gradient is most uncertain, among candidates around a point; known ones are left out."""
        if not most:
            return
        drawn, before = around(point, radius, candidates, self.bounds, rng), self.asked
        for place in surrogate.uncertainty(drawn).argsort(descending=True, stable=True):
            if self.asked - before == most:
                break
            self.value(drawn[place])

    def nearest(self, point: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The points nearest to one, and their values; ties: the older first."""
        start = self.asked - len(self)
        order = torch.arange(start, self.asked) % len(self._values)  # oldest first
        distances = (self._points[order] - point).square().sum(dim=1)
        chosen = order[distances.argsort(stable=True)[:count]]
        return self._points[chosen], self._values[chosen]


def around(point: Tensor, radius: float, count: int, bounds: Bounds, rng: Any) -> Tensor:
    """Points [count, d] drawn from point + U(-radius, radius)^d, within the bounds."""
    return clipped(point + radius * torch.from_numpy(rng.uniform(-1, 1, (count, len(point)))), bounds)


def clipped(point: Tensor, bounds: Bounds) -> Tensor:
    return point if bounds is None else point.clamp(*bounds)
