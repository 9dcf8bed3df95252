"""The verb `fewer data`: list, fetch, verify."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fewer.cli.words import JSON, console, print_json


def complete_set(incomplete: str) -> list[tuple[str, str]]:
    from fewer import data as room

    return [(each.name, each.title) for each in room.sets() if each.name.startswith(incomplete)]


NAME = Annotated[str, typer.Argument(help="The set's name (`fewer data list` shows them).", autocompletion=complete_set)]
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="List, fetch and verify real data sets.\n\nExample: [bold]fewer data fetch fashion-mnist[/bold]",
)


@app.command("list")
def list_sets(as_json: JSON = False) -> None:
    """List the data sets with their licences, sizes and sources.

    Example: fewer data list
    """
    from fewer import data as room
    from fewer.report import terminal

    rows = [
        {
            "name": each.name,
            "title": each.title,
            "licence": each.licence,
            "citation": each.citation,
            "bytes": each.bytes,
            "sources": ["cache", "FEWER_DATA", *dict.fromkeys(source.service for file in each.files for source in file.sources)],
        }
        for each in room.sets()
    ]
    print_json(rows) if as_json else console().print(terminal.sets_table(rows))


@app.command()
def fetch(name: NAME, as_json: JSON = False) -> None:
    """Fetch what is missing of a data set, verify it, and say where it lies.

    Example: fewer data fetch mnist
    """
    from fewer import data as room

    _print(room.fetch(name), as_json)


@app.command()
def verify(name: NAME, as_json: JSON = False) -> None:
    """Say which files of a data set are here with the right checksum; nothing is fetched. Exit status 1 if one is not.

    Example: fewer data verify mnist
    """
    from fewer import data as room

    found = room.verify(name)
    _print(found, as_json)
    if not all(each.place for each in found):
        raise typer.Exit(1)


def _print(found: list[Any], as_json: bool) -> None:
    from fewer.report import terminal

    print_json(found) if as_json else console().print(terminal.files_table(found))
