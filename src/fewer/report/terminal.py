"""Terminal views of cards and records, by rich."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fewer.doctor import Finding
from fewer.papers import BRIEF, Card
from fewer.quantities import show
from fewer.study.figures import Curve, Figure
from fewer.study.races import RaceOutcome
from fewer.study.recording import Record
from fewer.study.results import Results, coordinates_key
from fewer.study.settings import RecordedTuning
from fewer.study.verdicts import Verdict

BLOCKS = "▁▂▃▄▅▆▇█"
MARKS = {
    "holds": ("✓ holds", "green"),
    "fails": ("✗ fails", "red"),
    "undecided": ("~ undecided", "yellow"),
    "not testable here": ("? not testable here", "yellow"),
}
SPARK_WIDTH = 24
WIDE = 120  # characters of a terminal that has room for everything
ARM_WIDTH, FIGURE_WIDTH = 28, 18  # characters that a results table gives its arms and each of its figures


def plain_table(title: str = "", **kwargs: Any) -> Table:
    return Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False, **kwargs)


@dataclass(frozen=True)
class CardsTable:
    """The methods, a line each, under their areas; what they save is left out where the terminal is narrow."""

    cards: Sequence[Card]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= WIDE
        table = Table(box=None, pad_edge=False, show_header=False)
        slugs = max(max(len(f"  {card.slug}"), len(card.area)) for card in self.cards)
        counts = max(len(verdict_counts(card)) for card in self.cards)
        line = min(BRIEF, options.max_width - slugs - counts - 4)  # the one that gives way where it is narrow
        for width in (slugs, line, *([options.max_width - slugs - line - counts - 6] if wide else []), counts):
            table.add_column(no_wrap=True, overflow="ellipsis", width=width)
        area = None
        for card in self.cards:
            if card.area != area:
                area = card.area
                table.add_row(Text(area.replace("_", " "), style="bold"))
            saves = [Text(", ".join(card.saves), style="dim")] if wide else []
            table.add_row(Text(f"  {card.slug}"), Text(card.line), *saves, Text(verdict_counts(card)))
        yield table
        yield Text("claims here: ✓ hold, ✗ fail, ~ undecided, ? not testable; `fewer show METHOD` says more", style="dim")


def verdict_counts(card: Card) -> str:
    """ "3✓ 2✗ 1?"; "-" where nothing is recorded yet."""
    return " ".join(f"{count}{MARKS[verdict][0][0]}" for verdict, count in card.verdicts.items() if count) or "-"


def card_view(card: Card) -> RenderableType:
    """A method's whole card, with the verdicts of its record."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in (
        ("what it does for you", card.summary),
        ("when not", card.when_not),
        ("what it costs", card.costs),
        ("replaces", card.replaces),
        ("saves", ", ".join(card.saves)),
        ("applies to", "; ".join(card.applies_to)),
        ("works with", "; ".join(card.works_with)),
        ("needs", card.needs),
        ("peers", ", ".join(card.peers)),
        ("paper", f"{card.title} ({', '.join(card.authors)}, {card.venue or card.year})"),
        ("arXiv", ", ".join(card.arxiv)),
        ("authors' code", f"{card.code} ({card.code_license or 'no licence stated'})" if card.code else ""),
        ("in Python", f"import {card.package}"),
        ("install", f"pip install 'fewer[{card.extra}]'"),
        ("run", "; ".join([f"fewer run {card.slug}", *(f"fewer {verb.name}" for verb in card.commands)])),
    ):
        if value:
            facts.add_row(name, Text(value))
    parts: list[RenderableType] = [Text(f"{card.slug}", style="bold"), facts, _paper_results(card)]
    if card.record:
        try:
            record = msgspec.convert(card.record, Record)
        except msgspec.ValidationError as error:
            return Group(*parts, Text(f"its record.json is none of this version ({error}); make it again with `fewer record`"))
        parts += [verdicts_table(record.claims), Text(machine_line(record.environment, record.date), style="dim")]
    return Group(*parts)


def _paper_results(card: Card) -> Table:
    table = plain_table("The paper's own numbers")
    for column in ("metric", "setting", "value", "baseline", "source"):
        table.add_column(column, overflow="fold")
    for result in card.results:
        baseline = result.baseline + (f": {result.baseline_value:g}{_unit(result.unit)}" if result.baseline_value is not None else "")
        table.add_row(result.metric, result.setting, f"{result.value:g}{_unit(result.unit)}", baseline, result.source)
    return table


def _unit(unit: str) -> str:
    return f" {unit}" if unit else ""


