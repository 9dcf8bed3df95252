"""Running a study: plan its trials, do those that are missing, gather the results, judge the claims."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewer.errors import UserError, WorkFailed
from fewer.study.declaration import Scale, Study
from fewer.study.engines import Engine
from fewer.study.environment import environment, usable_cores
from fewer.study.results import Results
from fewer.study.settings import choose_settings
from fewer.study.store import Store
from fewer.study.trial import FigureEvent, FinishedEvent, NoteEvent, PictureEvent, ProgressEvent, TrialSpec
from fewer.study.verdicts import Verdict, judge


@dataclass(frozen=True)
class Plan:
    """The trials of one run: arms times seeds, each fully named, where each arm's settings come from, and how many go at a time."""

    study: Study
    module: str
    scale: Scale
    options: dict[str, Any]
    specs: tuple[TrialSpec, ...]
    origins: dict[str, str]  # arm -> origin of its settings
    jobs: int = 1


class Observer:
    """Told what happens during a run; this one keeps quiet."""

    def planned(self, plan: Plan, missing: Sequence[TrialSpec]) -> None: ...
    def started(self, spec: TrialSpec) -> None: ...
    def progress(self, spec: TrialSpec, event: ProgressEvent) -> None: ...
    def finished(self, spec: TrialSpec, event: FinishedEvent) -> None: ...


@dataclass
class Outcome:
    """What a run came to."""

    plan: Plan
    results: Results
    verdicts: list[Verdict]
    summary: str
    notes: dict[str, dict[str, str]]  # arm -> notes of its trials
    pictures: dict[str, dict[str, bytes]]  # name -> arm -> a PNG of the first seed that has it
    environment: dict[str, Any]
    seconds: float  # all its trials together
    failed: dict[str, str] = field(default_factory=dict)  # "arm, seed N" -> what went wrong
    stale: int = 0  # trials kept from another commit of the code


