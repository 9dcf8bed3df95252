"""A study's declaration: a question, a task, the arms that do the job each in its way, and the claims about them."""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fewer.errors import UserError
from fewer.papers import did_you_mean
from fewer.study.figures import Chart, Figure
from fewer.study.spaces import Space

YES, NO = ("yes", "true", "1"), ("no", "false", "0")


class Scale(StrEnum):
    """How large a study runs."""

    QUICK = "quick"  # two CPU cores, at most five minutes
    FULL = "full"  # a GPU or a long run, the paper's own setting as far as possible


@dataclass(frozen=True)
class Option:
    """Something a user may set with `--set name=value`."""

    name: str
    default: Any
    choices: Sequence[Any] | None
    help: str
    least: float | None = None
    most: float | None = None

    def parse(self, text: str) -> Any:
        """The value that `text` means, in the default's type; UserError where it means none."""
        if isinstance(self.default, bool):
            if text.lower() not in YES + NO:
                raise UserError(f"--set {self.name}={text}: expected one of {', '.join(YES + NO)}")
            return text.lower() in YES
        try:
            value = type(self.default)(text)
        except ValueError:
            raise UserError(f"--set {self.name}={text}: expected {type(self.default).__name__}, such as {self.default}") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--set {self.name}={text}: expected a finite number, such as {self.default}")
        for bound, outside, word in ((self.least, operator.lt, "least"), (self.most, operator.gt, "most")):
            if bound is not None and outside(value, bound):
                raise UserError(f"--set {self.name}={text}: expected at {word} {bound:g}, such as {self.default}")
        if self.choices and value not in self.choices:
            raise UserError(
                f"--set {self.name}={text}: expected one of {', '.join(map(str, self.choices))}{did_you_mean(text, self.choices)}"
            )
        return value


AtFull = Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Arm:
    """One way to do the job: the function that does it, its settings and what may be tuned."""

    name: str
    run: Callable[..., None]
    against: str | None
    settings: Mapping[str, Any]
    at_full: AtFull
    space: Mapping[str, Space]
    label: str

    def defaults(self, scale: Scale, options: Mapping[str, Any]) -> dict[str, Any]:
        """The settings before tuning: the space's defaults, then the arm's own, then those of the full scale."""
        spaced = {name: space.default for name, space in self.space.items()}
        if scale is not Scale.FULL:
            return spaced | dict(self.settings)
        return spaced | dict(self.settings) | dict(self.at_full(options) if callable(self.at_full) else self.at_full)


@dataclass(frozen=True)
class Claim:
    """A sentence about the results that is tested, with the paper's figure beside it."""

    text: str
    test: Callable[..., Any]
    paper: str
    if_fails: str  # what explains it, shown only where the claim fails