def run_view(record: Record) -> RenderableType:
    """All of a run: settings, figures, curves, verdicts, the plain paragraph, the machine."""
    parts: list[RenderableType] = [settings_table(record), ResultsTable(record)]
    parts += [curves_table(record, chart) for chart in record.charts if isinstance(chart, Curve)]
    parts.append(verdicts_table(record.claims))
    if record.races:
        parts.append(races_table(record.races))
    if record.summary:
        parts += [Padding(Text(record.summary), (0, 0, 1, 0))]
    if any("estimate" in arm.notes.get("energy", "") for arm in record.arms.values()):
        parts.append(Text("Joules are estimated, not metered.", style="dim"))
    parts.append(Text(machine_line(record.environment, record.date), style="dim"))
    return Group(*parts)


@dataclass(frozen=True)
class ResultsTable:
    """An arm a row, a shown figure a column: the mean and, below it, the range over seeds; a star marks the better of an arm and the one it is held against.

    Figures that do not fit beside each other stand in further tables below; those that are a detail are left to the page.
    """

    record: Record

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        record, results = self.record, self.record.results()
        yield Text(record.question, style="bold")
        yield Text(
            f"{record.seeds} seed{'s' * (record.seeds > 1)}: mean, lowest to highest; * better than the arm it is held against", style="dim"
        )
        shown = [figure for figure in tabled(record) if not figure.detail]
        columns = max(1, (options.max_width - ARM_WIDTH) // FIGURE_WIDTH)
        for start in range(0, len(shown), columns):
            table = plain_table()
            table.add_column("arm", overflow="fold", min_width=min(ARM_WIDTH, options.max_width // 3))
            for figure in shown[start : start + columns]:
                table.add_column(figure.label, justify="right", overflow="fold", max_width=FIGURE_WIDTH - 3)
            for name, arm in record.arms.items():
                against = f"\n  against {arm.against}" if arm.against and start == 0 else ""
                cells = [_cell(results, figure, name, arm.against) for figure in shown[start : start + columns]]
                table.add_row(f"{name}{against}", *cells)
            yield table


def tabled(record: Record) -> list[Figure]:
    """The shown figures that an arm logs at their coordinates (most have none): columns of a table, where others are curves."""
    results = record.results()
    return [figure for figure in record.shown if any(len(seed_values(results, figure, arm)) for arm in record.arms)]


def _cell(results: Results, figure: Figure, arm: str, against: str | None) -> str:
    values = seed_values(results, figure, arm)
    if not len(values):
        return "-"
    mean = float(np.mean(values))
    star = " *" if against and is_better(results, figure, arm, against) else ""
    spread = (
        ""
        if len(values) == 1 or np.ptp(values) == 0 or math.isnan(mean)
        else f"\n{show(values.min(), figure.unit)} to {show(values.max(), figure.unit)}"
    )
    return f"{show(mean, figure.unit)}{star}{spread}"


def seed_values(results: Results, figure: Figure, arm: str) -> np.ndarray:
    """An arm's values of a figure at its coordinates, NaN included; empty where there are none."""
    if not results.has(figure.name, arm):
        return np.array([])
    by_seed = results.curve(figure.name, arm).get(coordinates_key(figure.at), {})
    return np.array([by_seed[seed] for seed in sorted(by_seed)])


def is_better(results: Results, figure: Figure, arm: str, against: str) -> bool:
    """Whether an arm's mean is the better one; of NaN neither is."""
    mine, theirs = seed_values(results, figure, arm), seed_values(results, figure, against)
    if not figure.better or not len(mine) or not len(theirs):
        return False
    return bool(mine.mean() > theirs.mean() if figure.better == "higher" else mine.mean() < theirs.mean())


def curves_table(record: Record, chart: Curve) -> Table:
    """A sparkline an arm: the mean over seeds over the coordinate."""
    results = record.results()
    table = plain_table(chart.title or f"{chart.figure} over {chart.over}")
    for column in ("arm", "first", "", "last", f"{chart.over} from, to"):
        table.add_column(column, overflow="fold")
    for name, arm in record.arms.items():
        if not results.has(chart.figure, name):
            continue
        curve = results.points(chart.figure, name, chart.over, chart.at)
        points = [(dict(key)[chart.over], float(np.mean(list(by_seed.values())))) for key, by_seed in curve.items()]
        if not points:
            continue
        unit = next((figure.unit for figure in record.shown if figure.name == chart.figure), "")
        values = [value for _, value in points]
        ends = f"{points[0][0]:g}, {points[-1][0]:g}"
        table.add_row(arm.label, show(values[0], unit), sparkline(values), show(values[-1], unit), ends)
    return table


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """Values as a line of blocks, thinned to a width; NaN is a gap.

    >>> sparkline([0, 1, 2, 3]), sparkline([1.0, float("nan"), 1.0])
    ('▁▃▅█', '▁ ▁')
    """
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / max(1, width - 1))] for i in range(width)]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return " " * len(values)
    low, span = min(finite), max(finite) - min(finite) or 1.0
    return "".join(BLOCKS[int((value - low) / span * (len(BLOCKS) - 1))] if math.isfinite(value) else " " for value in values)


