"""Races: our code against a named peer, side by side in one process, A B A B ..., told as the median ratio with its spread."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np

PAIRS = 15
WARM_UP = 2
LONG_ENOUGH = 0.02  # seconds one timed block lasts at least


class RaceOutcome(msgspec.Struct, frozen=True):
    """How a race ended. The ratio is ours / peer (below 1: ours is faster, or needs less)."""

    name: str
    peer: str
    kind: Literal["time", "quantity"]
    ratio: float
    low: float  # 10th percentile over the pairs
    high: float  # 90th percentile
    reach: float | None  # the ratio that the specification asks for
    ours: float  # median seconds of a call, or the quantity
    theirs: float
    unit: str

    @property
    def reached(self) -> bool | None:
        return None if self.reach is None else self.ratio <= self.reach


@dataclass(frozen=True)
class Race:
    """A race's declaration."""

    name: str
    peer: str
    kind: Literal["time", "quantity"]
    reach: float | None
    unit: str
    make: Callable[[], tuple[Any, Any]]


@dataclass
class Bench:
    """The races of a method.

    Examples:
        >>> bench = Bench("sums")
        >>> @bench.race("a sum of a thousand numbers", peer="a Python loop", reach=1.0)
        ... def sums():
        ...     numbers = list(range(1000))
        ...     return lambda: sum(numbers), lambda: [number for number in numbers]
        >>> [race.name for race in bench.races]
        ['a sum of a thousand numbers']
    """

    slug: str
    races: list[Race] = field(default_factory=list)

    def race(
        self, name: str, *, peer: str, reach: float | None = None
    ) -> Callable[[Callable[[], tuple[Any, Any]]], Callable[[], tuple[Any, Any]]]:
        """Declare a race against time: the function makes (ours, peer's), two callables without arguments that do the same work."""
        return self._declare(name, peer, "time", reach, "s")

    def quantity(self, name: str, *, peer: str, unit: str, reach: float | None = None) -> Callable[[Callable[[], tuple[Any, Any]]], Any]:
        """Declare a comparison of something counted: the function returns (ours, peer's), two numbers."""
        return self._declare(name, peer, "quantity", reach, unit)

    def _declare(self, name: str, peer: str, kind: Literal["time", "quantity"], reach: float | None, unit: str) -> Callable[[Any], Any]:
        def declare(make: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
            self.races.append(Race(name, peer, kind, reach, unit, make))
            return make

        return declare

    def run(self) -> Iterator[RaceOutcome]:
        """Run the races one after the other."""
        for race in self.races:
            ours, theirs = race.make()
            if race.kind == "quantity":
                yield RaceOutcome(
                    race.name, race.peer, race.kind, ours / theirs, ours / theirs, ours / theirs, race.reach, ours, theirs, race.unit
                )
                continue
            times = time_pairs(ours, theirs)
            ratios = times[:, 0] / times[:, 1]
            low, middle, high = (float(value) for value in np.quantile(ratios, [0.1, 0.5, 0.9]))
            medians = np.median(times, axis=0)
            yield RaceOutcome(
                race.name, race.peer, race.kind, middle, low, high, race.reach, float(medians[0]), float(medians[1]), race.unit
            )
            del ours, theirs
            gc.collect()


def time_pairs(ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int = PAIRS) -> np.ndarray:
    """Seconds per call [pairs, 2] of two callables timed in turn, after warm-up; short ones are called often enough to be timed well."""
    import torch
    from torch.utils.benchmark import Timer

    timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in (ours, theirs)]
    numbers = []
    for timer in timers:
        timer.timeit(WARM_UP)
        once = timer.timeit(1).mean
        numbers.append(max(1, round(LONG_ENOUGH / max(once, 1e-9))))
    return np.array([[timer.timeit(number).mean for timer, number in zip(timers, numbers, strict=True)] for _ in range(pairs)])
