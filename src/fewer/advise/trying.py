"""Which methods apply to a thing, in which order they are tried, and trying them: study by study, seed by seed, until the time is up."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fewer.advice import Advice
from fewer.advise.reading import Incomparable, Point, check_figures, points
from fewer.advise.things import Thing
from fewer.errors import UserError, WorkFailed
from fewer.papers import Card
from fewer.quantities import show
from fewer.study.declaration import Study
from fewer.study.engines import Engine, Events
from fewer.study.recording import Record
from fewer.study.runner import Observer, Plan, plan, run_trials
from fewer.study.store import Store
from fewer.study.trial import FinishedEvent, TrialSpec, load_study

UNKNOWN = 60.0  # seconds that a method is expected to take of which nothing is recorded


@dataclass(frozen=True)
class Candidate:
    """A method that applies, and how its study is run on the thing.

    Attributes:
        given: the study's options.
        recorded: its points on the study's own data, where it was recorded.
        seconds: that its arms took there, a seed of each; infinite seeds cost no more than that each.
    """

    card: Card
    advice: Advice
    given: dict[str, str]
    recorded: list[Point]
    seconds: float

    @property
    def slug(self) -> str:
        return self.card.slug

    @property
    def module(self) -> str:
        return f"{self.card.package}.study"

    @property
    def arms(self) -> list[str]:
        """The thing as it is first, so that whatever follows can be read; what the method replaces last."""
        named = (self.advice.as_it_is, self.advice.method, self.advice.replaces)
        return list(dict.fromkeys(arm for arm in named if arm))


@dataclass
class Tried:
    """What came of the candidates: the study and the plan of each that was begun, and why others have no answer."""

    plans: dict[str, tuple[Candidate, Study, Plan]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unfitting: dict[str, str] = field(default_factory=dict)


def candidates(
    thing: Thing, cards: Iterable[Card], *, beside: dict[str, str], only: Sequence[str] = ()
) -> tuple[list[Candidate], dict[str, str], dict[str, str]]:
    """The methods whose cards say how to try them on the thing; why others that apply cannot be tried; why the rest does not apply.

    Args:
        beside: "text" or "data" -> the user's file.
        only: slugs; the others are left out without a word.
    """
    found, untried, left_out = [], {}, {}
    for card in cards:
        if only and card.slug not in only:
            continue
        meant = [word for word in thing.words if word in card.applies_to]
        ways = [each for word in meant for each in card.advise if each.on == word]
        if not meant:
            left_out[card.slug] = f"applies to {', '.join(card.applies_to)}"
        elif not ways:
            untried[card.slug] = f"its card does not say how to try it on {meant[0]}; `fewer show {card.slug}` says what it does"
        elif lacking := [name for name in ways[0].needs if name not in beside]:
            untried[card.slug] = f"needs --{lacking[0]} too"
        else:
            found.append(_candidate(card, ways[0], thing, beside))
    return found, untried, left_out


def _candidate(card: Card, advice: Advice, thing: Thing, beside: dict[str, str]) -> Candidate:
    own = {name: value for name, value in beside.items() if name in card_options(card)}
    given = advice.settings | own | {advice.option: thing.value}
    try:
        record = msgspec.convert(card.record, Record)
    except msgspec.ValidationError:  # there is none, or one of another version
        return Candidate(card, advice, given, [], UNKNOWN)
    arms = {advice.as_it_is, advice.method, advice.replaces} - {""}
    labels = {name: arm.label for name, arm in record.arms.items()}
    try:
        recorded = points(card.slug, advice, record.results().rows, record.shown, labels)
    except Incomparable:
        recorded = []
    return Candidate(card, advice, given, recorded, record.seconds * len(arms) / (record.seeds * len(record.arms)))


def card_options(card: Card) -> set[str]:
    """The options that a method's study takes, as its record names them; "text" and "data" where it was not recorded."""
    return set(card.record["options"]) if card.record else {"text", "data"}


def in_order(found: Iterable[Candidate], gain: Callable[[Candidate], float]) -> list[Candidate]:
    """The most promising and cheapest first.

    What a method's record saves (the logarithm of the ratio) for each second that it is expected to take; methods whose record saves
    nothing within the quality that is to be kept come last, cheapest first.

    Args:
        gain: of a candidate, by its record: what is left of the costs that matter at the best choice that keeps the quality; 1 where none does.
    """

    def promise(each: Candidate) -> tuple[float, float]:
        left = gain(each)
        return (math.log(min(left, 1.0)) / each.seconds if left > 0 else -math.inf, each.seconds)

    return sorted(found, key=promise)


