"""The words that several verbs share: their options, and how they read arguments and write answers."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from fewer import papers
from fewer.devices import Device
from fewer.errors import MissingExtra, UserError
from fewer.plain import plain


class Scale(StrEnum):
    quick = "quick"
    full = "full"


JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
QUIET = Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines instead of progress bars.")]
STORE = Annotated[str, typer.Option("--store", help="The SQLite file that keeps the figures.", metavar="PATH")]
SCALE = Annotated[
    Scale, typer.Option("--scale", help="quick: two cores, at most five minutes. full: the paper's own setting as far as possible.")
]
DEVICE = Annotated[Device, typer.Option("--device", help="Where to compute; auto takes a GPU where there is one.")]
SET = Annotated[list[str] | None, typer.Option("--set", help="Set an option that the study declares.", metavar="KEY=VALUE")]
ARMS = Annotated[list[str] | None, typer.Option("--arm", help="Run this arm only (repeat for more).")]
DEFAULT_STORE = "fewer-runs/store.sqlite"


def complete_slug(incomplete: str) -> list[tuple[str, str]]:
    return [(card.slug, card.summary) for card in papers.cards() if card.slug.startswith(incomplete)]


SLUG = Annotated[str, typer.Argument(help="The method's slug (`fewer list` shows them).", autocompletion=complete_slug)]


def escaped(text: str) -> str:
    """Text that came from outside, as rich prints it: no markup, and no control characters."""
    from rich.markup import escape

    return escape(plain(text))


def console() -> Console:
    return Console()


def print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def import_method_part(card: papers.Card | papers.AreaVerbs, part: str) -> Any:
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


def scale_of(scale: Scale, full: bool = False) -> Any:
    from fewer import study

    return study.Scale.FULL if full else study.Scale(scale.value)


def tell_troubles() -> None:
    """Name on standard error the installed packages whose methods are left out, a line each."""
    for trouble in papers.troubles():
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[yellow]note:[/] {escaped(trouble)}")
