"""Approximate distances: never above D, never too far below, however the mismatches lie; and the estimators' means."""

from __future__ import annotations

import numpy as np
import pytest
from plain_windows import plain

from fewer.signals.hamming_distances import hamming_distances

RNG = np.random.default_rng(0)
TEXT, PATTERN = RNG.integers(30, size=600), RNG.integers(30, size=120)
ONE_PAIR = np.zeros(600, dtype=int), np.where(np.arange(120) < 90, 1, 0)  # all mismatches are of the letters 0 and 1


@pytest.mark.parametrize(("text", "pattern"), [(TEXT, PATTERN), ONE_PAIR], ids=["uniform", "one pair of letters"])
def test_the_largest_of_all_hashes_keeps_its_guarantee(text, pattern):
    exact = plain(text, pattern)
    for seed in range(20):
        found, told = hamming_distances(text, pattern, epsilon=0.2, method="hash", seed=seed, return_plan=True)
        assert told.method == "hash"
        assert told.repetitions == 16  # log2(481 / 0.01), rounded up
        assert (found <= exact).all()
        assert (found >= 0.8 * exact).all()


@pytest.mark.parametrize(("text", "pattern"), [(TEXT, PATTERN), ONE_PAIR], ids=["uniform", "one pair of letters"])
def test_the_mean_is_unbiased(text, pattern):
    exact = plain(text, pattern)
    found = [hamming_distances(text, pattern, epsilon=0.2, method="hash", estimator="mean", seed=seed) for seed in range(50)]
    bias = np.mean(found, axis=0) / exact - 1
    assert abs(bias.mean()) < 0.02


def test_a_sample_of_positions_is_within_epsilon_from_the_minimum_on():
    rng = np.random.default_rng(1)
    text, pattern = rng.integers(3, size=9000), rng.integers(3, size=6000)
    exact = plain(text, pattern)
    for seed in range(10):
        found, told = hamming_distances(text, pattern, epsilon=0.3, method="sample", minimum=3000, seed=seed, return_plan=True)
        assert told.method == "sample"
        assert (np.abs(found - exact) <= 0.3 * exact + 0.5)[exact >= 3000].all()
        assert not np.array_equal(found, exact), "it is a sample"
    assert np.array_equal(hamming_distances(text, pattern, epsilon=0.3, method="sample", minimum=1), exact), "every position is taken"


def test_where_the_exact_way_is_cheaper_it_is_taken_and_told():
    found, told = hamming_distances(TEXT, PATTERN, epsilon=0.2, return_plan=True)
    assert told.method == "exact"
    assert np.array_equal(found, plain(TEXT, PATTERN))


def test_an_index_approximates_letters_that_the_text_lacks_and_wildcards():
    from fewer.signals.hamming_distances import TextIndex

    pattern = np.where(np.arange(120) % 3 == 0, 1000 + np.arange(120), PATTERN)
    assert np.array_equal(
        TextIndex(TEXT).distances(pattern, epsilon=0.3, method="hash", seed=5),
        hamming_distances(TEXT, pattern, epsilon=0.3, method="hash", seed=5),
    )
    windows = np.lib.stride_tricks.sliding_window_view(TEXT, 120)
    exact = ((windows != PATTERN) & (windows != 3) & (PATTERN != 3)).sum(axis=1)
    for found in (
        hamming_distances(TEXT, PATTERN, epsilon=0.3, method="hash", wildcard=3),
        TextIndex(TEXT, wildcard=3).distances(PATTERN, epsilon=0.3, method="hash"),
    ):
        assert (found <= exact).all()
        assert (found >= 0.7 * exact).all()
