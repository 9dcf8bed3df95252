"""The words that several verbs share: their options, and how they read arguments and write answers."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from fewer import papers
from fewer.errors import MissingExtra, UserError

JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines instead of progress bars.")]
STORE = Annotated[str, typer.Option("--store", help="The SQLite file that keeps the figures.", metavar="PATH")]
SCALE = Annotated[
    str, typer.Option("--scale", help="quick: two cores, at most five minutes. full: the paper's own setting as far as possible.")
]
DEVICE = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
SET = Annotated[list[str] | None, typer.Option("--set", help="Set an option that the study declares.", metavar="KEY=VALUE")]
ARMS = Annotated[list[str] | None, typer.Option("--arm", help="Run this arm only (repeat for more).")]
DEFAULT_STORE = "fewer-runs/store.sqlite"


def complete_slug(incomplete: str) -> list[tuple[str, str]]:
    return [(card.slug, card.summary) for card in papers.cards() if card.slug.startswith(incomplete)]


SLUG = Annotated[str, typer.Argument(help="The method's slug (`fewer list` shows them).", autocompletion=complete_slug)]


def escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def console() -> Console:
    return Console()


def print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def import_method_part(card: papers.Card, part: str) -> Any:
    """A module of a method; UserError where it is not there, raises, or wants an extra that is not installed."""
    from fewer.study.trial import import_part

    try:
        return import_part(f"{card.package}.{part}")
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and not (cause.name or "").startswith(("fewer", card.package)):
            raise MissingExtra(
                f"{card.slug} needs {cause.name}, which is not installed; install it with: pip install 'fewer[{card.extra}]'"
            ) from error
        raise


def study_of(slug: str) -> tuple[papers.Card, Any]:
    from fewer.study.trial import load_study

    card = papers.find(slug)
    import_method_part(card, "study")
    return card, load_study(f"{card.package}.study")


def given_options(pairs: list[str] | None) -> dict[str, str]:
    given = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set {pair}: expected KEY=VALUE, such as --set data=mnist")
        given[key] = value
    return given


def scale_of(scale: str, full: bool = False) -> Any:
    from fewer.study import Scale

    if full:
        return Scale.FULL
    try:
        return Scale(scale)
    except ValueError:
        raise UserError(f"--scale {scale}: expected quick or full") from None