def plan(
    study: Study,
    module: str,
    *,
    scale: Scale = Scale.QUICK,
    given: Mapping[str, str] | None = None,
    arms: Sequence[str] = (),
    seeds: int | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    store: Store | None = None,
) -> Plan:
    """Name the trials of a run, and how many go at a time; UserError on unknown arms or options, or fewer than one seed.

    Seeds go round before arms do, so that a run that is broken off has compared all arms on the seeds it has done.
    """
    seeds = study.seeds if seeds is None else seeds
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: expected at least 1")
    options = study.choose_options(given or {})
    chosen = study.choose_arms(arms)
    if not chosen:
        raise UserError(f"{study.slug} declares no arm, so there is nothing to run; declare one with @study.arm(...)")
    settings, origins = {}, {}
    for arm in chosen:
        settings[arm.name], origins[arm.name] = choose_settings(study, module, arm, scale, options, store)
    if jobs is None:
        jobs = min(study.jobs, usable_cores()) if device == "cpu" else 1
    threads = max(1, usable_cores() // jobs)
    specs = tuple(
        TrialSpec(module, study.slug, arm.name, seed, scale, settings[arm.name], device, threads) for seed in range(seeds) for arm in chosen
    )
    return Plan(study, module, scale, options, specs, origins, jobs)


def prepare(plan: Plan, engine: Engine, observer: Observer) -> None:
    """Build the task once, so that data are fetched and trouble with them is told before any arm runs."""
    first = plan.specs[0]
    spec = TrialSpec(plan.module, plan.study.slug, "", 0, plan.scale, dict(plan.options), first.device, first.threads)
    observer.started(spec)
    for _, event in engine.run([spec], time_limit=plan.study.time_limit):
        if isinstance(event, ProgressEvent):
            observer.progress(spec, event)
        if isinstance(event, FinishedEvent):
            observer.finished(spec, event)
            if event.user_error:
                raise UserError(event.error)
            if event.status != "done":
                raise WorkFailed(f"the task of {plan.study.slug} could not be built ({event.status}): {event.error.strip()}")


def run(plan: Plan, store: Store, engine: Engine, observer: Observer | None = None, *, fresh: bool = False) -> Outcome:
    """Do the trials that the store does not hold yet, and judge the claims on all of them.

    A trial that fails is recorded as such and the rest goes on. On KeyboardInterrupt the trials in flight are taken out and the rest is kept.
    """
    if fresh:
        store.forget_trials(plan.specs)
    return gather(plan, store, run_trials(plan, store, engine, observer or Observer()))


def run_trials(plan: Plan, store: Store, engine: Engine, observer: Observer) -> dict[str, str]:
    """Do the trials that the store does not hold yet; what went wrong, by trial. No claim is judged."""
    have = store.finished(plan.specs)
    missing = [spec for spec in plan.specs if spec.key not in have]
    observer.planned(plan, missing)
    if not missing:
        return {}
    prepare(plan, engine, observer)
    return _run_missing(plan, missing, store, engine, observer)


def _run_missing(plan: Plan, missing: Sequence[TrialSpec], store: Store, engine: Engine, observer: Observer) -> dict[str, str]:
    """Run trials and write what they say; what went wrong, by trial."""
    numbers: dict[bytes, int] = {}
    notes: dict[bytes, dict[str, str]] = {}
    failed: dict[str, str] = {}
    running_environment = environment()
    try:
        with _ctrl_c() as raise_if_pressed, contextlib.closing(engine.run(missing, time_limit=plan.study.time_limit)) as events:
            for spec, event in events:
                raise_if_pressed()
                if spec.key not in numbers:
                    numbers[spec.key], notes[spec.key] = store.begin(spec, running_environment), {"settings": plan.origins[spec.arm]}
                    observer.started(spec)
                match event:
                    case FigureEvent():
                        store.add_figure(numbers[spec.key], event)
                    case PictureEvent():
                        store.add_picture(numbers[spec.key], event)
                    case NoteEvent():
                        notes[spec.key][event.name] = event.text
                    case ProgressEvent():
                        observer.progress(spec, event)
                    case FinishedEvent():
                        store.finish(numbers.pop(spec.key), event, notes[spec.key])
                        observer.finished(spec, event)
                        if event.user_error:
                            raise UserError(event.error)
                        if event.status != "done":
                            failed[f"{spec.arm}, seed {spec.seed}"] = f"{event.status}: {event.error.strip()}"
    finally:
        for number in numbers.values():
            store.forget(number)
    return failed


@contextlib.contextmanager
def _ctrl_c() -> Iterator[Callable[[], None]]:
    """Ctrl-C as usual, and a function that raises it again where it was lost: Python drops what is raised within a finaliser."""
    pressed: list[int] = []

    def raise_if_pressed() -> None:
        if pressed:
            raise KeyboardInterrupt

    def remember(signal_number: int, frame: Any) -> None:
        pressed.append(signal_number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield raise_if_pressed
        return
    before = signal.signal(signal.SIGINT, remember)
    try:
        yield raise_if_pressed
    finally:
        signal.signal(signal.SIGINT, before)


def gather(plan: Plan, store: Store, failed: Mapping[str, str] | None = None) -> Outcome:
    """What the store holds of a plan, judged."""
    have = store.finished(plan.specs)
    unfinished: dict[str, str] = dict.fromkeys(plan.study.arms, "was not run")
    notes: dict[str, dict[str, str]] = {}
    for spec in plan.specs:
        if unfinished.get(spec.arm) == "was not run":
            del unfinished[spec.arm]
        if spec.key in have:
            notes.setdefault(spec.arm, {}).update(have[spec.key].notes)
        else:
            why = (failed or {}).get(f"{spec.arm}, seed {spec.seed}", "has not run yet")
            unfinished[spec.arm] = f"seed {spec.seed}: {why.splitlines()[-1] if why else why}"
    units = {figure.name: figure.unit for figure in plan.study.figures}
    names = {figure.name: figure.label for figure in plan.study.figures if not figure.at} | {
        arm.name: arm.label for arm in plan.study.arms.values()
    }
    results = Results(store.rows(plan.specs), list(plan.study.arms), unfinished, units, names)
    environments = [trial.environment for trial in have.values()]
    now = environment()
    stale = sum(kept.get("commit") != now["commit"] for kept in environments)
    shown = environments[0] if environments else now
    seconds = sum(trial.seconds or 0.0 for trial in have.values())
    verdicts, summary = judge(plan.study, results), plan.study.summarise(results)
    pictures = store.pictures(plan.specs)
    return Outcome(plan, results, verdicts, summary, notes, pictures, shown, seconds, dict(failed or {}), stale)
