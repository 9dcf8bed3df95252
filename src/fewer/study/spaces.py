"""What may be tuned: the ranges that an arm declares and a tuner draws from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LogUniform:
    """A positive number, drawn uniformly in its logarithm."""

    low: float
    high: float
    start: float | None = None

    @property
    def default(self) -> float:
        return math.sqrt(self.low * self.high) if self.start is None else self.start


@dataclass(frozen=True)
class Uniform:
    """A number, drawn uniformly."""

    low: float
    high: float
    start: float | None = None

    @property
    def default(self) -> float:
        return (self.low + self.high) / 2 if self.start is None else self.start


@dataclass(frozen=True)
class Choice:
    """One of a few values; the first is the default."""

    values: Sequence[Any]

    @property
    def default(self) -> Any:
        return self.values[0]


Space = LogUniform | Uniform | Choice
