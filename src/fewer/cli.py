"""The command `fewer`. Each verb is thin: it reads words, calls a room of the house, and prints what comes back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
import typer
import typer.core
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


class Verbs(typer.core.TyperGroup):
    """The house's verbs and, from the cards, those of the methods; a method's code is imported when its verb is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *sorted(_method_verbs())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        return own or _method_verbs().get(cmd_name)


class MethodVerb(typer.core.TyperCommand):
    """A method's verb: its help line stands on the card, the rest in the method's `command.py`."""

    def __init__(self, card: papers.Card, verb: papers.Verb) -> None:
        super().__init__(verb.name, help=verb.help, rich_help_panel="Verbs of the methods")
        self._card, self._name = card, verb.name

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        return self._load().make_context(*args, **kwargs)

    def _load(self) -> click.Command:
        function = _import(self._card, "command").COMMANDS[self._name]
        lone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        lone.command(self._name)(_told_plainly(function))
        return typer.main.get_command(lone)


def _told_plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method's verb whose complaints about what the user gave are told in one line."""
    import functools

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (ValueError, FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as mistake:
            raise UserError(str(mistake)) from mistake

    return call


def _method_verbs() -> dict[str, click.Command]:
    return {verb.name: MethodVerb(card, verb) for card in papers.cards() for verb in card.commands}


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="The same machine learning with fewer backward passes, network calls, bits, bytes, samples and queries.\n\nExample: [bold]fewer run backprop-free-mlps[/bold]",
)


def main() -> None:
    """Run the command line: exit status 0, 2 for what the user can mend (one line), 1 for our own faults (a traceback)."""
    try:
        app(prog_name="fewer")
    except UserError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {_escaped(str(error))}")
        sys.exit(2)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _out() -> Console:
    return Console()


def _print_json(value: Any) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _import(card: papers.Card, part: str) -> Any:
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


def _study(slug: str) -> tuple[papers.Card, Any]:
    from fewer.study.trial import load_study

    card = papers.find(slug)
    _import(card, "study")
    return card, load_study(f"{card.package}.study")


def _given(pairs: list[str] | None) -> dict[str, str]:
    given = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UserError(f"--set {pair}: expected KEY=VALUE, such as --set data=mnist")
        given[key] = value
    return given


def _scale(scale: str, full: bool = False) -> Any:
    from fewer.study import Scale

    if full:
        return Scale.FULL
    try:
        return Scale(scale)
    except ValueError:
        raise UserError(f"--scale {scale}: expected quick or full") from None


# Looking


@app.command("list", rich_help_panel="Look")
def list_methods(
    area: Annotated[str | None, typer.Option(help="Only this area.")] = None,
    as_json: JSON = False,
) -> None:
    """List the methods by area, with the verdicts on their papers' claims.

    Example: fewer list --area forward_only
    """
    from fewer.report import terminal

    cards = [card for card in papers.cards() if area in (None, card.area)]
    areas = sorted({card.area for card in papers.cards()})
    if not cards:
        raise UserError(f"--area {area}: no such area{papers.did_you_mean(area or '', areas)} (known: {', '.join(areas)})")
    if as_json:
        return _print_json(
            [
                {"slug": c.slug, "area": c.area, "title": c.title, "summary": c.summary, "saves": c.saves, "verdicts": c.verdicts}
                for c in cards
            ]
        )
    _out().print(terminal.cards_table(cards))


@app.command(rich_help_panel="Look")
def show(slug: SLUG, as_json: JSON = False) -> None:
    """Show a method: what it does for you, when not to use it, the paper's numbers beside ours.

    Example: fewer show backprop-free-mlps
    """
    from fewer.report import terminal

    card = papers.find(slug)
    if as_json:
        return _print_json({name: getattr(card, name) for name in card.__struct_fields__ if name != "folder"} | {"record": card.record})
    _out().print(terminal.card_view(card))


@app.command(rich_help_panel="Look")
def search(words: Annotated[list[str], typer.Argument(help="Words that must all stand on the card.")], as_json: JSON = False) -> None:
    """Find methods by words.

    Example: fewer search memory fine-tune
    """
    from fewer.report import terminal

    cards = papers.search(" ".join(words))
    if as_json:
        return _print_json([{"slug": card.slug, "area": card.area, "summary": card.summary} for card in cards])
    if not cards:
        return _out().print(f"No method's card has all of: {_escaped(' '.join(words))}. `fewer list` shows them all.")
    _out().print(terminal.cards_table(cards))


