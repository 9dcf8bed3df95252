"""What the terminal shows: quantities in words, tables of a run, sparklines."""

from __future__ import annotations

import io
import math

import pytest
from guessing.study import study as guessing
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fewer import papers
from fewer.quantities import show, show_change
from fewer.report.readme import methods_table
from fewer.report.terminal import CardsTable, card_view, races_table, run_view, sparkline
from fewer.study import LocalEngine, RaceOutcome, Store, make_record, plan, run
from house import ROOT


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    with Store(tmp_path_factory.mktemp("terminal") / "store.sqlite", write=True) as store:
        return make_record(run(plan(guessing, "guessing.study", seeds=2, store=store), store, LocalEngine()), [])


@pytest.fixture(scope="module")
def card():
    return papers.read_card(ROOT / "tests" / "outside" / "src" / "guessing" / "paper.toml", "guessing")


def written(what, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(what)
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_run_fits_the_width_and_keeps_its_words(record, width):
    text = written(run_view(record), width)
    assert max(map(len, text.splitlines())) <= width
    squeezed = "".join(text.split())
    for words in ("the mean is nearer", "no guess is far off", "fails", "0.8 %", "The mean was off by"):
        assert "".join(words.split()) in squeezed or width == 60


def test_a_point_of_a_curve_may_be_a_column(record):
    results = record.results()
    text = written(run_view(record), 160)
    assert "error of 8" in text
    for arm in ("median", "mean"):
        assert show(float(results.mean("error", arm, size=8)), "") in text


def test_methods_stand_under_their_areas_and_fit_a_narrow_terminal(card):
    cards = [*papers.cards(), card]
    for width in (60, 80, 160):
        text = written(CardsTable(cards), width)
        assert max(map(len, text.splitlines())) <= width
        assert all(each.slug in text for each in cards)
        assert text.index("forward only") < text.index("backprop-free-mlps") < text.index("statistics") < text.index("guessing")
    assert "memory, seconds" in text, "what they save, where there is room"
    assert len(text.splitlines()) <= 2 * 24 * len(cards) // 44 + 12, "44 of them fit two screens"


def test_a_card_shows_all_that_it_says(card):
    text = " ".join(written(card_view(card), 200).split())
    for said in (card.title, card.summary, card.when_not, card.costs, card.replaces, *card.authors):
        assert said in text
    assert card.brief in " ".join(written(CardsTable([card]), 300).split())


def test_a_race_says_who_won_and_what_was_asked_for():
    won = RaceOutcome("quick", "peer", "time", 0.8, "s", 0.5, 0.4, 0.6, 0.001, 0.002)
    lost = RaceOutcome("slow", "peer", "time", 0.8, "s", 0.9, 0.8, 1.1, 0.009, 0.01)
    text = written(races_table([won, lost]), 160)
    assert "0.5" in text
    assert "0.9" in text
    assert "0.8: reached" in text
    assert "0.8: not reached" in text


def test_a_figure_that_is_nan_is_shown_as_nan(tmp_path):
    with Store(tmp_path / "store.sqlite", write=True) as store:
        planned = plan(guessing, "guessing.study", seeds=1, given={"trouble": "nan"}, arms=["mean", "median"], store=store)
        assert "NaN" in written(run_view(make_record(run(planned, store, LocalEngine()), [])))


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=200), st.integers(1, 60))
def test_a_sparkline_never_exceeds_its_width_and_its_top_is_the_highest_block(values, width):
    line = sparkline(values, width)
    assert 1 <= len(line) <= min(width, len(values))
    if len(values) <= width and max(values) > min(values):
        assert line[values.index(max(values))] == "█"


@given(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from(["", "%", "s", "bytes", "J", "FLOP", "points"]))
def test_any_number_in_any_unit_is_shown_in_few_characters(value, unit):
    shown = show(value, unit)
    assert shown
    if abs(value) < 1e15 or math.isnan(value):
        assert len(shown) < 40
    if math.isfinite(value):
        assert show_change(value, unit)[0] in "+-"


def test_the_readme_table_names_each_method_once(card):
    table = methods_table([card])
    assert table.count(card.slug) >= 1
    assert card.summary in table
