"""`record.json`: the last recorded run of a method's study and bench, made by `fewer record` on a clean commit and by nothing else."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from fewer.errors import UserError
from fewer.files import whole_file
from fewer.plain import plain_all
from fewer.study.environment import commit
from fewer.study.figures import Bars, Chart, Figure, Tradeoff
from fewer.study.races import RaceOutcome
from fewer.study.results import Results, Row
from fewer.study.runner import Outcome
from fewer.study.verdicts import Verdict

SIGNIFICANT = 6  # digits kept of each figure
ROW = 140  # characters of a line of the file, where a row fits


class ArmRecord(msgspec.Struct, frozen=True):
    """An arm as a record knows it."""

    label: str
    against: str | None  # the arm it is held against
    settings: dict[str, Any]
    notes: dict[str, str]  # "settings": where they come from; "energy": how joules were had; ...


class Record(msgspec.Struct, frozen=True):
    """A run of a study with its results: enough to show it without importing the study or running anything."""

    slug: str
    question: str
    date: str
    commit: str
    seconds: float  # the study's duration, all trials
    environment: dict[str, Any]
    scale: str
    seeds: int
    options: dict[str, Any]
    arms: dict[str, ArmRecord]
    summary: str
    claims: list[Verdict]
    races: list[RaceOutcome]
    failed: dict[str, str]  # "arm, seed N" -> what went wrong
    shown: list[Figure]
    charts: list[Chart]
    figures: dict[
        str, dict[str, list[tuple[dict[str, Any], list[float | None]]]]
    ]  # figure -> arm -> (coordinates, values by seed; None is NaN)
    pictures: dict[str, dict[str, bytes]] = {}  # name -> arm -> a PNG of the first seed

    def results(self) -> Results:
        """The figures as `Results`."""
        rows = [
            Row(arm, seed, figure, coordinates, float("nan") if value is None else value)
            for figure, by_arm in self.figures.items()
            for arm, points in by_arm.items()
            for coordinates, values in points
            for seed, value in enumerate(values)
        ]
        return Results(rows, list(self.arms), units={figure.name: figure.unit for figure in self.shown})


def clean_commit(folder: Path) -> str:
    """The commit of the checkout in which a method's folder stands; UserError where none tracks it, or its tree differs from it."""
    here = commit(folder)
    if not here:
        raise UserError(
            f"fewer record writes figures of a commit, and {folder} is tracked by none; clone the project and install it with `pip install -e .`"
        )
    if here.endswith("+"):
        raise UserError("fewer record writes figures of a commit, and the tree differs from it; commit or stash the changes first")
    return here


def make_record(outcome: Outcome, races: Sequence[RaceOutcome] = ()) -> Record:
    """A record of a run and its races."""
    plan = outcome.plan
    return Record(
        slug=plan.study.slug,
        question=plan.study.question,
        date=datetime.date.today().isoformat(),
        commit=outcome.environment["commit"],
        seconds=round(outcome.seconds, 1),
        environment=outcome.environment,
        scale=plan.scale.value,
        seeds=len({spec.seed for spec in plan.specs}),
        options=plan.options,
        arms={
            spec.arm: ArmRecord(
                plan.study.arms[spec.arm].label, plan.study.arms[spec.arm].against, spec.settings, outcome.notes.get(spec.arm, {})
            )
            for spec in plan.specs
        },
        summary=outcome.summary,
        claims=outcome.verdicts,
        races=list(races),
        failed={trial: why.splitlines()[0].split("Traceback")[0] + why.splitlines()[-1] for trial, why in outcome.failed.items()},
        shown=list(plan.study.figures),
        charts=[each for each in plan.study.charts if _has_figures(each, outcome.results)],
        figures=_figures(outcome.results),
        pictures=outcome.pictures,
    )


def _has_figures(chart: Chart, results: Results) -> bool:
    """Whether an arm logged one of the figures that a chart draws (a scale, or a part of a study, may have none of them)."""
    match chart:
        case Bars(figures=names):
            drawn = set(names)
        case Tradeoff(quality=quality, cost=cost):
            drawn = {quality, cost}
        case _:
            drawn = {chart.figure}
    return bool(drawn & set(results.figures))


def _figures(results: Results) -> dict[str, dict[str, list[tuple[dict[str, Any], list[float | None]]]]]:
    """figure -> arm -> points, values in the order of the seeds and rounded to six digits."""
    figures: dict[str, dict[str, list[tuple[dict[str, Any], list[float | None]]]]] = {}
    for figure in results.figures:
        for arm in results.arms:
            if results.has(figure, arm):
                points = results.curve(figure, arm).items()
                figures.setdefault(figure, {})[arm] = [
                    (dict(key), [_rounded(by_seed[seed]) for seed in sorted(by_seed)]) for key, by_seed in points
                ]
    return figures


def _rounded(value: float) -> float | None:
    return None if value != value else float(f"{value:.{SIGNIFICANT}g}")


def write_record(record: Record, folder: Path) -> Path:
    """Write `record.json` into a method's folder, whole or not at all."""
    file = folder / "record.json"
    plain_data = msgspec.json.decode(msgspec.json.encode(record))
    with whole_file(file, overwrite=True) as part:
        part.write_text(_line_a_row(plain_data) + "\n", encoding="utf8")
    return file


def _line_a_row(value: Any, depth: int = 0) -> str:
    """JSON in which what fits on a line, a row of figures say, stays on it."""
    short = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(short) + depth <= ROW:
        return short
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(value, dict):
        rows = [f"{json.dumps(name, ensure_ascii=False)}: {_line_a_row(each, depth + 1)}" for name, each in value.items()]
        return "{" + inner + f",{inner}".join(rows) + outer + "}"
    return "[" + inner + f",{inner}".join(_line_a_row(each, depth + 1) for each in value) + outer + "]"


def read_record(folder: Path) -> Record | None:
    """The record in a method's folder, or None; UserError where it cannot be read."""
    file = folder / "record.json"
    if not file.exists():
        return None
    try:
        return msgspec.convert(plain_all(msgspec.json.decode(file.read_bytes())), Record)
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(f"{file}: not a record of this version ({error}); make it again with `fewer record`") from error
