"""The answer: methods of one job side by side, the Pareto front, and which to take."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fewer.advice import COSTS_OF, Advice
from fewer.advise.reading import Point, points
from fewer.advise.things import Thing
from fewer.advise.trying import Tried
from fewer.papers import Card
from fewer.quantities import on_front, show
from fewer.study.results import Row
from fewer.study.store import Store


class Line(msgspec.Struct, frozen=True):
    """A line of the table.

    Attributes:
        arm: in words.
        beside: what it is held against, in words.
        replaced: it is what a method replaces, and no method.
        left: of the costs that matter, a ratio; the lower, the better.
        keeps: the quality lost is at most what may be, in every seed.
        whole: all costs are measured that are measured of any line of the same method; others are neither picked nor on the front.
        front: no other line of the group loses less at as little cost.
        command: that applies it for good.
    """

    slug: str
    arm: str
    beside: str
    replaced: bool
    point: Point
    left: float
    keeps: bool
    whole: bool = True
    front: bool = False
    command: str = ""


class Group(msgspec.Struct, frozen=True):
    """Lines that can be compared: of one job, judged by one measure."""

    job: str
    measure: str
    lines: list[Line]


class Answer(msgspec.Struct, frozen=True):
    """What `fewer advise` says."""

    thing: str
    about: str
    saves: list[str]
    keep: float
    groups: list[Group]
    pick: str  # the slug of the first pick, or ""
    sentence: str
    command: str
    refused: dict[str, str]  # applies and cannot be tried here
    unfitting: dict[str, str]  # did not fit into the time
    left_out: dict[str, str]  # does not apply
    combined: list[Any] = []  # of `combining.Combined`


def answer(
    thing: Thing, tried: Tried, store: Store, *, saves: Sequence[str], keep: float, beside: dict[str, str], left_out: dict[str, str]
) -> Answer:
    """Read what the store holds of the methods that were tried, and lay it side by side."""
    grouped: dict[tuple[str, str], list[Line]] = {}
    for each, study, plan in tried.plans.values():
        rows: list[Row] = store.rows(plan.specs)
        labels = {name: arm.label for name, arm in study.arms.items()}
        for point in points(each.slug, each.advice, rows, study.figures, labels):
            line = _line(point, each.card, each.advice, labels, thing, beside, saves, keep)
            grouped.setdefault((each.advice.job, each.advice.measure), []).append(line)
    groups = [Group(job, measure, _sorted(lines)) for (job, measure), lines in grouped.items()]
    groups.sort(key=lambda group: min((line.left for line in group.lines if pays(line)), default=math.inf))
    pick = next((line for group in groups for line in group.lines if pays(line)), None)
    group = next((group for group in groups if pick in group.lines), None)
    return Answer(
        thing=thing.given,
        about=thing.about,
        saves=list(saves),
        keep=keep,
        groups=groups,
        pick=pick.slug if pick else "",
        sentence=_sentence(pick, group, keep, bool(groups)),
        command=pick.command if pick else "",
        refused=tried.refused,
        unfitting=tried.unfitting,
        left_out=left_out,
    )


def _line(
    point: Point,
    card: Card,
    advice: Advice,
    labels: dict[str, str],
    thing: Thing,
    beside: dict[str, str],
    saves: Sequence[str],
    keep: float,
) -> Line:
    at = f" at {advice.over} {advice.as_it_is_at}" if advice.as_it_is_at is not None and advice.over in advice.costs.values() else ""
    return Line(
        slug=point.slug,
        arm=point.label,
        beside=labels.get(advice.as_it_is, advice.as_it_is) + at,
        replaced=point.arm != advice.method,
        point=point,
        left=left_of(point, card, saves),
        keeps=point.lost is not None and point.lost.high <= keep,
        command=command_of(advice, thing, beside, point.choice) if point.arm == advice.method else "",
    )


def left_of(point: Point, card: Card, saves: Sequence[str]) -> float:
    """What is left of what is to be saved: the geometric mean over the words that were asked for, or over all that the card says it saves."""
    left = {word: _least(point, COSTS_OF.get(word, ())) for word in (saves or card.saves)}
    known = [value for value in left.values() if value is not None]
    return math.prod(known) ** (1 / len(known)) if known else 1.0


def _least(point: Point, costs: Sequence[str]) -> float | None:
    return next((point.costs[name].mean for name in costs if name in point.costs), None)


def gain(recorded: Sequence[Point], card: Card, advice: Advice, saves: Sequence[str], keep: float) -> float:
    """What is left at the best recorded choice of a method that keeps the quality; 1 where none does."""
    keeping = [point for point in recorded if point.arm == advice.method and point.lost is not None and point.lost.mean <= keep]
    return min((left_of(point, card, saves) for point in keeping), default=1.0)


def pays(line: Line) -> bool:
    """It is a method, keeps the quality and saves something, and nothing of that is unknown."""
    return line.keeps and line.whole and line.left < 1 and not line.replaced


def _sorted(lines: Sequence[Line]) -> list[Line]:
    """What keeps the quality first, by what is left; then the others, by what they lose."""
    measured: dict[str, set[str]] = {}
    for line in lines:
        measured.setdefault(line.slug, set()).update(line.point.costs)
    lines = [msgspec.structs.replace(line, whole=set(line.point.costs) == measured[line.slug]) for line in lines]
    fronted = [msgspec.structs.replace(line, front=_in_front(line, lines)) for line in lines]

    def key(line: Line) -> tuple[bool, float]:
        return (not line.keeps, line.left if line.keeps else line.point.lost.mean if line.point.lost else math.inf)

    return sorted(fronted, key=key)


def _in_front(line: Line, others: Sequence[Line]) -> bool:
    """No other line, nor the thing as it is, is at least as good in both and better in one."""
    if line.point.lost is None or not line.whole:
        return False
    mine = (line.point.lost.mean, line.left)
    rivals = [(0.0, 1.0), *((other.point.lost.mean, other.left) for other in others if other.point.lost is not None and other.whole)]
    return on_front(mine, rivals)


def in_words_of(choice: Mapping[str, Any]) -> str:
    """ "removed 0.3"."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in choice.items())