@app.command(rich_help_panel="Look")
def doctor(as_json: JSON = False) -> None:
    """Say what this machine has and what that means for each method.

    Example: fewer doctor
    """
    from fewer import doctor as examiner
    from fewer.report import terminal

    machine, methods = examiner.examine(), examiner.examine_methods()
    if as_json:
        return _print_json({"machine": machine, "methods": methods})
    _out().print(terminal.findings_table("This machine", machine))
    _out().print(terminal.findings_table("The methods", methods))


# Running


class EngineName(StrEnum):
    local = "local"
    ray = "ray"


@app.command(rich_help_panel="Run")
def run(
    slug: SLUG,
    scale: SCALE = "quick",
    full: Annotated[bool, typer.Option("--full", help="The same as --scale full.")] = False,
    arm: ARMS = None,
    seeds: Annotated[int | None, typer.Option(help="How many seeds (default: the study's, 3).")] = None,
    settings: SET = None,
    jobs: Annotated[int, typer.Option(help="Trials at a time. More than one makes times hard to compare.")] = 1,
    engine: Annotated[EngineName, typer.Option(help="Where trials run.")] = EngineName.local,
    address: Annotated[str | None, typer.Option(help="The Ray cluster's address (none: start a local one).")] = None,
    store: STORE = DEFAULT_STORE,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of doing only what is missing.")] = False,
    device: DEVICE = "auto",
    quiet: QUIET = False,
    as_json: JSON = False,
) -> None:
    """Run a method beside what it replaces, on real data, and judge the paper's claims.

    Broken off, it goes on where it was: run the same command again.

    Example: fewer run backprop-free-mlps --set data=mnist --seeds 1
    """
    from fewer import study as room
    from fewer.report import progress, terminal
    from fewer.study.recording import make_record
    from fewer.study.runner import choose_device

    if jobs < 1:
        raise UserError(f"--jobs {jobs}: expected at least 1")
    _, study = _study(slug)
    with room.Store(store, write=True) as opened:
        plan = room.plan(
            study, study_module(slug), scale=_scale(scale, full), given=_given(settings), arms=arm or [], seeds=seeds, device=choose_device(device),
            jobs=jobs, store=opened,
        )  # fmt: skip
        chosen = room.LocalEngine(jobs) if engine is EngineName.local else room.RayEngine(address, jobs if jobs > 1 else None)
        try:
            with progress.RunProgress(quiet=quiet) as observer:
                outcome = room.run(plan, opened, chosen, observer, fresh=fresh)
        except KeyboardInterrupt:
            kept = len(opened.finished(plan.specs))
            Console(stderr=True).print(
                f"\nStopped. {kept} of {len(plan.specs)} trials are kept in {opened.path}; the same command goes on from there."
            )
            raise typer.Exit(130) from None
        record = make_record(outcome, _races(opened, slug))
        if not arm:
            opened.save_record(slug, msgspec.json.encode(record))
    if as_json:
        _print_json(record)
    else:
        out = _out()
        out.print(terminal.run_view(record))
        if outcome.stale:
            out.print(f"Note: {outcome.stale} of these trials ran on another commit of the code; --fresh runs them again.")
        for trial, error in outcome.failed.items():
            Console(stderr=True, soft_wrap=True).print(f"[bold red]{_escaped(trial)}[/] {_escaped(error)}")
    if outcome.failed:
        raise typer.Exit(1)


def study_module(slug: str) -> str:
    """The module in which a method's study stands."""
    return f"{papers.find(slug).package}.study"


def _races(store: Any, slug: str) -> list[Any]:
    from fewer.study.races import RaceOutcome

    return [msgspec.json.decode(outcome, type=RaceOutcome) for outcome in store.races(slug)]


