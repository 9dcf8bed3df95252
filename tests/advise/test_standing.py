"""The studies of whether a first advice stands: orders are compared line by line, and their claims can fail. They run like a method's."""

from __future__ import annotations

import pytest

from fewer import papers
from fewer.advise import standing
from fewer.study import Results
from fewer.study.results import Row
from fewer.study.trial import load_study
from fewer.study.verdicts import judge

SLUGS = ("advise-language", "advise-images")


def orders(short, length):
    rows = [Row(standing.LENGTH, 0, "place", {"line": line}, place) for place, line in enumerate(length)]
    rows += [
        Row(standing.SHORT, seed, "place", {"line": line}, place) for seed, order in enumerate(short) for place, line in enumerate(order)
    ]
    return Results(
        [*rows, Row(standing.SHORT, 0, "cpu_seconds", {}, 1.0), Row(standing.LENGTH, 0, "cpu_seconds", {}, 2.0)],
        [standing.SHORT, standing.LENGTH],
    )


@pytest.mark.parametrize(
    ("short", "verdicts"),
    [
        (["abcd", "abcd", "abcd"], ["holds", "holds"]),
        (["abcd", "abcd", "bacd"], ["undecided", "undecided"]),
        (["dcba", "dcba", "dcba"], ["fails", "fails"]),
        (["acbd", "acbd", "acbd"], ["holds", "fails"]),
    ],
)
def test_the_claims_follow_the_orders(short, verdicts):
    study = load_study(papers.find("advise-language").package + ".study")
    found = judge(study, orders(short, "abcd"))
    assert [each.verdict for each in found] == verdicts


def test_lines_that_only_one_of_them_has_are_left_out():
    assert standing.correlations(orders(["acx"], "abc")).tolist() == [1.0]
    assert standing.first_of(orders(["acx"], "abc"), standing.SHORT, 0) == "a"


@pytest.mark.parametrize("slug", SLUGS)
def test_they_are_found_and_stand_in_no_list_of_methods(slug):
    card = papers.find(slug)
    assert card.slug not in {each.slug for each in papers.cards()}
    study = load_study(f"{card.package}.study")
    assert study.slug == slug
    assert card.record is None or card.record["slug"] == slug
    assert not card.trouble
