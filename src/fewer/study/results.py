"""Figures of all arms and seeds, and what a claim may ask of them: means, ratios, differences, areas, thresholds, each with its spread."""

from __future__ import annotations

import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from fewer.errors import UserError
from fewer.papers import did_you_mean
from fewer.quantities import show

Coordinates = tuple[tuple[str, Any], ...]
OPERATORS: dict[str, Callable[[float, float], bool]] = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
Outcome = Literal["holds", "fails", "undecided"]
RESAMPLES, CONFIDENCE = 2000, 0.95


class NotTestable(Exception):
    """Raised by a claim, or by the results it asks, when it cannot be tested here; the message is the reason."""


class Row(NamedTuple):
    """One figure of one trial at its coordinates."""

    arm: str
    seed: int
    figure: str
    coordinates: dict[str, Any]
    value: float


@dataclass(frozen=True)
class Comparison:
    """An estimate held against a bound."""

    estimate: Estimate
    op: Literal[">=", "<=", ">", "<"]
    bound: float

    @property
    def outcome(self) -> Outcome:
        """What the interval over seeds says, not the point: the whole of it meets the bound, none of it does, or it reaches both sides."""
        met = {OPERATORS[self.op](end, self.bound) for end in (self.estimate.low, self.estimate.value, self.estimate.high)}
        return "undecided" if len(met) == 2 else "holds" if met == {True} else "fails"

    def __bool__(self) -> bool:
        return self.outcome == "holds"

    def __and__(self, other: Comparison | All) -> All:
        return All((self,)) & other