@app.command(rich_help_panel="Run")
def tune(
    slug: SLUG,
    trials: Annotated[int, typer.Option(help="Optuna trials for every arm alike.")] = 20,
    arm: ARMS = None,
    scale: SCALE = "quick",
    settings: SET = None,
    store: STORE = DEFAULT_STORE,
    device: DEVICE = "auto",
    record: Annotated[bool, typer.Option("--record", help="Keep the settings with the study (tuned.json), for everybody.")] = False,
    as_json: JSON = False,
) -> None:
    """Choose every arm's settings with the same budget, on validation data; test data stay sealed.

    Example: fewer tune backprop-free-mlps --trials 20
    """
    from fewer import study as room
    from fewer.report import progress, terminal
    from fewer.study.runner import choose_device, prepare
    from fewer.study.settings import RecordedTuning, save_recorded_tunings
    from fewer.study.tuning import tune_arm

    _, study = _study(slug)
    with room.Store(store, write=True) as opened:
        plan = room.plan(
            study,
            study_module(slug),
            scale=_scale(scale),
            given=_given(settings),
            arms=arm or [],
            seeds=1,
            device=choose_device(device),
            store=opened,
        )
        tunable = [one for one in study.choose_arms(arm or []) if one.space]
        if not tunable:
            raise UserError(f"{slug} declares nothing to tune{' for ' + ', '.join(arm) if arm else ''}; its arms run with fixed settings")
        engine, tunings = room.LocalEngine(), []
        prepare(plan, engine, progress.RunProgress(quiet=True))
        for one in tunable:
            tuning = tune_arm(plan, one, engine, trials=trials, observe=progress.tell_tuning)
            opened.save_tuning(slug, one.name, plan.scale, plan.options, tuning)
            tunings.append(RecordedTuning(**msgspec.structs.asdict(tuning), arm=one.name, scale=plan.scale.value, options=plan.options))
            if record:
                save_recorded_tunings(study_module(slug), tunings)
    if as_json:
        return _print_json(tunings)
    _out().print(terminal.tunings_table(tunings, study.objective))


def _bench(slug: str, wanted: Callable[[Any], None]) -> list[Any]:
    """Run a method's races, telling each outcome as it comes; UserError where the method has no bench."""
    card = papers.find(slug)
    if not (Path(card.folder) / "bench.py").exists():
        raise UserError(f"{slug} has no bench: speed is none of its claims; `fewer run {slug}` compares it")
    outcomes = []
    for outcome in _import(card, "bench").bench.run():
        outcomes.append(outcome)
        wanted(outcome)
    return outcomes


@app.command(rich_help_panel="Run")
def bench(slug: SLUG, store: STORE = DEFAULT_STORE, as_json: JSON = False) -> None:
    """Race a method against its peers, in pairs, in one process.

    Example: fewer bench backprop-free-mlps
    """
    import datetime

    from fewer import study as room
    from fewer.report import terminal

    papers.find(slug)
    with room.Store(store, write=True) as opened:
        today = datetime.date.today().isoformat()
        outcomes = _bench(slug, lambda outcome: opened.save_race(slug, outcome.name, msgspec.json.encode(outcome), today))
    _print_json(outcomes) if as_json else _out().print(terminal.races_table(outcomes))


@app.command(rich_help_panel="Run")
def record(slug: SLUG, quiet: QUIET = False) -> None:
    """Run study and bench with three seeds on a clean commit and write the method's record.json.

    Example: fewer record backprop-free-mlps
    """
    import tempfile

    from fewer import study as room
    from fewer.report import progress, terminal
    from fewer.study.recording import make_record, refuse_dirty_tree, write_record

    card, study = _study(slug)
    refuse_dirty_tree(Path(card.folder))
    with tempfile.TemporaryDirectory(prefix="fewer-record-") as folder, room.Store(Path(folder) / "store.sqlite", write=True) as opened:
        plan = room.plan(study, study_module(slug), seeds=3, device="cpu", store=opened)
        with progress.RunProgress(quiet=quiet) as observer:
            outcome = room.run(plan, opened, room.LocalEngine(), observer)
        if outcome.failed:
            raise RuntimeError(f"a record needs every trial, and some failed: {outcome.failed}")
        races = _bench(slug, lambda race: None) if (Path(card.folder) / "bench.py").exists() else []
    made = make_record(outcome, races)
    file = write_record(made, Path(card.folder))
    _out().print(terminal.run_view(made))
    _out().print(f"Wrote {file}; commit it.")


# What remains


@app.command(rich_help_panel="Keep")
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
    _out().print(f"Wrote {index}", soft_wrap=True)
    if serve:
        from fewer.report.serve import serve as serve_folder

        serve_folder(out)


@app.command(rich_help_panel="Keep")
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
    _out().print(f"Wrote {figures} figures to {_escaped(out)}", soft_wrap=True)


@app.command(rich_help_panel="Keep")
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
        _out().print(f"wrote {_escaped(str(file))}", soft_wrap=True)
