"""Several methods at once: those that write a thing of the same kind go first, the last one's study judges all of them alike.

With a writer A and a last method B, B's study is run on the thing and on what A makes of it. It says all four: the thing as it is, A alone,
B alone, both; each held against the first.
"""

from __future__ import annotations

import itertools
import math
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from fewer.advise.answer import Answer, Line, command_of, in_words, pays
from fewer.advise.reading import Point, points
from fewer.advise.things import Thing
from fewer.advise.trying import Candidate, Tried, Until
from fewer.errors import UserError, WorkFailed
from fewer.study.results import Row
from fewer.study.runner import Observer, plan, run_trials
from fewer.study.store import Store
from fewer.study.trial import load_study

MOST = 3  # methods at once
AS_IT_IS, REST = "as it is", "+"


class Combined(msgspec.Struct, frozen=True):
    """Methods put together.

    Attributes:
        points: "A", "B", "A + B" -> what each loses and needs, beside the thing as it is.
        costs: the common costs that were measured of all.
        gains: cost -> (together, product of the single ones).
        loss: (together, sum of the single ones).
        said: that in a sentence.
        commands: that apply them for good, in order.
    """

    slugs: list[str]
    points: dict[str, Point]
    costs: list[str]
    gains: dict[str, tuple[float, float]]
    loss: tuple[float, float]
    said: str
    commands: list[str]


@dataclass(frozen=True)
class _Step:
    """A method with the choice that it was found best at."""

    candidate: Candidate
    line: Line


def combine(
    thing: Thing, found: Answer, tried: Tried, store: Store, engine: Until, observer: Observer, *, beside: Mapping[str, str], device: str
) -> list[Combined]:
    """Put the best together that the cards allow, and measure them; a list of one, or of none where no two go together or the time is up."""
    chain = next(iter(chains(_steps(found, tried))), None)
    if chain is None:
        return []
    *writers, last = chain
    try:
        made = _things(thing, writers, store.path.with_suffix(".made"), beside)
        rows = [row for names, path in made.items() for row in _judged(last, names, path, store, engine, observer, device)]
    except (UserError, WorkFailed) as refusal:
        tried.refused[" + ".join(each.candidate.slug for each in chain)] = str(refusal)
        return []
    combined = read(chain, rows, thing, beside)
    return [combined] if combined else []


def _steps(found: Answer, tried: Tried) -> list[_Step]:
    """The best line of each method that pays, best first."""
    best: dict[str, _Step] = {}
    for line in (line for group in found.groups for line in group.lines if pays(line)):
        if line.slug not in best:
            best[line.slug] = _Step(tried.plans[line.slug][0], line)
    return list(best.values())


def chains(steps: Sequence[_Step]) -> Iterator[list[_Step]]:
    """Orders in which the cards let two or three follow each other: what promises most first, by the product of what is left."""
    found = [list(each) for count in range(2, MOST + 1) for each in itertools.permutations(steps, count) if allowed(each)]
    yield from sorted(found, key=lambda chain: math.prod(step.line.left for step in chain))


def allowed(chain: Iterable[_Step]) -> bool:
    """Each writes what the next takes and says that it may follow; all touch different things, of one kind, for one job and measure."""
    steps = list(chain)
    advice = [step.candidate.advice for step in steps]
    alike = len({(each.on, each.job, each.measure) for each in advice}) == 1
    different = len({each.changes for each in advice}) == len(advice)
    follows = all(_may_follow(*pair) for pair in itertools.pairwise(steps))
    return alike and different and follows


def _may_follow(first: _Step, then: _Step) -> bool:
    a, b = first.candidate, then.candidate
    return a.advice.writes and (b.slug in a.advice.before or a.slug in b.advice.after)