@dataclass
class Study:
    """A side-by-side comparison.

    Args:
        slug: the method's slug.
        question: what the comparison answers, one line.
        baseline: the arm the others are held against (an arm can name another one by `against`).
        figures: the figures shown in tables, first the one that says most.
        charts: what the page draws.
        time_limit: seconds after which a trial is stopped and recorded as timed out.
        memory_limit: bytes of data a trial may hold, or None.
        objective: the figure that tuning maximises, as the arms report it by `trial.objective`, in words.
        seeds: how many, unless the command says.
        jobs: trials at a time, unless the command says, and at most one a core; more than one where arms take one thread and no time of the
            clock is told (processor time may be).

    Raises:
        ValueError: several trials at a time, and "seconds" among the figures.

    Examples:
        >>> study = Study("guess", question="Which guess is nearer?", baseline="zero")
        >>> @study.task
        ... def task(scale): return {"truth": 3.0}
        >>> @study.arm("zero")
        ... def zero(task, trial): trial.log("error", abs(task["truth"]))
        >>> @study.arm("two")
        ... def two(task, trial): trial.log("error", abs(task["truth"] - 2))
        >>> @study.claim("two is nearer")
        ... def nearer(results): return results.ratio("error", "two", "zero") < 1
        >>> sorted(study.arms)
        ['two', 'zero']
    """

    slug: str
    question: str
    baseline: str | None = None
    figures: Sequence[Figure] = ()
    charts: Sequence[Chart] = ()
    time_limit: float = 1800.0
    memory_limit: int | None = None
    objective: str = "validation accuracy"
    seeds: int = 3
    jobs: int = 1
    options: dict[str, Option] = field(default_factory=dict, init=False)
    arms: dict[str, Arm] = field(default_factory=dict, init=False)
    claims: list[Claim] = field(default_factory=list, init=False)
    _task: Callable[..., Any] | None = field(default=None, init=False)
    _summary: Callable[..., str] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.jobs > 1 and any(figure.name == "seconds" for figure in self.figures):
            raise ValueError(f"{self.slug}: jobs is {self.jobs} and seconds are told; expected cpu_seconds, or one trial at a time")

    def option(
        self,
        name: str,
        default: Any,
        choices: Sequence[Any] | None = None,
        help: str = "",
        *,
        least: float | None = None,
        most: float | None = None,
    ) -> None:
        """Declare what `--set name=value` may set; the task function gets it if it has a parameter of that name.

        Args:
            default: its type is the option's: a boolean takes yes, no, true, false, 1 or 0.
            choices: all that will do.
            least, most: limits of a number.
        """
        self.options[name] = Option(name, default, choices, help, least, most)

    def task(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Declare what all arms work on: `function(scale, **options)`.

        It is built once before the first trial (so that data are fetched, and trouble with them is told, once) and again, from what is
        cached by then, in each trial's own process. What is costly to make belongs into `fewer.tasks`, which caches it on disk.
        Test data belong into the attribute `test`: while settings are tuned it is sealed. A ValueError or OSError, where the user has set
        an option, is told in one line: it is about the user's own file.
        """
        self._task = function
        return function

    def build_task(self, scale: Scale, settings: Mapping[str, Any]) -> Any:
        """What the task function makes at this scale, given the options it asks for."""
        if self._task is None:
            return None
        asked = inspect.signature(self._task).parameters
        given = {name: settings[name] for name in self.options if name in asked and name in settings}
        try:
            return self._task(scale, **given)
        except (ValueError, OSError) as error:
            set_by_user = [name for name, value in given.items() if value != self.options[name].default]
            if not set_by_user:
                raise
            raise UserError(f"--set {', '.join(f'{name}={given[name]}' for name in set_by_user)}: {error}") from error

    def arm(
        self,
        name: str,
        *,
        against: str | None = None,
        settings: Mapping[str, Any] | None = None,
        at_full: AtFull | None = None,
        space: Mapping[str, Space] | None = None,
        label: str = "",
    ) -> Callable[[Callable[..., None]], Callable[..., None]]:
        """Declare an arm: `function(task, trial)`. `space` says which settings `fewer tune` may choose.

        `at_full` are settings of the full scale, or a function that gives them for the study's options (another net for another set).
        """

        def declare(function: Callable[..., None]) -> Callable[..., None]:
            held_against = against or (self.baseline if self.baseline != name else None)
            self.arms[name] = Arm(name, function, held_against, dict(settings or {}), at_full or {}, dict(space or {}), label or name)
            return function

        return declare

    def arm_table(self, run: Callable[..., None], table: Mapping[str, Mapping[str, Any]], **shared: Any) -> None:
        """Declare many arms that one function runs, a row an arm: `run(task, trial, **rest)`.

        Args:
            table: name -> what the arm is: `label`, `against`, `settings`, `at_full` and `space` as `arm` takes them; the rest goes to `run`.
            shared: what all rows say alike; a row's own word comes first.
        """
        for name, row in table.items():
            said = shared | dict(row)
            declared = {word: said.pop(word) for word in ("against", "settings", "at_full", "space", "label") if word in said}
            self.arm(name, **declared)(functools.partial(run, **said))

    def claim(self, text: str, *, paper: str = "", if_fails: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Declare a claim: `function(results)` returns a comparison of figures (or raises NotTestable)."""

        def declare(function: Callable[..., Any]) -> Callable[..., Any]:
            self.claims.append(Claim(text, function, paper, if_fails))
            return function

        return declare

    def summary(self, function: Callable[..., str]) -> Callable[..., str]:
        """Declare how to say the results in one plain paragraph: `function(results)`."""
        self._summary = function
        return function

    def summarise(self, results: Any) -> str:
        """The plain paragraph, or nothing where the study declares none or the results it needs are missing."""
        from fewer.study.results import NotTestable

        try:
            return self._summary(results) if self._summary else ""
        except NotTestable:
            return ""

    def choose_options(self, given: Mapping[str, str]) -> dict[str, Any]:
        """All options with their values, `given` in place of the defaults; UserError on an unknown key or value."""
        for name in given:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise UserError(f"--set {name}: {self.slug} has no such option{did_you_mean(name, self.options)} (known: {known})")
        return {name: option.parse(given[name]) if name in given else option.default for name, option in self.options.items()}

    def choose_arms(self, names: Sequence[str]) -> list[Arm]:
        """The arms of these names, or all; UserError on an unknown one."""
        for name in names:
            if name not in self.arms:
                raise UserError(f"{self.slug} has no arm {name!r}{did_you_mean(name, self.arms)} (known: {', '.join(self.arms)})")
        return [arm for arm in self.arms.values() if not names or arm.name in names]