def settings_table(record: Record) -> Table:
    """The settings of each arm and where they come from."""
    table = plain_table("Settings")
    for column in ("arm", "settings", "where they come from"):
        table.add_column(column, overflow="fold")
    for arm in record.arms.values():
        own = {name: value for name, value in arm.settings.items() if name not in record.options}
        table.add_row(arm.label, settings_line(own), arm.notes.get("settings", ""))
    return table


def settings_line(settings: dict[str, Any]) -> str:
    """ "lr=0.001, epochs=5"."""
    return ", ".join(f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in settings.items()) or "-"


def verdicts_table(verdicts: Sequence[Verdict]) -> Table:
    """Each claim with the paper's figure, ours with its spread, and the verdict."""
    table = plain_table("The paper's claims, on this machine")
    table.add_column("verdict", overflow="fold", min_width=7)
    table.add_column("claim", overflow="fold", ratio=3)
    table.add_column("paper", overflow="fold", ratio=2)
    table.add_column("here [95 % over seeds]", overflow="fold", ratio=3)
    for verdict in verdicts:
        word, style = MARKS[verdict.verdict]
        here = "\n".join([*map(str, verdict.ours), *([verdict.reason] if verdict.reason else [])])
        table.add_row(Text(word, style=style), Text(verdict.text), Text(verdict.paper), Text(here))
    return table


def races_table(races: Sequence[RaceOutcome]) -> Table:
    """Each race with its ratio, ours over the peer's, and what it should reach."""
    table = plain_table("Races (ours / the peer's, median of pairs; below 1 is in our favour)")
    for column in ("race", "peer", "ratio", "10-90 %", "asked for", "ours", "peer's"):
        table.add_column(column, overflow="fold")
    for race in races:
        asked = "-" if race.reach is None else f"≤ {race.reach:.3g}: {'reached' if race.reached else 'not reached'}"
        if race.left_out:
            asked = f"left out: {race.left_out}"
        spread = f"{show(race.low)} to {show(race.high)}" if race.kind == "time" else "-"
        table.add_row(race.name, race.peer, show(race.ratio), spread, asked, show(race.ours, race.unit), show(race.theirs, race.unit))
    return table


def tunings_table(tunings: Sequence[RecordedTuning], objective: str) -> Table:
    """The best settings of each arm and the budget they were found with."""
    table = plain_table("Tuned settings")
    for column in ("arm", "settings", objective, "trials", "pruned"):
        table.add_column(column, overflow="fold")
    for tuning in tunings:
        table.add_row(tuning.arm, settings_line(tuning.settings), f"{tuning.objective:.4f}", str(tuning.trials), str(tuning.pruned))
    return table


def findings_table(title: str, findings: Sequence[Finding]) -> Table:
    """What the doctor found."""
    table = plain_table(title)
    for column in ("", "what", "what it means"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(Text("✓" if finding.found else "✗", style="green" if finding.found else "yellow"), finding.what, Text(finding.means))
    return table


def machine_line(environment: dict[str, Any], date: str) -> str:
    """ "2026-11-23, 2 cores (AMD EPYC), 24 GiB, Linux x86_64, Python 3.11.7, torch 2.13.0, commit abc"."""
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    commit = f", commit {environment['commit']}" if environment.get("commit") else ""
    memory = f"{environment['memory'] / 2**30:.0f} GiB"
    processor = f"{environment['cores']} cores ({environment['processor']})"
    return f"{date}, {processor}, {memory}, {environment['system']}, Python {environment['python']}, {packages}, fewer {environment['fewer']}{commit}"


def sets_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The data sets, a row each."""
    table = plain_table("Data sets")
    for column in ("name", "what", "size", "licence", "where it comes from, in this order"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row["name"], Text(row["title"]), show(row["bytes"], "bytes"), Text(row["licence"]), Text("; ".join(row["sources"])))
    return table


def files_table(found: Sequence[Any]) -> Table:
    """The files of a data set: size, and the verified copy or why there is none."""
    table = plain_table(found[0].dataset)
    for column in ("", "file", "size", "where it lies"):
        table.add_column(column, overflow="fold")
    for each in found:
        mark = Text("✓" if each.place else "✗", style="green" if each.place else "yellow")
        table.add_row(mark, each.file, show(each.bytes, "bytes"), Text(each.place or each.why_not))
    return table
