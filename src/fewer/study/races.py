"""Races: our code against a named peer, side by side in one process, A B A B ..., told as the median ratio with its spread."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np

from fewer.errors import MissingExtra

PAIRS = 15
WARM_UP = 2
LONG_ENOUGH = 0.02  # seconds one timed block lasts at least


class RaceOutcome(msgspec.Struct, frozen=True):
    """How a race ended. The ratio is ours / peer (below 1: ours is faster, or needs less); None where it was left out."""

    name: str
    peer: str
    kind: Literal["time", "quantity"]
    reach: float | None  # the ratio that is asked for
    unit: str
    ratio: float | None = None
    low: float | None = None  # 10th percentile over the pairs
    high: float | None = None  # 90th percentile
    ours: float | None = None  # median seconds of a call, or the quantity
    theirs: float | None = None
    left_out: str = ""  # why: the peer is not installed

    @property
    def reached(self) -> bool | None:
        return None if self.reach is None or self.ratio is None else self.ratio <= self.reach


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
        """Run the races one after the other; one whose peer is not installed is left out, and says so."""
        for race in self.races:
            try:
                ours, theirs = race.make()
            except MissingExtra as missing:
                yield RaceOutcome(race.name, race.peer, race.kind, race.reach, race.unit, left_out=str(missing))
                continue
            if race.kind == "quantity":
                ratio = float(ours / theirs)
                yield RaceOutcome(race.name, race.peer, race.kind, race.reach, race.unit, ratio, ratio, ratio, float(ours), float(theirs))
                continue
            times = time_pairs(ours, theirs)
            low, middle, high = (float(value) for value in np.quantile(times[:, 0] / times[:, 1], [0.1, 0.5, 0.9]))
            ours_median, theirs_median = (float(median) for median in np.median(times, axis=0))
            yield RaceOutcome(race.name, race.peer, race.kind, race.reach, race.unit, middle, low, high, ours_median, theirs_median)
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


def ratio_of_pairs(ours: Callable[[], Any], theirs: Callable[[], Any], pairs: int = PAIRS) -> float:
    """The median of ours over theirs in time, taken in turn."""
    times = time_pairs(ours, theirs, pairs)
    return float(np.median(times[:, 0] / times[:, 1]))