class Until:
    """An engine whose trials end by a deadline: what is expected to come too late is not started, what runs then is stopped.

    A trial is expected to take what it took with another seed, or as long as the longest of its study on this thing, or `recorded`.
    """

    def __init__(self, engine: Engine, deadline: float) -> None:
        self.engine, self.deadline = engine, deadline
        self.recorded: dict[str, float] = {}  # slug -> seconds of a trial on the study's own
        self.taken: dict[tuple[str, str], float] = {}

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def expected(self, spec: TrialSpec) -> float:
        same = self.taken.get((spec.slug, spec.arm))
        others = [seconds for (slug, arm), seconds in self.taken.items() if slug == spec.slug and arm]
        return same if same is not None else max([self.recorded.get(spec.slug, 0.0), *others])

    def learn(self, store: Store, specs: Iterable[TrialSpec]) -> None:
        """Take over what trials took that are done already."""
        wanted = {(spec.slug, spec.arm, spec.seed): spec.settings for spec in specs}
        for slug in {spec.slug for spec in specs}:
            for trial in store.trials(slug):
                if trial.status == "done" and trial.seconds and wanted.get((slug, trial.arm, trial.seed)) == trial.settings:
                    self.taken[slug, trial.arm] = max(trial.seconds, self.taken.get((slug, trial.arm), 0.0))

    def run(self, specs: Sequence[TrialSpec], *, time_limit: float, answer: Any = None) -> Events:
        for spec in specs:
            if self.left <= 0 or (spec.arm and self.expected(spec) > self.left):
                return
            for done, event in self.engine.run([spec], time_limit=min(time_limit, self.left), answer=answer):
                if isinstance(event, FinishedEvent) and event.status == "done":
                    self.taken[spec.slug, spec.arm] = max(event.seconds, self.taken.get((spec.slug, spec.arm), 0.0))
                yield done, event


def attempt(
    ordered: Sequence[Candidate],
    store: Store,
    engine: Until,
    observer: Observer,
    *,
    device: str = "cpu",
    seeds: int | None = None,
    first_seed: int = 0,
) -> Tried:
    """Try the candidates in their order with a first seed, then all with a second, until all are done or the time is up.

    What the store holds is not run again.
    """
    tried, active = Tried(), list(ordered)
    round = 0
    while active:
        seed, going_on = first_seed + round, []
        for each in active:
            if round == 0 and engine.left <= 0 and not store.trials(each.slug):  # nothing of it is imported any more
                tried.unfitting[each.slug] = "the time was up; a larger --budget goes on from there"
                continue
            try:
                study = _study(each)
                whole = plan(study, each.module, given=each.given, arms=each.arms, seeds=seed + 1, device=device, jobs=1, store=store)
            except (UserError, Incomparable) as refusal:
                tried.refused[each.slug] = str(refusal)
                continue
            specs = sorted((spec for spec in whole.specs if spec.seed == seed), key=lambda spec, each=each: each.arms.index(spec.arm))
            tried.plans[each.slug] = (each, study, whole)
            _try(each, dataclasses.replace(whole, specs=tuple(specs)), store, engine, observer, tried, first=round == 0)
            if round + 1 < (seeds or study.seeds) and each.slug not in tried.refused | tried.unfitting:
                going_on.append(each)
        active, round = going_on, round + 1
    return tried


def _try(each: Candidate, part: Plan, store: Store, engine: Until, observer: Observer, tried: Tried, *, first: bool) -> None:
    """Run what is missing of one seed, as far as it fits into the time that is left."""
    missing = _missing(part, store)
    if not missing:
        return
    engine.recorded[each.slug] = each.seconds / len(each.arms)
    engine.learn(store, part.specs)
    why = ""
    if engine.left >= engine.expected(missing[0]):
        try:
            failed = list(run_trials(part, store, engine, observer).values())
        except UserError as refusal:
            tried.refused[each.slug] = str(refusal)
            return
        except WorkFailed as failure:
            failed = [str(failure)]
        late = engine.left <= 0 or any(message.startswith("timed out") for message in failed)
        if failed and not late:
            tried.refused[each.slug] = f"came to grief: {failed[0].splitlines()[-1]}"
            return
        why = "was stopped when the time was up" if failed else ""
    if first and (lacking := _missing(part, store)):
        expected = f"`{lacking[0].arm}` is expected to take {show(engine.expected(lacking[0]), 's')}, and {show(max(0.0, engine.left), 's')} were left"
        tried.unfitting[each.slug] = f"{why or expected}; a larger --budget goes on from there"


def _missing(part: Plan, store: Store) -> list[TrialSpec]:
    have = store.finished(part.specs)
    return [spec for spec in part.specs if spec.key not in have]


def _study(each: Candidate) -> Study:
    """The method's study; UserError or Incomparable where it cannot be had, or tells what cannot be compared."""
    study = load_study(each.module)
    check_figures(each.advice, study.figures)
    return study
