"""The command `fewer`. Each verb is thin: it reads words, calls a room of the house, and prints what comes back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click
import typer
import typer.core
from rich.console import Console

from fewer import papers
from fewer.cli import data, keep, look, runs
from fewer.cli.words import escaped, import_method_part
from fewer.errors import UserError


class Verbs(typer.core.TyperGroup):
    """The house's verbs and, from the cards, those of the methods; a method's code is imported when its verb is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *sorted(method_verbs())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        return own or method_verbs().get(cmd_name)


class MethodVerb(typer.core.TyperCommand):
    """A method's verb: its help line stands on the card, the rest in the method's `command.py`."""

    def __init__(self, card: papers.Card, verb: papers.Verb) -> None:
        super().__init__(verb.name, help=verb.help, rich_help_panel="Verbs of the methods")
        self._card, self._name = card, verb.name

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        return self._load().make_context(*args, **kwargs)

    def _load(self) -> click.Command:
        """The verb as its method defines it: a function, or a typer app of several (`fewer VERB ACTION`)."""
        verb = import_method_part(self._card, "command").COMMANDS[self._name]
        app = verb
        if not isinstance(verb, typer.Typer):
            app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            app.command(self._name)(verb)
        command = typer.main.get_command(app)
        command.invoke = told_plainly(command.invoke)
        return command


def told_plainly(invoke: Callable[..., Any]) -> Callable[..., Any]:
    """A method's verb whose complaints about what the user gave are told in one line."""

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return invoke(*args, **kwargs)
        except (ValueError, FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as mistake:
            raise UserError(str(mistake)) from mistake

    return call


def method_verbs() -> dict[str, click.Command]:
    return {verb.name: MethodVerb(card, verb) for card in papers.cards() for verb in card.commands}


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="The same machine learning with fewer backward passes, network calls, bits, bytes, samples and queries.\n\nExample: [bold]fewer run backprop-free-mlps[/bold]",
)
for name, verb, panel in [*look.VERBS, *runs.VERBS, *keep.VERBS]:
    app.command(name, rich_help_panel=panel)(verb)
app.add_typer(data.app, name="data", rich_help_panel="Keep")


def main() -> None:
    """Run the command line: exit status 0, 2 for what the user can mend (one line), 1 for our own faults (a traceback)."""
    try:
        app(prog_name="fewer")
    except UserError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escaped(str(error))}")
        sys.exit(2)
