"""Verbs that keep: report, export, new."""

from __future__ import annotations

import contextlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fewer import papers
from fewer.cli.words import DEFAULT_STORE, STORE, complete_slug, console, escaped, tell_troubles


def report(
    slugs: Annotated[list[str] | None, typer.Argument(help="These methods alone.", autocompletion=complete_slug)] = None,
    out: Annotated[Path, typer.Option(help="The folder to write the page into; a former report there is replaced.")] = Path(
        "fewer-runs/report"
    ),
    store: STORE = DEFAULT_STORE,
    serve: Annotated[bool, typer.Option("--serve", help="Serve it on the loopback address until Ctrl-C.")] = False,
) -> None:
    """Write the page: the catalogue and every method's results, from this machine's runs or the records.

    Example: fewer report --serve
    """
    from fewer import study as room
    from fewer.files import check_new
    from fewer.report import page
    from fewer.study.recording import Record, read_record

    check_new(out, overwrite=True)
    chosen = [papers.find(slug) for slug in slugs] if slugs else papers.cards()
    tell_troubles()
    entries = []
    with contextlib.ExitStack() as stack:
        asked = store != DEFAULT_STORE or Path(store).exists()  # nobody has run anything yet: the records alone
        opened = stack.enter_context(room.Store(store)) if asked else None
        for card in chosen:
            mine = opened.record(card.slug, Record) if opened else None
            entries.append((card, mine or (None if card.trouble else read_record(Path(card.folder)))))
    index = page.write_report(out, entries)
    console().print(f"Wrote {escaped(str(index))}", soft_wrap=True)
    if serve:
        from fewer.report.serve import serve as serve_folder

        serve_folder(out)


class Format(StrEnum):
    csv = "csv"
    parquet = "parquet"
    mlflow = "mlflow"


def export(
    kind: Annotated[Format, typer.Option("--format", help="What to write.")],
    out: Annotated[str, typer.Option(help="A new file; for mlflow the tracking address.")],
    slug: Annotated[str | None, typer.Argument(help="Only this method's figures.", autocompletion=complete_slug)] = None,
    store: STORE = DEFAULT_STORE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write the stored figures as CSV or Parquet, or log them to an MLflow server.

    Example: fewer export --format parquet --out figures.parquet
    """
    from fewer import study as room
    from fewer.study.export import export as write

    if slug:
        papers.find(slug)
    with room.Store(store) as opened:
        figures = write(opened, out, kind.value, slug, overwrite=overwrite)
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
