"""The command `fewer`. Each verb is thin: it reads words, calls a room of the house, and prints what comes back."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import click
import typer
import typer.core
from rich.console import Console

from fewer import papers
from fewer.cli import advise, data, keep, look, runs
from fewer.cli.words import escaped, import_method_part
from fewer.errors import UserError, WorkFailed


class Verbs(typer.core.TyperGroup):
    """The house's verbs and, from the cards, those of the methods; a method's code is imported when its verb is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *sorted(method_verbs())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        return own or method_verbs().get(cmd_name)


class MethodVerb(typer.core.TyperCommand):
    """A verb of a method or an area: its help line stands in TOML, the rest in `command.py`, which is imported when it is called."""

    def __init__(self, card: papers.Card | papers.AreaVerbs, verb: papers.Verb) -> None:
        super().__init__(verb.name, help=verb.help, rich_help_panel="Verbs of the methods")
        self._card, self._name = card, verb.name

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        return self._load().make_context(*args, **kwargs)

    def _load(self) -> click.Command:
        """The verb as its method defines it: a function, or a typer app of several (`fewer VERB ACTION`)."""
        commands = getattr(import_method_part(self._card, "command"), "COMMANDS", {})
        verb: Any = commands.get(self._name) if isinstance(commands, dict) else None
        if not callable(verb):
            raise UserError(
                f"{self._card.package}.command has no verb {self._name!r}, which its card names; reinstall or mend that package"
            )
        app: Any = verb
        if not isinstance(verb, typer.Typer):
            app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            app.command(self._name)(verb)
        command = typer.main.get_command(app)
        command.invoke = told_plainly(command.invoke)
        return command


def told_plainly(invoke: Callable[..., Any]) -> Callable[..., Any]:
    """A verb whose complaints about what the user gave are told in one line."""

    @functools.wraps(invoke)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return invoke(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError) as mistake:  # the last: a rate too high, and the message says so
            raise UserError(str(mistake)) from mistake

    return call


def method_verbs() -> dict[str, click.Command]:
    return {verb.name: MethodVerb(source, verb) for source in (*papers.cards(), *papers.area_verbs()) for verb in source.commands}


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="The same machine learning with fewer backward passes, network calls, bits, bytes, samples and queries.\n\nExample: [bold]fewer run backprop-free-mlps[/bold]",
)
for name, verb, panel in [*look.VERBS, *runs.VERBS, *advise.VERBS, *keep.VERBS]:
    app.command(name, rich_help_panel=panel)(told_plainly(verb) if verb in (keep.report, keep.export, keep.new, advise.advise) else verb)
app.add_typer(data.app, name="data", rich_help_panel="Keep")


def main() -> None:
    """Run the command line: exit status 0, 2 for what the user can mend (one line), 1 for work that failed and our own faults (a traceback).

    SIGTERM ends it as Ctrl-C does: what is done is kept, what was begun is taken away.
    """
    signal.signal(signal.SIGTERM, _end)
    try:
        sys.exit(app(prog_name="fewer", standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        _tell(in_one_line(error))
        sys.exit(2)
    except (UserError, WorkFailed) as error:
        _tell(str(error))
        sys.exit(2 if isinstance(error, UserError) else 1)
    except (click.Abort, KeyboardInterrupt):
        _tell("stopped")
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _end(number: int, frame: Any) -> None:
    """What Ctrl-C would do, also where a shell has told a job in its background to ignore Ctrl-C."""
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    if callable(on_ctrl_c):
        on_ctrl_c(number, frame)
    raise KeyboardInterrupt


def _tell(error: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escaped(error)}")


def in_one_line(error: click.ClickException) -> str:
    """What click says of a mistyped line, in the house's words: the option, what was given, what was expected."""
    kind = error.param.type if isinstance(error, click.BadParameter) and error.param else None
    given = re.match(r"'?(.*?)'? is not ", error.message, re.S)
    if kind is not None and given:
        assert isinstance(error, click.BadParameter)
        assert error.param is not None
        name = max(error.param.opts, key=len) if isinstance(error.param, click.Option) else str(error.param.name).upper()
        if isinstance(kind, click.Choice):
            choices = list(map(str, getattr(kind, "choices", ())))
            words = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
            return f"{name} {given[1]}: expected {words}{papers.did_you_mean(given[1], choices)}"
        if isinstance(kind, click.IntRange | click.FloatRange) and "not in the range" in error.message:
            ends = (("at least", kind.min), ("at most", kind.max))
            return f"{name} {given[1]}: expected {' and '.join(f'{words} {end:g}' for words, end in ends if end is not None)}"
    where = f"; `{error.ctx.command_path} --help` shows what it takes" if isinstance(error, click.UsageError) and error.ctx else ""
    return " ".join(error.format_message().split()).rstrip(".") + where
