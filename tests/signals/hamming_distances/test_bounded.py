"""Distances up to k: the clipped distances whatever the text, within the budget; and how soon a window is left."""

from __future__ import annotations

import numpy as np
import pytest
from plain_windows import plain

from fewer.signals.hamming_distances import hamming_distances
from fewer.signals.hamming_distances.counting import bounded as module
from fewer.signals.hamming_distances.counting import kernels
from fewer.signals.hamming_distances.counting.bounded import candidates
from fewer.signals.hamming_distances.counting.letters import Alphabet, Pair

TEXTS = {
    "random": np.random.default_rng(0).integers(4, size=3000),
    "many letters": np.random.default_rng(1).integers(900, size=3000),
    "periodic": np.resize(np.array([0, 1, 0, 1, 0, 1, 0, 2]), 3000),
    "unary": np.zeros(3000, dtype=int),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("m", [40, 300])
def test_distances_are_clipped_at_k_plus_one(name, m):
    text = TEXTS[name]
    for pattern in (text[100 : 100 + m], np.random.default_rng(2).integers(4, size=m)):
        changed = np.where(np.arange(m) % 50 == 7, 3, pattern)
        for k in (0, 1, m // 10, m - 1, m):
            expected = np.minimum(plain(text, changed), k + 1)
            assert np.array_equal(hamming_distances(text, changed, max_distance=k, seed=m), expected), k
            near = hamming_distances(text, changed, max_distance=k, positions_only=True)
            assert np.array_equal(near[:, 0], np.flatnonzero(expected <= k))
            assert np.array_equal(near[:, 1], expected[expected <= k])


def test_every_branch_gives_the_same(monkeypatch):
    """Early stops to the end, a budget that ends amid, none at all, and seeds: forced by what things are said to cost."""
    from dataclasses import replace

    from fewer.signals.hamming_distances import calibrate

    rng = np.random.default_rng(3)
    text = rng.integers(3, size=9000)
    pattern = np.where(rng.random(400) < 0.01, 5, text[4000:4400])
    pair = Pair.of(text, pattern, Alphabet(pattern))
    exact = plain(text, pattern)
    measured, seen = calibrate(), set()
    for early, window, roll in ((1e-15, 1e-3, 1.0), (1e-9, 4e-8, 1.0), (1.0, 1e-9, 1.0), (1e-9, 1e-3, 0.0)):
        constants = replace(measured, early_byte=early, window=window, roll=roll, start=0.0)
        for k in (0, 8, 20, 200):
            found, plan = module.bounded(pair, k, constants)
            assert np.array_equal(found, np.minimum(exact, k + 1))
            seen.add((plan.method, bool(plan.letters_by_method)))
    assert {("early stop", False), ("early stop", True), ("seeds", False)} <= seen


def test_comparisons_keep_to_the_budget_on_a_periodic_text():
    text = np.tile(np.frombuffer(b"abababac", dtype=np.uint8), 12_000)
    pattern = text[8 : 8 + 2000]
    for k in (20, 100, 700):
        found, plan = hamming_distances(text, pattern, max_distance=k, return_plan=True)
        assert plan.comparisons <= 2 * plan.budget
        assert plan.comparisons < len(found) * 2000 / 8, "what plain early stops would compare is many times as much"
        assert plan.letters_by_method, "the exact way did the rest"


def test_letters_looked_at_are_as_many_as_the_order_statistics_say():
    """The (k + 1)-th of D mismatches in random order stands at (k + 1)(m + 1) / (D + 1) on average; one standard error is 0.6 %."""
    m, far, k, rng = 500, 100, 9, np.random.default_rng(4)
    pattern = np.zeros(m, dtype=np.uint8)
    text = (np.arange(m) < far).astype(np.uint8)
    spent = [
        kernels.stop_early(text, pattern, np.zeros(1, np.int64), rng.permutation(m), 1, k, np.inf, np.zeros(1, np.int32))[1]
        for _ in range(2000)
    ]
    assert np.mean(spent) == pytest.approx((k + 1) * (m + 1) / (far + 1), rel=0.03)


def test_seeds_miss_no_window_and_give_few_where_letters_are_many():
    rng = np.random.default_rng(5)
    text = rng.integers(4, size=20_000)
    for _ in range(20):
        k = int(rng.integers(0, 9))
        place = int(rng.integers(19_000))
        pattern = text[place : place + 300].copy()
        pattern[rng.permutation(300)[:k]] = 4
        pair = Pair.of(text, pattern, Alphabet(pattern))
        found = candidates(pair, k, rng)
        assert found is not None
        assert set(np.flatnonzero(plain(text, pattern) <= k)) <= set(found)
        assert len(found) < 50
    assert candidates(Pair.of(text, text[:40], Alphabet(text)), 8, rng) is None, "pieces too short"
    unary = np.zeros(5000, dtype=int)
    assert candidates(Pair.of(unary, unary[:400], Alphabet(unary)), 0, rng) is None, "every window has one"
    twice = np.where(rng.random(5000) < 0.99, 0, 1)  # predicted rare, but common
    shuffled = Pair.of(twice, np.append(np.zeros(399, dtype=int), 1), Alphabet(twice))
    assert candidates(shuffled, 1, rng) is None or len(candidates(shuffled, 1, rng)) < 5000
