"""What trials of a study say of a method beside the thing as it is: quality lost, and what is left of each cost, each seed held against its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from fewer.advice import COSTS, Advice
from fewer.study.figures import Figure
from fewer.study.results import Row

BySeed = dict[int, float]


class Spread(msgspec.Struct, frozen=True):
    """A mean over seeds with its lowest and highest."""

    mean: float
    low: float
    high: float
    seeds: int


class Point(msgspec.Struct, frozen=True):
    """A method, or what it replaces, at one choice.

    Attributes:
        lost: the share of the quality as it is that is lost, negative where it is gained; None where one of the two was not measured.
            Where the quality as it is is 0 (an error of none), the difference itself.
        costs: common cost -> what is left of it, a ratio to the thing as it is.
    """

    slug: str
    arm: str
    label: str
    choice: dict[str, Any]
    lost: Spread | None
    costs: dict[str, Spread]


class Incomparable(ValueError):
    """Figures that cannot be laid beside others'; the message says why."""


def points(slug: str, advice: Advice, rows: Iterable[Row], figures: Sequence[Figure], labels: Mapping[str, str]) -> list[Point]:
    """A point for each choice at which the method, or what it replaces, was measured.

    Raises:
        Incomparable: the study tells a figure in another unit than the common one, or not which way its quality is better.
    """
    check_figures(advice, figures)
    better = next(figure.better for figure in figures if figure.name == advice.quality)
    sign = 1.0 if better == "lower" else -1.0
    read = _Reader(advice, list(rows))
    found = []
    for arm in dict.fromkeys(each for each in (advice.method, advice.replaces) if each):
        for choice in read.choices(arm):
            before = read.reference(advice.quality, choice)
            lost = _over_seeds(read.values(advice.quality, arm, choice), before, lambda q, q0: sign * (q - q0) / (abs(q0) or 1.0))
            costs = {}
            for common, logged in advice.costs.items():
                left = _over_seeds(
                    read.values(logged, arm, choice), read.reference(logged, choice), lambda c, c0: c / c0 if c0 else math.nan
                )
                if left is not None:
                    costs[common] = left
            if lost is not None or costs:
                named = {advice.over: choice} if advice.over else {}
                found.append(Point(slug, arm, labels.get(arm, arm), named, lost, costs))
    return found


def check_figures(advice: Advice, figures: Sequence[Figure]) -> None:
    """Incomparable where a figure that the card names has another unit than the common one, or is not declared."""
    units: dict[str, set[str]] = {}
    for figure in figures:
        units.setdefault(figure.name, set()).add(figure.unit)
    better = {figure.better for figure in figures if figure.name == advice.quality}
    if better not in ({"lower"}, {"higher"}):
        raise Incomparable(f"its study does not say which way {advice.quality!r} is better")
    for common, logged in advice.costs.items():
        if logged != advice.over and COSTS[common] not in units.get(logged, set()):
            told = ", ".join(repr(unit) for unit in sorted(units.get(logged, set()))) or "not at all"
            raise Incomparable(f"its study tells {logged!r} in {told}, and {common} is compared in {COSTS[common]!r}")


class _Reader:
    """Rows of a study, read as a card says."""

    def __init__(self, advice: Advice, rows: list[Row]) -> None:
        self.advice, self.rows = advice, rows

    def choices(self, arm: str) -> list[Any]:
        """The values of `over` at which an arm's quality was logged; one that is None where there is no `over`."""
        over = self.advice.over
        at = [row.coordinates for row in self.rows if row.arm == arm and row.figure == self.advice.quality]
        found = {
            each[over] if over else None
            for each in at
            if all(each.get(k) == v for k, v in self.advice.at.items()) and (not over or over in each)
        }
        return sorted(found, key=lambda each: (isinstance(each, str), each)) if over else [None] if found else []

    def values(self, logged: str, arm: str, choice: Any) -> BySeed:
        """seed -> value at `at` and the choice; a figure that is logged without the one or the other counts for all of it."""
        if logged == self.advice.over:
            return {row.seed: float(choice) for row in self.rows if row.arm == arm}
        wanted = self.advice.at | ({self.advice.over: choice} if self.advice.over else {})
        named = [row for row in self.rows if row.arm == arm and row.figure == logged and math.isfinite(row.value)]
        return {row.seed: row.value for row in named if all(wanted.get(name) == value for name, value in row.coordinates.items())}

    def reference(self, logged: str, choice: Any) -> BySeed:
        at = self.advice.as_it_is_at
        return self.values(logged, self.advice.as_it_is, choice if at is None else at)


def _over_seeds(ours: BySeed, theirs: BySeed, of: Callable[[float, float], float]) -> Spread | None:
    """Seed by seed; an arm that has no seed of its own (the same with each) is read at its first."""
    if not ours or not theirs:
        return None
    found = [of(value, theirs.get(seed, next(iter(theirs.values())))) for seed, value in ours.items()]
    found = [value for value in found if math.isfinite(value)]
    return Spread(sum(found) / len(found), min(found), max(found), len(found)) if found else None
