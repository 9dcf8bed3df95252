"""All of `fewer advise`, without the terminal: what applies, trying it, the answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import psutil

from fewer.advise.answer import Answer, answer, gain
from fewer.advise.combining import combine
from fewer.advise.things import Thing
from fewer.advise.trying import Until, attempt, candidates, in_order
from fewer.errors import UserError
from fewer.papers import Card
from fewer.quantities import show
from fewer.study.engines import Engine, LocalEngine
from fewer.study.runner import Observer
from fewer.study.store import Store

HEADROOM = 1.5  # of a model's own size: activations, a second copy while it is changed
FOR_TWO = 0.4  # of the time is kept for putting methods together, where that is asked for


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        saves: words of `papers.Saves`; without any, each method counts by all that its card says it saves.
        keep: the share of the quality that may be lost.
        seconds: how long it may take.
        only: slugs; all where there are none.
        beside: "text" and "data" -> the user's files.
        combine: whether the best are put together, too.
        seeds: of each study; its own number where it is None.
        first_seed: the first of them.
        replaced: whether what methods replace is tried, too.
    """

    saves: list[str] = field(default_factory=list)
    keep: float = 0.01
    seconds: float = 900.0
    only: list[str] = field(default_factory=list)
    beside: dict[str, str] = field(default_factory=dict)
    combine: bool = False
    seeds: int | None = None
    first_seed: int = 0
    replaced: bool = True


def check_memory(thing: Thing) -> None:
    """UserError where the thing does not fit into the memory that is free; nothing of it has been loaded."""
    free = psutil.virtual_memory().available
    if thing.memory * HEADROOM > free:
        raise UserError(
            f"{thing.given} needs about {show(thing.memory * HEADROOM, 'bytes')} in float32 with room to work, and {show(free, 'bytes')} are "
            "free; close other programs, take a larger machine, or a smaller model of the family"
        )


def advise(
    thing: Thing,
    question: Question,
    cards: Sequence[Card],
    store: str | Path,
    observer: Observer,
    *,
    device: str = "cpu",
    began: float | None = None,
    engine: Engine | None = None,
) -> Answer:
    """Try what applies to a thing within the time, and say what pays. What the store holds is not run again.

    Args:
        store: the SQLite file; it is made where it is not there.
        engine: where trials run; fresh processes of this machine by default.
        began: by `time.monotonic`, from when the time counts; now by default.
    """
    until = (time.monotonic() if began is None else began) + question.seconds
    trials = engine or LocalEngine()
    found, untried, left_out = candidates(thing, cards, beside=question.beside, only=question.only)
    if not question.replaced:
        found = [replace(each, advice=msgspec.structs.replace(each.advice, replaces="")) for each in found]
    ordered = in_order(found, lambda each: gain(each.recorded, each.card, each.advice, question.saves, question.keep))
    with Store(store, write=True) as opened:
        singly = until - (FOR_TWO * question.seconds if question.combine else 0.0)
        tried = attempt(
            ordered, opened, Until(trials, singly), observer, device=device, seeds=question.seeds, first_seed=question.first_seed
        )
        tried.refused = untried | tried.refused
        said = answer(thing, tried, opened, saves=question.saves, keep=question.keep, beside=question.beside, left_out=left_out)
        if not question.combine:
            return said
        together = combine(thing, said, tried, opened, Until(trials, until), observer, beside=question.beside, device=device)
        return msgspec.structs.replace(said, combined=together)
