"""Verbs that keep: report, export, new."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fewer import papers
from fewer.cli.words import DEFAULT_STORE, STORE, complete_slug, console, escaped


def report(
    out: Annotated[Path, typer.Option(help="The folder to write the page into.")] = Path("fewer-runs/report"),
    store: STORE = DEFAULT_STORE,
    serve: Annotated[bool, typer.Option("--serve", help="Serve it on the loopback address until Ctrl-C.")] = False,
) -> None:
    """Write the page: the catalogue and every method's results, from this machine's runs or the records.

    Example: fewer report --serve
    """
    from fewer import study as room
    from fewer.report import page
    from fewer.study.recording import Record, read_record

    entries = []
    opened = room.Store(store) if Path(store).exists() else None
    for card in papers.cards():
        mine = opened.record(card.slug) if opened else None
        entries.append((card, msgspec.json.decode(mine, type=Record) if mine else read_record(Path(card.folder))))
    if opened:
        opened.close()
    index = page.write_report(out, entries)
    console().print(f"Wrote {index}", soft_wrap=True)
    if serve:
        from fewer.report.serve import serve as serve_folder

        serve_folder(out)


def export(
    kind: Annotated[str, typer.Option("--format", help="csv, parquet or mlflow.")],
    out: Annotated[str, typer.Option(help="A file; for mlflow the tracking address.")],
    slug: Annotated[str | None, typer.Argument(help="Only this method's figures.", autocompletion=complete_slug)] = None,
    store: STORE = DEFAULT_STORE,
) -> None:
    """Write the stored figures as CSV or Parquet, or log them to an MLflow server.

    Example: fewer export --format parquet --out figures.parquet
    """
    from fewer import study as room
    from fewer.study.export import export as write

    if slug:
        papers.find(slug)
    with room.Store(store) as opened:
        figures = write(opened, out, kind, slug)
    console().print(f"Wrote {figures} figures to {escaped(out)}", soft_wrap=True)


def new(
    slug: Annotated[str, typer.Argument(help="The new method's slug, such as lazy-adam.")],
    area: Annotated[str, typer.Option(help="The area of work it belongs to.")] = "optimization",
    outside: Annotated[
        Path | None, typer.Option(help="Lay out a package of your own in this folder instead of a room of this library.")
    ] = None,
) -> None:
    """Lay out the folder of a new method, with a card, a study that runs, and its tests.

    Example: fewer new lazy-adam --outside lazy-adam
    """
    from fewer.scaffold import lay_out

    for file in lay_out(slug, area, outside):
        console().print(f"wrote {escaped(str(file))}", soft_wrap=True)


VERBS = [("report", report, "Keep"), ("export", export, "Keep"), ("new", new, "Keep")]
