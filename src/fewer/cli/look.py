"""Verbs that look: list, show, search, doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from fewer import papers
from fewer.cli.words import JSON, SLUG, console, escaped, print_json, tell_troubles


def list_methods(
    area: Annotated[str | None, typer.Option(help="Only this area.")] = None,
    saves: Annotated[list[str] | None, typer.Option(help="Only what saves this, such as memory (repeat for more).")] = None,
    applies_to: Annotated[list[str] | None, typer.Option(help="Only what applies to this, such as 'a graph' (repeat for more).")] = None,
    as_json: JSON = False,
) -> None:
    """List the methods by area, a line each, with the verdicts on their papers' claims.

    Example: fewer list --saves memory --applies-to "a transformers causal LM"
    """
    from fewer.report import terminal

    tell_troubles()
    cards = papers.choose(papers.cards(), area=area, saves=saves or [], applies_to=applies_to or [])
    if as_json:
        shown = ("slug", "area", "title", "brief", "summary", "saves", "applies_to", "verdicts")
        return print_json([{name: getattr(card, name) for name in shown} for card in cards])
    if not cards:
        return console().print("No method is all of that; `fewer list` shows them all.")
    console().print(terminal.CardsTable(cards))


def show(slug: SLUG, as_json: JSON = False) -> None:
    """Show a method: what it does for you, when not to use it, the paper's numbers beside ours.

    Example: fewer show backprop-free-mlps
    """
    from fewer.report import terminal

    card = papers.find(slug)
    tell_troubles()
    if as_json:
        return print_json({name: getattr(card, name) for name in card.__struct_fields__ if name != "folder"} | {"record": card.record})
    console().print(terminal.card_view(card))


def search(words: Annotated[list[str], typer.Argument(help="Words that must all stand on the card.")], as_json: JSON = False) -> None:
    """Find methods by words.

    Example: fewer search memory fine-tune
    """
    from fewer.report import terminal

    cards = papers.search(" ".join(words))
    if as_json:
        return print_json([{"slug": card.slug, "area": card.area, "summary": card.summary} for card in cards])
    if not cards:
        return console().print(f"No method's card has all of: {escaped(' '.join(words))}. `fewer list` shows them all.")
    console().print(terminal.CardsTable(cards))


def doctor(as_json: JSON = False) -> None:
    """Say what this machine has and what that means for each method.

    Example: fewer doctor
    """
    from fewer import doctor as examiner
    from fewer.report import terminal

    machine, methods = examiner.examine(), examiner.examine_methods()
    if as_json:
        return print_json({"machine": machine, "methods": methods})
    console().print(terminal.findings_table("This machine", machine))
    console().print(terminal.findings_table("The methods", methods))


VERBS = [("list", list_methods, "Look"), ("show", show, "Look"), ("search", search, "Look"), ("doctor", doctor, "Look")]