def command_of(advice: Advice, thing: Thing, beside: dict[str, str], choice: dict[str, Any], out: str = "OUT") -> str:
    """The command that applies a method for good, with the user's own words in place."""
    words = {"thing": shlex.quote(thing.given), "out": out}
    words |= {name: shlex.quote(beside[name]) if name in beside else f"YOUR-{name.upper()}" for name in ("text", "data")}
    return advice.apply.format(**words, **{name: advice.words.get(str(value), value) for name, value in choice.items()})


def _sentence(pick: Line | None, group: Group | None, keep: float, any_tried: bool) -> str:
    if pick is None or group is None:
        if not any_tried:
            return "Nothing was tried to the end, so nothing is advised."
        return f"None pays: nothing that was tried saves anything and loses at most {show(keep, '%')} of the quality. Keep it as it is."
    lost = pick.point.lost
    assert lost is not None
    what = ", ".join(filter(None, [pick.arm, in_words_of(pick.point.choice)]))
    how = f"loses {show(lost.mean, '%')}" if lost.mean > 0 else f"gains {show(-lost.mean, '%')}" if lost.mean < 0 else "loses nothing"
    costs = ", ".join(f"{spread.mean:.2g} times the {in_words(name)}" for name, spread in pick.point.costs.items())
    seeds = f"{lost.seeds} seeds" if lost.seeds > 1 else "one seed"
    return (
        f"For {group.job}, take {pick.slug} ({what}): judged by {group.measure}, it {how}, and it needs {costs}, beside "
        f"{pick.beside} ({seeds})."
    )


def in_words(cost: str) -> str:
    return {"cpu_seconds": "processor time", "seconds": "time", "flops": "operations", "peak_memory": "peak memory"}.get(
        cost, cost.replace("_", " ")
    )