def _things(thing: Thing, writers: Sequence[_Step], folder: Path, beside: Mapping[str, str]) -> dict[tuple[str, ...], str]:
    """Names of writers -> the thing after them, for every part of the writers in their order; made by their own commands, once."""
    made: dict[tuple[str, ...], str] = {(): thing.value}
    for count in range(1, len(writers) + 1):
        for part in itertools.combinations(writers, count):
            names = tuple(step.candidate.slug for step in part)
            choices = "-".join(f"{name}-{value}" for step in part for name, value in step.line.point.choice.items())
            out = folder / "-".join([*names, choices])
            if not out.exists():
                source = replace(thing, given=made[names[:-1]], value=made[names[:-1]])
                folder.mkdir(parents=True, exist_ok=True)
                _apply(command_of(part[-1].candidate.advice, source, dict(beside), part[-1].line.point.choice, out=shlex.quote(str(out))))
            made[names] = str(out)
    return made


def _apply(command: str) -> None:
    """Run a card's command in a process of its own; UserError with its last words where it fails."""
    words = shlex.split(command)
    if words[0] != "fewer":
        raise UserError(f"{command!r} is no command of fewer; expected `fewer VERB ...` on the card")
    done = subprocess.run([sys.executable, "-m", "fewer", *words[1:]], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UserError(f"`{command}` failed: {said.removeprefix('error: ')}")


def _judged(last: _Step, names: tuple[str, ...], path: str, store: Store, engine: Until, observer: Observer, device: str) -> list[Row]:
    """The last method's study on a thing: its rows, the arms renamed to what was done to the thing of the user's."""
    candidate, study = last.candidate, load_study(last.candidate.module)
    given = candidate.given | {candidate.advice.option: path}
    seeds = last.line.point.lost.seeds if last.line.point.lost else 1
    arms = [candidate.advice.as_it_is, candidate.advice.method]
    whole = plan(study, candidate.module, given=given, arms=arms, seeds=seeds, device=device, jobs=1, store=store)
    if len(store.finished(whole.specs)) < len(whole.specs):
        failed = run_trials(whole, store, engine, observer)
        if failed:
            raise WorkFailed("; ".join(each.splitlines()[-1] for each in failed.values()))
    named = {arms[0]: f" {REST} ".join(names) or AS_IT_IS, arms[1]: f" {REST} ".join([*names, candidate.slug])}
    return [row._replace(arm=named[row.arm]) for row in store.rows(whole.specs)]


def read(chain: Sequence[_Step], rows: Sequence[Row], thing: Thing, beside: Mapping[str, str]) -> Combined | None:
    """What the rows say, all held against the thing as it is; None where not all was measured."""
    last = chain[-1].candidate
    study, choice = load_study(last.module), chain[-1].line.point.choice
    slugs = [step.candidate.slug for step in chain]
    found: dict[str, Point] = {}
    for name in dict.fromkeys([*slugs, f" {REST} ".join(slugs)]):
        advice = msgspec.structs.replace(last.advice, as_it_is=AS_IT_IS, method=name, replaces="")
        at = [point for point in points(name, advice, rows, study.figures, {}) if point.choice == choice]
        if not at or at[0].lost is None:
            return None
        found[name] = at[0]
    *single, together = found.values()
    costs = [cost for cost in together.costs if all(cost in each.costs for each in single)]
    gains = {cost: (together.costs[cost].mean, math.prod(each.costs[cost].mean for each in single)) for cost in costs}
    loss = (_lost(together), sum(_lost(each) for each in single))
    given, commands = thing, []
    for number, step in enumerate(chain):
        out = "OUT" if number == len(chain) - 1 else f"OUT-{number + 1}"
        commands.append(command_of(step.candidate.advice, given, dict(beside), step.line.point.choice, out=out))
        given = replace(thing, given=out)
    return Combined(slugs, found, costs, gains, loss, _said(gains, loss), commands)


def _lost(point: Point) -> float:
    assert point.lost is not None
    return point.lost.mean


def _said(gains: Mapping[str, tuple[float, float]], loss: tuple[float, float]) -> str:
    parts = [
        f"{both:.2f} of the {in_words(cost)} are left, where the product of the single ones is {product:.2f}"
        for cost, (both, product) in gains.items()
    ]
    return f"Together {'; '.join(parts)}. Quality lost is {100 * loss[0]:.2g} %, where the sum of the single ones is {100 * loss[1]:.2g} %."
