"""The page: a catalogue and a page a method, static and self-contained, made from cards and records."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

import fewer
from fewer.files import made_whole
from fewer.papers import Card
from fewer.quantities import show
from fewer.report import charts, terminal
from fewer.study.recording import Record

SYMBOLS = {"holds": ("✓", "holds"), "fails": ("✗", "fails"), "undecided": ("~", "undecided"), "not testable here": ("?", "untestable")}


def write_report(folder: Path, entries: Sequence[tuple[Card, Record | None]]) -> Path:
    """Write the page; its `index.html`. A method's page is taken over from the former report where it was made of the same.

    Args:
        folder: where to write. A former report there is replaced; anything else there is left alone, and refused.
        entries: each method's card and its record, from this machine or the recorded one.

    Raises:
        OSError, ValueError: the folder holds something that is no report's, or cannot be written.
    """
    environment, makers = templates(), _makers()
    with made_whole(folder, overwrite=True) as part:
        (part / "methods").mkdir()
        index = environment.get_template("index.html").render(
            entries=entries,
            areas=sorted({card.area for card, _ in entries}),
            saves=sorted({word for card, _ in entries for word in card.saves}),
            applies_to=sorted({word for card, _ in entries for word in card.applies_to}),
            root="",
        )
        (part / "index.html").write_text(index, encoding="utf8")
        template = environment.get_template("method.html")
        for card, record in entries:
            name, made_of = Path("methods", f"{card.slug}.html"), _made_of(card, record, makers)
            page = _former(folder / name, made_of)
            if page is None:
                columns = terminal.tabled(record) if record else []
                page = template.render(card=card, record=record, charts=_drawn(record), tabled=columns, root="../", made_of=made_of)
            (part / name).write_text(page, encoding="utf8")
    return folder / "index.html"


def _makers() -> bytes:
    """The code and the templates that make pages."""
    room = sorted(file for file in Path(__file__).parent.rglob("*") if file.suffix in (".py", ".html", ".css"))
    return b"\0".join([fewer.__version__.encode(), *(file.read_bytes() for file in room)])


def _made_of(card: Card, record: Record | None, makers: bytes) -> str:
    """A digest of all that a method's page is made of."""
    return hashlib.sha256(b"\0".join([makers, msgspec.json.encode(card), msgspec.json.encode(record)])).hexdigest()


def _former(file: Path, made_of: str) -> str | None:
    """The page of the former report, if it was made of the same."""
    try:
        page = file.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError):
        return None
    return page if f'<meta name="made-of" content="{made_of}">' in page.partition("</head>")[0] else None


def templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fewer.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        version=fewer.__version__,
        machine_line=terminal.machine_line,
        settings_line=terminal.settings_line,
        cells=_cells,
        symbols=SYMBOLS,
        counts=_counts,
    )
    environment.filters["show"] = show
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment


def _counts(record: Record | None) -> dict[str, int]:
    counts = dict.fromkeys(SYMBOLS, 0)
    for claim in record.claims if record else []:
        counts[claim.verdict] += 1
    return counts


def _drawn(record: Record | None) -> list[dict[str, Any]]:
    """Each chart as SVG, with its title and its data in words."""
    drawn = []
    for declaration in record.charts if record else []:
        assert record is not None
        columns, rows = charts.table(record, declaration)
        picture = charts.chart(record, declaration)
        drawn.append(
            {
                "title": charts.title(record, declaration),
                "note": charts.note(record, declaration),
                "svg": charts.svg(picture) if picture else "",
                "columns": columns,
                "rows": rows,
            }
        )
    return drawn


def _cells(record: Record) -> list[dict[str, Any]]:
    """The results table: an arm a row, a shown figure a cell with its mean, its range over seeds, and whether it beats the arm it is held against."""
    results, rows = record.results(), []
    for name, arm in record.arms.items():
        cells = []
        for figure in terminal.tabled(record):
            values = terminal.seed_values(results, figure, name)
            if not len(values):
                cells.append({"mean": "–", "spread": "", "better": False})
                continue
            spread = f"{show(values.min(), figure.unit)} to {show(values.max(), figure.unit)}" if values.min() < values.max() else ""
            better = bool(arm.against) and terminal.is_better(results, figure, name, arm.against)
            cells.append({"mean": show(float(values.mean()), figure.unit), "spread": spread, "better": better})
        rows.append({"arm": arm, "against": record.arms[arm.against].label if arm.against in record.arms else "", "cells": cells})
    return rows
