"""What a user sees while trials run: bars on a terminal, plain lines elsewhere; all on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fewer.quantities import show
from fewer.study.runner import Observer, Plan
from fewer.study.trial import FinishedEvent, ProgressEvent, TrialSpec

PREPARING = "preparing the data"


class RunProgress(Observer):
    """Shows a run; use it as a context manager.

    Args:
        quiet: plain lines even on a terminal.
        console: where to write; standard error by default.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.plain = quiet or not self.console.is_terminal
        self.total, self.done = 0, 0
        self._all = Progress(
            SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(), console=self.console, disable=self.plain,
        )  # fmt: skip
        self._whole: TaskID | None = None
        self._tasks: dict[bytes, TaskID] = {}

    def __enter__(self) -> RunProgress:
        self._all.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._all.stop()

    def planned(self, plan: Plan, missing: Sequence[TrialSpec]) -> None:
        self.total, self.done = len(missing), 0
        kept = len(plan.specs) - len(missing)
        self.console.print(f"{plan.study.slug}: {plan.study.question}")
        had = f", {kept} done before" if kept else ""
        self.console.print(
            f"{len(plan.specs)} trials ({plan.scale} scale, {', '.join(f'{k}={v}' for k, v in plan.options.items()) or 'no options'}){had}"
        )
        if self._whole is not None:  # of a study before
            self._all.remove_task(self._whole)
        self._whole = self._all.add_task("all trials", total=self.total)

    def started(self, spec: TrialSpec) -> None:
        if not spec.arm and self.plain:
            self._line(PREPARING)
        self._tasks[spec.key] = self._all.add_task(_name(spec), total=None)

    def progress(self, spec: TrialSpec, event: ProgressEvent) -> None:
        if spec.key in self._tasks:
            self._all.update(
                self._tasks[spec.key], completed=event.done, total=event.total, description=f"{_name(spec)}: {event.text}".rstrip(": ")
            )

    def finished(self, spec: TrialSpec, event: FinishedEvent) -> None:
        task = self._tasks.pop(spec.key, None)
        if task is not None:
            self._all.remove_task(task)
        if not spec.arm:
            return
        self.done += 1
        if self._whole is not None:
            self._all.advance(self._whole)
        if self.plain or event.status != "done":
            self._line(f"[{self.done}/{self.total}] {_name(spec)}: {event.status} after {show(event.seconds, 's')}")

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)


def _name(spec: TrialSpec) -> str:
    return f"{spec.arm}, seed {spec.seed}" if spec.arm else PREPARING


def tell_tuning(arm: str, trial: int, trials: int, status: str, objective: float | None) -> None:
    """One line about one trial of a tuning."""
    value = "" if objective is None else f", {objective:.4f}"
    print(f"{arm}: trial {trial}/{trials} {status}{value}", file=sys.stderr, flush=True)
