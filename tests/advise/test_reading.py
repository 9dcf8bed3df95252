"""Quality lost and what is left of costs, read from rows of figures; figures that cannot be compared are refused; every card can be read."""

from __future__ import annotations

import msgspec
import pytest

from fewer import papers
from fewer.advice import COSTS_OF, Advice
from fewer.advise.reading import Incomparable, check_figures, points
from fewer.study.figures import Figure
from fewer.study.recording import Record
from fewer.study.results import Row
from fewer.study.trial import load_study

ADVICE = Advice(
    on="text", option="text", job="using it", as_it_is="whole", method="cut", quality="loss", measure="loss (nats)",
    costs={"bytes": "size", "calls": "share"}, changes="the code", apply="fewer cut {thing}", over="share", as_it_is_at=1,
)  # fmt: skip
FIGURES = [Figure("loss", "loss"), Figure("size", "size", "bytes")]


def rows(values):
    return [Row(arm, seed, figure, at, value) for arm, seed, figure, at, value in values]


def test_each_seed_is_held_against_its_own():
    seen = rows(
        [("whole", seed, "loss", {"share": 1}, base) for seed, base in ((0, 2.0), (1, 4.0))]
        + [("whole", seed, "size", {}, 100.0) for seed in (0, 1)]
        + [("cut", seed, "loss", {"share": 0.5}, loss) for seed, loss in ((0, 2.2), (1, 4.0))]
        + [("cut", seed, "size", {"share": 0.5}, 50.0 + 10 * seed) for seed in (0, 1)]
    )
    (point,) = points("cut", ADVICE, seen, FIGURES, {"cut": "the cut"})
    assert point.choice == {"share": 0.5}
    assert point.label == "the cut"
    assert (point.lost.mean, point.lost.low, point.lost.high) == (pytest.approx(0.05), 0.0, pytest.approx(0.1))
    assert point.costs["bytes"].mean == pytest.approx(0.55)
    assert point.costs["calls"].mean == pytest.approx(0.5)  # the coordinate itself


def test_more_is_better_where_the_study_says_so_and_an_error_of_none_is_a_difference():
    advice = msgspec.structs.replace(ADVICE, over="", as_it_is_at=None, costs={"bytes": "size"})
    seen = rows([("whole", 0, "loss", {}, 0.8), ("whole", 0, "size", {}, 2.0), ("cut", 0, "loss", {}, 0.6), ("cut", 0, "size", {}, 1.0)])
    (point,) = points("cut", advice, seen, [Figure("loss", "right", "%", "higher"), FIGURES[1]], {})
    assert point.lost.mean == pytest.approx(0.25)
    seen[0] = seen[0]._replace(value=0.0)
    (point,) = points("cut", advice, seen, FIGURES, {})
    assert point.lost.mean == pytest.approx(0.6)


def test_what_was_not_measured_is_none():
    advice = msgspec.structs.replace(ADVICE, over="", as_it_is_at=None, costs={"bytes": "size"})
    (point,) = points(
        "cut", advice, rows([("cut", 0, "loss", {}, 0.6), ("cut", 0, "size", {}, 1.0), ("whole", 0, "size", {}, 2.0)]), FIGURES, {}
    )
    assert point.lost is None
    assert point.costs["bytes"].mean == 0.5
    assert points("cut", advice, rows([("whole", 0, "loss", {}, 0.6)]), FIGURES, {}) == []


def test_other_units_and_unknown_figures_are_refused():
    with pytest.raises(Incomparable, match="tells 'size' in 's', and bytes is compared in 'bytes'"):
        check_figures(ADVICE, [FIGURES[0], Figure("size", "size", "s")])
    with pytest.raises(Incomparable, match="tells 'size' in not at all"):
        check_figures(ADVICE, FIGURES[:1])
    with pytest.raises(Incomparable, match="which way 'loss' is better"):
        check_figures(ADVICE, [Figure("loss", "loss", better=""), FIGURES[1]])


def test_a_card_says_only_what_its_study_has():
    """Arms, options and figures that stand in the study, in the common units; a command that is one of fewer's."""
    verbs = {verb.name for source in (*papers.cards(), *papers.area_verbs()) for verb in source.commands} | {"run"}
    for card in papers.cards():
        for each in card.advise:
            study = load_study(f"{card.package}.study")
            assert {each.as_it_is, each.method} <= set(study.arms), card.slug
            assert not each.replaces or each.replaces in study.arms, card.slug
            assert each.option in study.options, card.slug
            check_figures(each, study.figures)
            name, verb = each.apply.split()[:2]
            assert name == "fewer", card.slug
            assert verb in verbs, card.slug
            assert each.apply.format(thing="a", out="b", text="c", data="d", **({each.over: 1} if each.over else {}))
            assert set(each.before) <= {other.slug for other in papers.cards()}, card.slug


def test_what_a_record_measured_alike_is_read_from_it():
    """All but the studies that log under other coordinates on a user's own."""
    own = {"smart-composites", "forward-gnn", "spright", "transform-once", "hamming-distances"}
    for card in papers.cards():
        for each in card.advise if card.record and card.slug not in own else []:
            record = msgspec.convert(card.record, Record)
            found = points(card.slug, each, record.results().rows, record.shown, {})
            mine = [point for point in found if point.arm == each.method]
            assert mine, card.slug
            assert all(point.lost is not None for point in mine), card.slug
            assert any(set(point.costs) == set(each.costs) for point in mine), card.slug


def test_every_word_that_can_be_asked_for_is_a_word_of_the_cards():
    from typing import get_args

    assert set(COSTS_OF) <= set(get_args(papers.Saves))
