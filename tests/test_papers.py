"""The catalogue: cards that are whole, broken cards told plainly, and an outside package's method."""

from __future__ import annotations

import json
import tomllib
from typing import get_args

import pytest

from fewer import papers
from fewer.errors import UserError
from house import ROOT

WHOLE = (ROOT / "tests" / "outside" / "src" / "guessing" / "paper.toml").read_text()


def read(tmp_path, text):
    (tmp_path / "paper.toml").write_text(text)
    return papers.read_card(tmp_path / "paper.toml")


def test_a_whole_card_is_read(tmp_path):
    card = read(tmp_path, WHOLE)
    assert card.slug == "guessing"
    assert card.results[0].value == 0.8
    assert card.record is None
    assert card.verdicts == {"holds": 0, "fails": 0, "undecided": 0, "not testable here": 0}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "On guessing the middle"\n', "", r"paper.toml: the field `title` is missing; mend the card"),
        ("value = 0.8", 'value = "0.8"', r"field `results\[0\].value`: Expected `float`, got `str`"),
        ("value = 0.8\n", "", r"the field `results\[0\].value` is missing"),
        ('saves = ["samples"]', 'saves = ["effort"]', r"field `saves\[0\]`: Invalid enum value 'effort'"),
        ('slug = "guessing"', 'slug = "Guess ing"', r"field `slug`: Expected `str` matching regex"),
        ("year = 1907", "year = 1907\nyears = 3", r"unknown field `years`"),
        ('title = "', "title = ", r"cannot be read as TOML"),
    ],
)
def test_a_broken_card_is_refused_naming_file_and_field(tmp_path, old, new, message):
    assert old in WHOLE
    with pytest.raises(UserError, match=message):
        read(tmp_path, WHOLE.replace(old, new))


def test_an_unknown_slug_gets_the_nearest(monkeypatch):
    with pytest.raises(UserError, match="there is no method 'backprop-free-mlp': did you mean 'backprop-free-mlps'"):
        papers.find("backprop-free-mlp")


def test_every_card_of_the_house_is_complete_and_in_its_place():
    for card in papers.cards():
        if card.package.startswith("fewer."):
            assert card.package == f"fewer.{card.area}.{card.slug.replace('-', '_')}"
            assert card.results or card.no_results, f"{card.slug} has none of its paper's numbers and does not say why"


FACTS = ROOT / ".." / "shared" / "papers.toml"


@pytest.mark.skipif(not FACTS.exists(), reason="the list of bibliographic facts is not on this machine")
def test_authors_venues_and_licences_are_those_of_the_papers():
    facts = tomllib.loads(FACTS.read_text(encoding="utf8"))
    for card in papers.cards():
        if card.package.startswith("fewer."):
            said = facts[card.slug]
            for name in ("title", "authors", "year", "venue", "code", "code_license"):
                assert getattr(card, name) == said[name], f"{card.slug}: {name}"
            assert said["arxiv"] in card.arxiv


def test_every_card_of_the_house_has_a_line_for_the_list_and_words_with_kinds():
    for card in papers.cards():
        if card.package.startswith("fewer."):
            assert card.brief, card.slug
        assert all(papers.KINDS[word] for word in card.applies_to)
    assert set(papers.KINDS) == set(get_args(papers.AppliesTo))


def test_methods_are_chosen_by_what_they_save_and_apply_to():
    chosen = papers.choose(papers.cards(), saves=["memory"], applies_to=["a transformers causal LM"])
    assert {"cfsp", "s2ft"} <= {card.slug for card in chosen}
    assert all("memory" in card.saves for card in chosen)
    with pytest.raises(UserError, match="--saves memry: expected one of .*did you mean 'memory'"):
        papers.choose(papers.cards(), saves=["memry"])


def test_every_extra_that_a_card_names_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for card in papers.cards():
        if card.package.startswith("fewer."):
            assert card.extra in extras


def test_an_outside_package_adds_its_method_to_the_catalogue_the_runs_and_the_verbs(fewer, tmp_path):
    listed = {entry["slug"] for entry in json.loads(fewer("list", "--json").stdout)}
    assert {"guessing", "backprop-free-mlps"} <= listed
    assert json.loads(fewer("search", "few", "guess", "--json").stdout)[0]["slug"] == "guessing"
    (tmp_path / "numbers.txt").write_text("3\n1\n2\n")
    assert fewer("guess", "numbers.txt").stdout == "2.0\n"
    assert "Guess the middle of the numbers in a file" in fewer("--help").stdout
    assert fewer("guess", "absent.txt", status=2).stderr.count("\n") == 1
