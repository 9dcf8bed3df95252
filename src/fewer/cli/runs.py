"""Verbs that run: run, tune, bench, record."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from fewer import papers
from fewer.cli.words import (
    ARMS,
    DEFAULT_STORE,
    DEVICE,
    JSON,
    QUIET,
    SCALE,
    SET,
    SLUG,
    STORE,
    Scale,
    console,
    escaped,
    given_options,
    import_method_part,
    print_json,
    scale_of,
    study_of,
)
from fewer.devices import Device
from fewer.errors import UserError, WorkFailed

MANY = 10_000


class EngineName(StrEnum):
    local = "local"
    ray = "ray"


def run(
    slug: SLUG,
    scale: SCALE = Scale.quick,
    full: Annotated[bool, typer.Option("--full", help="The same as --scale full.")] = False,
    arm: ARMS = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=MANY, help="How many seeds (default: the study's, 3).")] = None,
    settings: SET = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, max=MANY, help="Trials at a time (default: the study's, 1 where it tells times; more make them hard to compare)."
        ),
    ] = None,
    engine: Annotated[EngineName, typer.Option(help="Where trials run.")] = EngineName.local,
    address: Annotated[str | None, typer.Option(help="The Ray cluster's address (none: start a local one).")] = None,
    store: STORE = DEFAULT_STORE,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of doing only what is missing.")] = False,
    device: DEVICE = Device.auto,
    quiet: QUIET = False,
    as_json: JSON = False,
) -> None:
    """Run a method beside what it replaces, on real data, and judge the paper's claims.

    Broken off, it goes on where it was: run the same command again.

    Example: fewer run backprop-free-mlps --set data=mnist --seeds 1
    """
    from fewer import study as room
    from fewer.devices import choose_device
    from fewer.report import progress, terminal
    from fewer.study.recording import make_record

    if address is not None and engine is not EngineName.ray:
        raise UserError(f"--address {address}: only a Ray cluster has one; add --engine ray")
    _, study = study_of(slug)
    with room.Store(store, write=True) as opened:
        plan = room.plan(
            study, study_module(slug), scale=scale_of(scale, full), given=given_options(settings), arms=arm or [], seeds=seeds, device=choose_device(device),
            jobs=jobs, store=opened,
        )  # fmt: skip
        chosen = room.LocalEngine(plan.jobs) if engine is EngineName.local else room.RayEngine(address, jobs)
        if engine is EngineName.ray:
            where = f"the Ray cluster at {escaped(address)}" if address else "a Ray cluster of this machine's own, on the loopback address"
            Console(stderr=True, highlight=False).print(f"Trials run on {where}.", soft_wrap=True)
        try:
            with progress.RunProgress(quiet=quiet) as observer:
                outcome = room.run(plan, opened, chosen, observer, fresh=fresh)
        except KeyboardInterrupt:
            kept = len(opened.finished(plan.specs))
            Console(stderr=True, soft_wrap=True).print(
                f"\nStopped. {kept} of {len(plan.specs)} trials are kept in {escaped(str(opened.path))}; the same command goes on from there."
            )
            raise typer.Exit(130) from None
        record = make_record(outcome, _races(opened, slug))
        if not arm:
            opened.save_record(slug, msgspec.json.encode(record))
    if as_json:
        print_json(record)
    else:
        out = console()
        out.print(terminal.run_view(record))
        if outcome.stale:
            out.print(f"Note: {outcome.stale} of these trials ran on another commit of the code; --fresh runs them again.")
        for trial, error in outcome.failed.items():
            Console(stderr=True, soft_wrap=True).print(f"[bold red]{escaped(trial)}[/] {escaped(error)}")
    if outcome.failed:
        raise typer.Exit(1)


def study_module(slug: str) -> str:
    """The module in which a method's study stands."""
    return f"{papers.find(slug).package}.study"


def _races(store: Any, slug: str) -> list[Any]:
    from fewer.study.races import RaceOutcome

    return store.races(slug, RaceOutcome)


def tune(
    slug: SLUG,
    trials: Annotated[int, typer.Option(min=1, max=MANY, help="Optuna trials for every arm alike.")] = 20,
    arm: ARMS = None,
    scale: SCALE = Scale.quick,
    settings: SET = None,
    store: STORE = DEFAULT_STORE,
    device: DEVICE = Device.auto,
    record: Annotated[bool, typer.Option("--record", help="Keep the settings with the study (tuned.json), for everybody.")] = False,
    as_json: JSON = False,
) -> None:
    """Choose every arm's settings with the same budget, on validation data; test data stay sealed.

    Example: fewer tune backprop-free-mlps --trials 20
    """
    from fewer import study as room
    from fewer.devices import choose_device
    from fewer.report import progress, terminal
    from fewer.study.runner import prepare
    from fewer.study.settings import RecordedTuning, save_recorded_tunings
    from fewer.study.tuning import tune_arm

    _, study = study_of(slug)
    with room.Store(store, write=True) as opened:
        plan = room.plan(
            study,
            study_module(slug),
            scale=scale_of(scale),
            given=given_options(settings),
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
        return print_json(tunings)
    console().print(terminal.tunings_table(tunings, study.objective))


def _bench(slug: str, wanted: Callable[[Any], None]) -> list[Any]:
    """Run a method's races, telling each outcome as it comes; UserError where the method has no bench."""
    card = papers.find(slug)
    if not (Path(card.folder) / "bench.py").exists():
        raise UserError(f"{slug} has no bench: speed is none of its claims; `fewer run {slug}` compares it")
    outcomes = []
    for outcome in import_method_part(card, "bench").bench.run():
        outcomes.append(outcome)
        wanted(outcome)
    return outcomes


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
    print_json(outcomes) if as_json else console().print(terminal.races_table(outcomes))


def record(slug: SLUG, quiet: QUIET = False) -> None:
    """Run study and bench with the study's seeds on a clean commit and write the method's record.json.

    Example: fewer record backprop-free-mlps
    """
    import tempfile

    from fewer import study as room
    from fewer.report import progress, terminal
    from fewer.study.recording import clean_commit, make_record, write_record

    card, study = study_of(slug)
    commit = clean_commit(Path(card.folder))
    races = _bench(slug, lambda race: None) if (Path(card.folder) / "bench.py").exists() else []
    missing = [race.left_out for race in races if race.left_out]
    if missing:  # told before the study, which takes minutes
        raise UserError(f"a record needs every race: {missing[0]}")
    with tempfile.TemporaryDirectory(prefix="fewer-record-") as folder, room.Store(Path(folder) / "store.sqlite", write=True) as opened:
        plan = room.plan(study, study_module(slug), device="cpu", store=opened)
        with progress.RunProgress(quiet=quiet) as observer:
            outcome = room.run(plan, opened, room.LocalEngine(plan.jobs), observer)
    if outcome.failed:
        first, why = next(iter(outcome.failed.items()))
        raise WorkFailed(f"a record needs every trial, and {len(outcome.failed)} failed; the first is {first}: {why.splitlines()[-1]}")
    made = msgspec.structs.replace(make_record(outcome, races), commit=commit)
    file = write_record(made, Path(card.folder))
    console().print(terminal.run_view(made))
    console().print(f"Wrote {escaped(str(file))}; commit it.", soft_wrap=True)


VERBS = [("run", run, "Run"), ("tune", tune, "Run"), ("bench", bench, "Run"), ("record", record, "Run")]