@dataclass(frozen=True)
class All:
    """Comparisons that must all hold."""

    parts: tuple[Comparison, ...]

    @property
    def outcome(self) -> Outcome:
        """The worst of the parts': one that fails is enough to fail."""
        outcomes = {part.outcome for part in self.parts}
        return next(each for each in ("fails", "undecided", "holds") if each in outcomes)

    def __bool__(self) -> bool:
        return self.outcome == "holds"

    def __and__(self, other: Comparison | All) -> All:
        return All(self.parts + (other.parts if isinstance(other, All) else (other,)))


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number estimated over seeds: its value, the 95 % bootstrap interval, and what it is in words."""

    value: float
    low: float
    high: float
    per_seed: np.ndarray = field(repr=False)
    what: str = ""

    def __ge__(self, bound: float) -> Comparison:
        return Comparison(self, ">=", float(bound))

    def __le__(self, bound: float) -> Comparison:
        return Comparison(self, "<=", float(bound))

    def __gt__(self, bound: float) -> Comparison:
        return Comparison(self, ">", float(bound))

    def __lt__(self, bound: float) -> Comparison:
        return Comparison(self, "<", float(bound))

    def between(self, low: float, high: float) -> All:
        """Both bounds, each as a comparison of its own."""
        return All((self >= low, self <= high))

    def __float__(self) -> float:
        return self.value


def bootstrap(statistic: Callable[..., Any], *samples: np.ndarray, what: str = "") -> Estimate:
    """`statistic` of the samples' means, with the percentile interval over seeds drawn with replacement, paired across the samples.

    >>> estimate = bootstrap(lambda a, b: a / b, np.array([2.0, 4.0]), np.array([1.0, 2.0]))
    >>> estimate.value, estimate.low, estimate.high
    (2.0, 2.0, 2.0)
    """
    seeds = len(samples[0])
    draws = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*(sample.mean() for sample in samples)))
        resampled = np.asarray(statistic(*(sample[draws].mean(axis=1) for sample in samples)), dtype=float)
        per_seed = np.asarray(statistic(*samples), dtype=float)
    tail = (1 - CONFIDENCE) / 2
    if np.isfinite(resampled).all():
        low, high = np.quantile(resampled, [tail, 1 - tail])
    elif not np.isnan(resampled).any():  # some seeds never got there: the interval reaches from those that did to infinity
        low, high = np.quantile(resampled, tail, method="lower"), np.quantile(resampled, 1 - tail, method="higher")
    else:
        low, high = (value, value)
    return Estimate(value, float(low), float(high), per_seed, what)


class Results:
    """The figures of one run of a study.

    Args:
        rows: the figures of the finished trials.
        arms: every arm that the study declares.
        unfinished: arm -> why figures of it are missing ("was not run", "seed 1 timed out", ...).
        units: figure -> the unit that `say` tells it in.
        names: figure or arm -> what estimates call it; where given, the others are told without underscores.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        arms: Sequence[str],
        unfinished: dict[str, str] | None = None,
        units: Mapping[str, str] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.rows = list(rows)
        self.arms = list(arms)
        self.unfinished = dict(unfinished or {})
        self.units = dict(units or {})
        self.names = dict(names or {})
        self._values: dict[tuple[str, str], dict[Coordinates, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for row in self.rows:
            self._values[row.figure, row.arm][coordinates_key(row.coordinates)][row.seed] = row.value

    @property
    def figures(self) -> list[str]:
        """The names of all figures, in the order in which they first came."""
        return list(dict.fromkeys(row.figure for row in self.rows))

    def has(self, figure: str, arm: str) -> bool:
        return (figure, arm) in self._values

    def curve(self, figure: str, arm: str) -> dict[Coordinates, dict[int, float]]:
        """Every coordinate at which the arm logged the figure, with the value of each seed (NaN included)."""
        if arm not in self.arms:
            raise UserError(
                f"a claim names the arm {arm!r}, which the study does not have{did_you_mean(arm, self.arms)} (known: {', '.join(self.arms)})"
            )
        if not self.has(figure, arm):
            if arm in self.unfinished:
                raise NotTestable(f"{arm} {self.unfinished[arm]}")
            if not self.rows:
                raise NotTestable("no trial finished")
            near = did_you_mean(figure, self.figures)
            raise UserError(f"a claim names the figure {figure!r}, which {arm} does not log{near} (known: {', '.join(self.figures)})")
        return self._values[figure, arm]

    def values(self, figure: str, arm: str, **coordinates: Any) -> np.ndarray:
        """The figure's values, by seed; NotTestable where one is missing or NaN."""
        curve = self.curve(figure, arm)
        key = coordinates_key(coordinates)
        if key not in curve:
            known = "; ".join(", ".join(f"{name}={value}" for name, value in point) or "none" for point in list(curve)[:8])
            raise NotTestable(f"{arm} has no {figure} at {dict(key) or 'no coordinates'} (it has some at: {known})")
        by_seed = curve[key]
        for seed, value in by_seed.items():
            if math.isnan(value):
                raise NotTestable(f"{figure} of {arm} is NaN for seed {seed}")
        return np.array([by_seed[seed] for seed in sorted(by_seed)])

    def _paired(self, figure: str, arm: str, other: str, coordinates: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Both arms' values for the seeds that both have."""
        for name in (arm, other):
            self.values(figure, name, **coordinates)  # missing and NaN are told here
        key = coordinates_key(coordinates)
        mine, theirs = self.curve(figure, arm)[key], self.curve(figure, other)[key]
        seeds = sorted(mine.keys() & theirs.keys())
        if not seeds:
            raise NotTestable(f"{arm} and {other} have no seed in common")
        return np.array([mine[seed] for seed in seeds]), np.array([theirs[seed] for seed in seeds])

    def _named(self, name: str, coordinates: Mapping[str, Any] | None = None) -> str:
        """A figure or an arm in words, with the coordinates at which it is asked for."""
        word = self.names.get(name, re.sub("[._]", " ", name) if self.names else name)
        places = ", ".join(f"{axis.replace('_', ' ')} {value}" for axis, value in (coordinates or {}).items())
        return f"{word} ({places})" if places else word

    def mean(self, figure: str, arm: str, **coordinates: Any) -> Estimate:
        """The mean over seeds."""
        return bootstrap(
            lambda a: a, self.values(figure, arm, **coordinates), what=f"{self._named(figure, coordinates)} of {self._named(arm)}"
        )

    def ratio(self, figure: str, arm: str, other: str, **coordinates: Any) -> Estimate:
        """The mean of `arm` over the mean of `other`, paired by seed."""
        return bootstrap(
            lambda a, b: a / b,
            *self._paired(figure, arm, other, coordinates),
            what=f"{self._named(figure, coordinates)}, {self._named(arm)} / {self._named(other)}",
        )

    def difference(self, figure: str, arm: str, other: str, **coordinates: Any) -> Estimate:
        """The mean of `arm` minus the mean of `other`, paired by seed."""
        return bootstrap(
            lambda a, b: a - b,
            *self._paired(figure, arm, other, coordinates),
            what=f"{self._named(figure, coordinates)}, {self._named(arm)} - {self._named(other)}",
        )

    def no_worse(
        self, figure: str, arm: str, other: str, by: float, *, better: Literal["higher", "lower"] = "higher", **coordinates: Any
    ) -> Comparison:
        """Whether `arm` is at most `by` worse than `other`: a stated number, never a spread of the arms' own."""
        difference = self.difference(figure, arm, other, **coordinates)
        return difference >= -by if better == "higher" else difference <= by

    def best(self, figure: str, arms: Sequence[str] = (), *, better: Literal["higher", "lower"] = "higher", **coordinates: Any) -> str:
        """The arm of the best mean, of those named or of all that log the figure."""
        pick = max if better == "higher" else min
        return pick(
            arms or [arm for arm in self.arms if self.has(figure, arm)], key=lambda arm: self.mean(figure, arm, **coordinates).value
        )

    def spread(self, figure: str, arm: str, **coordinates: Any) -> float:
        """The range of the values over seeds."""
        return float(np.ptp(self.values(figure, arm, **coordinates)))

    def say(self, figure: str, arm: str, beside: str = "", unit: str | None = None, **coordinates: Any) -> str:
        """A figure's mean in words and its unit ("85.3 %"); `beside` another arm, its multiple of that one's ("0.77x")."""
        if beside:
            return f"{self.ratio(figure, arm, beside, **coordinates).value:.2g}x"
        return show(self.mean(figure, arm, **coordinates).value, self.units.get(figure, "") if unit is None else unit)

    def points(self, figure: str, arm: str, over: str, at: Mapping[str, Any]) -> dict[Coordinates, dict[int, float]]:
        """Those coordinates of a curve that have `over` and agree with `at`, sorted by `over`, with the value of each seed."""
        chosen = {
            key: by_seed
            for key, by_seed in self.curve(figure, arm).items()
            if over in dict(key) and all(dict(key).get(name) == value for name, value in at.items())
        }
        return dict(sorted(chosen.items(), key=lambda point: dict(point[0])[over]))

    def _over(self, figure: str, arm: str, over: str, at: Mapping[str, Any]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """seed -> (coordinate, value), sorted by the coordinate."""
        points: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for key, by_seed in self.points(figure, arm, over, at).items():
            for seed, value in by_seed.items():
                points[seed].append((float(dict(key)[over]), value))
        if not points:
            where = "".join(f" at {name}={value}" for name, value in at.items())
            raise NotTestable(f"{arm} logs no {figure} over {over}{where}")
        arrays = {seed: np.array(sorted(pairs)).T for seed, pairs in sorted(points.items())}
        for seed, (_, values) in arrays.items():
            if np.isnan(values).any():
                raise NotTestable(f"{figure} of {arm} is NaN for seed {seed}")
        return {seed: (x, y) for seed, (x, y) in arrays.items()}

    def area(self, figure: str, arm: str, *, over: str, **at: Any) -> Estimate:
        """The mean height of the figure's curve over a coordinate (trapezoids, divided by the coordinate's range)."""
        heights = [np.trapezoid(y, x) / (x[-1] - x[0]) if len(x) > 1 else y[0] for x, y in self._over(figure, arm, over, at).values()]
        return bootstrap(lambda a: a, np.array(heights), what=f"mean {self._named(figure, at)} of {self._named(arm)} over {over}")

    def threshold(
        self, figure: str, arm: str, *, over: str, reach: float | str, better: Literal["higher", "lower"] = "higher", **at: Any
    ) -> Estimate:
        """The first coordinate at which the figure reaches a value, or infinity.

        Args:
            reach: the value, or another arm, whose last value of the figure, of the same seed, is to be reached.
        """
        met = OPERATORS[">=" if better == "higher" else "<="]
        curves = self._over(figure, arm, over, at)
        if isinstance(reach, str):
            bars = {seed: float(y[-1]) for seed, (_, y) in self._over(figure, reach, over, at).items() if seed in curves}
            if not bars:
                raise NotTestable(f"{arm} and {reach} have no seed in common")
        else:
            bars = dict.fromkeys(curves, reach)
        first = [next((x for x, y in zip(*curves[seed], strict=True) if met(y, bar)), math.inf) for seed, bar in bars.items()]
        told = f"{self._named(reach)}'s last" if isinstance(reach, str) else f"{reach:g}"
        return bootstrap(
            lambda a: a,
            np.array(first, dtype=float),
            what=f"{over} at which {self._named(figure, at)} of {self._named(arm)} reaches {told}",
        )


def coordinates_key(coordinates: dict[str, Any]) -> Coordinates:
    """Coordinates as a key, whatever their order."""
    return tuple(sorted(coordinates.items()))
