"""The law of the first to finish against races by hand, diagnoses, and replays against every subset."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.language import diagnose, expected_min, ffs_accuracy
from fewer.language.first_finish_search import replay

RACES = 200_000


def raced(a, right_law, wrong_law, n, races=RACES):
    """The share of races that a right trace wins."""
    draw = np.random.default_rng(0)
    right = draw.random((races, n)) < a
    lengths = np.where(right, draw.normal(*right_law, (races, n)), draw.normal(*wrong_law, (races, n)))
    return right[np.arange(races), lengths.argmin(1)].mean()


@pytest.mark.parametrize(
    ("a", "right_law", "wrong_law"),
    [(0.6, (100, 20), (130, 20)), (0.3, (100, 30), (100, 10)), (0.75, (100, 10), (120, 45))],
)
def test_the_integral_is_what_races_come_to(a, right_law, wrong_law):
    for n in (1, 4, 8):
        assert abs(ffs_accuracy(a, right_law, wrong_law, n) - raced(a, right_law, wrong_law, n)) < 0.005
    assert ffs_accuracy(a, right_law, wrong_law, 1) == pytest.approx(a, abs=1e-6)


def test_wider_wrong_lengths_make_accuracy_fall_with_n():
    """Though wrong traces are longer on average."""
    curve = [ffs_accuracy(0.75, (100, 10), (120, 45), n) for n in (1, 4, 16, 64)]
    assert curve == sorted(curve, reverse=True)
    assert curve[-1] < 0.15


def test_a_narrow_law_beside_a_wide_one():
    assert ffs_accuracy(0.5, (100, 1e-3), (100, 50), 2) == pytest.approx(raced(0.5, (100, 1e-3), (100, 50), 2), abs=0.005)


@pytest.mark.parametrize("n", [4, 8, 16, 64])
def test_the_expected_minimum(n):
    simulated = np.random.default_rng(1).normal(100, 10, (50_000, n)).min(1).mean()
    assert 100 - expected_min(100, 10, n) == pytest.approx(100 - simulated, rel=0.05)
    bound = 10 * math.sqrt(2 * math.log(n))
    assert 0.6 * bound < 100 - expected_min(100, 10, n) < bound, "the form for large n is a bound"


def replayed_by_hand(table, n, k):
    """FFS-k, LFS-k, MV and simple over every subset of n, in other words than the library's."""
    by_problem = {}
    for row in table:
        by_problem.setdefault(row[0], []).append(row)
    means = []
    for rows in by_problem.values():
        found = []
        for subset in itertools.combinations(rows, n):
            timed = sorted(subset, key=lambda row: (row[2], row[1]))
            readable = [row for row in timed if row[3] is not None]
            longest = max(row[2] for row in subset)
            s = readable[k - 1][2] if len(readable) >= k else longest
            total = sum(row[2] for row in subset)

            def vote(rows):
                counts = Counter(row[3] for row in rows)
                if not counts:
                    return 0.0
                most = max(counts.values())
                first = next(row for row in rows if counts[row[3]] == most)
                return float(first[3] == first[4])

            ffs = (vote(readable[:k]), s, sum(min(row[2], s) for row in subset))
            lfs, voted = vote(readable[max(0, len(readable) - k) :]), vote(readable)
            one = np.mean([row[3] == row[4] for row in subset])
            found.append([*ffs, lfs, longest, total, voted, longest, total, one, total / n, total / n])
        means.append(np.mean(found, 0))
    return np.mean(means, 0)


rows = st.lists(st.tuples(st.integers(1, 6), st.sampled_from([None, "1", "2", "3"])), min_size=4, max_size=6)


@settings(max_examples=40, deadline=None)
@given(st.lists(rows, min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 4))
def test_a_replay_is_the_mean_over_every_subset(problems, n, k):
    table = [(p, sample, tokens, answer, "1") for p, each in enumerate(problems) for sample, (tokens, answer) in enumerate(each)]
    k = min(k, n)
    found = replay(table[::-1], n, k)  # the order of the rows is nothing
    assert np.allclose(np.ravel([found.ffs, found.lfs, found.mv, found.simple]), replayed_by_hand(table, n, k))
    assert replay(table, 1).mv.accuracy == pytest.approx(replay(table, 1).simple.accuracy)
    every = replay(table, n, n)
    assert every.ffs == every.mv
    assert every.ffs.accuracy == every.lfs.accuracy


def test_the_last_to_finish_is_the_longest():
    table = [("p", 0, 5, "1", "1"), ("p", 1, 9, "2", "1"), ("p", 2, 7, "1", "1")]
    assert replay(table, 3).lfs == (0.0, 9.0, 21.0)
    assert replay(table, 3).ffs == (1.0, 5.0, 15.0)


def test_a_diagnosis_warns_where_accuracy_falls_with_n():
    draw = np.random.default_rng(0)
    right = draw.random((200, 8)) < 0.75
    lengths = np.where(right, draw.normal(100, 10, right.shape), draw.normal(120, 45, right.shape))
    with pytest.warns(UserWarning, match="accuracy predicted from pooled lengths falls from .* at n = 2 to .* at n = 64"):
        diagnosis = diagnose(lengths.tolist(), right.tolist())
    assert len(diagnosis.warnings) == 2
    assert diagnosis.a == right.mean()
    assert diagnosis.replayed[1] == pytest.approx(right.mean())
    for n in (2, 8):
        table = [(p, s, lengths[p, s], "1" if right[p, s] else "0", "1") for p in range(200) for s in range(8)]
        assert diagnosis.replayed[n] == pytest.approx(replay(table, n).ffs.accuracy)
        assert diagnosis.replayed[n] == pytest.approx(diagnosis.predicted[n], abs=0.05)
    assert diagnosis.by_decile[0] < 0.7 < 0.85 < diagnosis.by_decile[5]
    assert f"{diagnosis.a:.1%}" in str(diagnosis)
    assert pickle.loads(pickle.dumps(diagnosis)).a == copy.deepcopy(diagnosis).a


@pytest.mark.filterwarnings("error")
def test_a_diagnosis_is_silent_where_the_first_are_right():
    draw = np.random.default_rng(0)
    right = draw.random((200, 8)) < 0.6
    lengths = np.where(right, draw.normal(100, 20, right.shape), draw.normal(150, 20, right.shape))
    diagnosis = diagnose(lengths, right)
    assert diagnosis.predicted[8] > diagnosis.a
    assert not diagnosis.warnings
    assert diagnose([[3, 4]], [[True, True]]).predicted == {}, "no wrong trace, no law"


def test_tables_that_cannot_be():
    with pytest.raises(ValueError, match="rows of different lengths"):
        diagnose([[1, 2], [3]], [[True, True], [True]])
    with pytest.raises(ValueError, match="expected two tables"):
        diagnose([[1, 2]], [[True]])
    with pytest.raises(ValueError, match="the table has no rows"):
        replay([], 1)
    with pytest.raises(ValueError, match="problem 'p' has 1 traces; expected at least 2"):
        replay([("p", 0, 5, "1", "1")], 2)
    with pytest.raises(ValueError, match="k is 3 and N 2"):
        replay([("p", 0, 5, "1", "1")], 2, 3)
    with pytest.raises(ValueError, match="a is 1.5"):
        ffs_accuracy(1.5, (1, 1), (1, 1), 2)
    with pytest.raises(ValueError, match="sd_of_wrong is 0"):
        ffs_accuracy(0.5, (1, 1), (1, 0), 2)
