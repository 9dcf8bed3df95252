"""Methods put together: which orders the cards allow, and what is said of the gains and losses, on a language model that one pass makes smaller."""

from __future__ import annotations

import msgspec
import pytest

from fewer import papers
from fewer.advise.answer import Line
from fewer.advise.combining import _Step, allowed, chains, read
from fewer.advise.reading import Point, Spread
from fewer.advise.things import Thing
from fewer.advise.trying import Candidate
from fewer.study.results import Row

THING = Thing("model", ("a transformers causal LM",), "a model", "model")


def step(slug, left, choice=None, **changed):
    card = papers.find(slug)
    advice = msgspec.structs.replace(card.advise[0], **changed)
    spread = Spread(0.0, 0.0, 0.0, 2)
    line = Line(slug, slug, "dense", False, Point(slug, advice.method, slug, choice or {}, spread, {}), left, True)
    return _Step(Candidate(card, advice, {advice.option: "model"}, [], 1.0), line)


def test_only_orders_that_the_cards_allow():
    prune, cast, skip, cut = step("cfsp", 0.8), step("int-vs-fp", 0.4), step("ffn-skip", 0.9), step("factor-llm", 0.9)
    found = [[each.candidate.slug for each in chain] for chain in chains([cast, prune, skip, cut])]
    assert found[0] == ["cfsp", "int-vs-fp"]  # the least of all that may be
    assert ["int-vs-fp", "cfsp"] not in found
    assert all(chain[0] == "cfsp" for chain in found)


def test_what_touches_the_same_or_is_judged_otherwise_is_not_put_together():
    prune = step("cfsp", 0.8)
    assert allowed([prune, step("int-vs-fp", 0.4)])
    assert not allowed([prune, step("int-vs-fp", 0.4, changes="feed-forward networks")])
    assert not allowed([prune, step("int-vs-fp", 0.4, measure="another")])
    assert not allowed([prune, step("int-vs-fp", 0.4, job="sampling")])
    assert not allowed([step("cfsp", 0.8, writes=False), step("int-vs-fp", 0.4)])
    assert not allowed([step("cfsp", 0.8, before=[]), step("int-vs-fp", 0.4)])
    assert allowed([step("cfsp", 0.8, before=[]), step("int-vs-fp", 0.4, after=["cfsp"])])


def test_gains_multiply_and_losses_add_as_measured():
    """Bytes 100, halved by either, a quarter by both; loss 2.0, 2.02, 2.04 and 2.08."""
    at = {"pair": "mx8", "rotation": "plain"}
    values = {"as it is": (2.0, 100.0), "cfsp": (2.02, 50.0), "int-vs-fp": (2.04, 50.0), "cfsp + int-vs-fp": (2.08, 25.0)}
    rows = [
        Row(arm, seed, figure, at, value)
        for arm, pair in values.items()
        for seed in (0, 1)
        for figure, value in zip(("loss", "bytes"), pair, strict=True)
    ]
    found = read([step("cfsp", 0.8, {"removed": 0.3}), step("int-vs-fp", 0.4, {"pair": "mx8"})], rows, THING, {"text": "notes.txt"})
    assert found is not None
    assert found.gains == {"bytes": (0.25, 0.25)}
    assert found.loss == (pytest.approx(0.04), pytest.approx(0.03))
    assert found.said == (
        "Together 0.25 of the bytes are left, where the product of the single ones is 0.25. Quality lost is 4 %, where the sum of the single "
        "ones is 3 %."
    )
    assert found.commands == [
        "fewer prune model OUT-1 --text notes.txt --ratio 0.3",
        "fewer formats pack OUT-1/model.safetensors OUT.safetensors --format mxint8",
    ]
    assert read([step("cfsp", 0.8), step("int-vs-fp", 0.4, {"pair": "mx8"})], rows[:4], THING, {}) is None
