"""The nearest other window of every window, and differences of sets, against the plain ways."""

from __future__ import annotations

import numpy as np
import pytest

from fewer.signals.hamming_distances import difference_counts, hamming_profile
from fewer.signals.hamming_distances import differences as module
from fewer.signals.hamming_distances import profile as profile_module


@pytest.mark.parametrize(("sigma", "exclusion"), [(2, None), (4, None), (300, 0), (1, 3)])
def test_the_profile_is_that_of_brute_force_with_ties_to_the_lowest(monkeypatch, sigma, exclusion):
    monkeypatch.setattr(profile_module, "BAND", 50)
    text = np.random.default_rng(sigma).integers(sigma, size=300)
    windows = np.lib.stride_tricks.sliding_window_view(text, 12)
    table = (windows[:, None] != windows).sum(axis=2)
    places = np.arange(len(windows))
    table[np.abs(places[:, None] - places) <= (6 if exclusion is None else exclusion)] = 99
    for threads in (1, 2):
        distance, index = hamming_profile(text, 12, exclusion, threads=threads)
        assert np.array_equal(distance, table.min(axis=1))
        assert np.array_equal(index, table.argmin(axis=1))


def test_windows_without_another_are_told():
    distance, index = hamming_profile("abcdefgh", 4, exclusion=3)
    assert distance.tolist() == [4, -1, -1, -1, 4]
    assert index.tolist() == [4, -1, -1, -1, 0]


@pytest.mark.parametrize("universe", [10, 100, 10_000, 1_000_000])
def test_differences_are_counted_as_by_bincount(universe):
    rng = np.random.default_rng(universe)
    for size in (1, 7, 60, 400):
        x, y = rng.integers(-universe, universe, size), rng.integers(universe, size=max(1, size // 2))
        least = x.min() - y.max()
        expected = np.bincount(np.subtract.outer(x, y).reshape(-1) - least)
        values, counts = difference_counts(x, y)
        assert np.array_equal(values, np.flatnonzero(expected) + least)
        assert np.array_equal(counts, expected[expected > 0])
        values, counts = difference_counts(x, y, more_than=2)
        assert np.array_equal(values, np.flatnonzero(expected > 2) + least)


def test_frequent_differences_of_a_large_universe_are_found_by_residues(monkeypatch):
    rng = np.random.default_rng(0)
    taken = []
    honest = module._frequent
    monkeypatch.setattr(module, "_frequent", lambda *given: taken.append(1) or honest(*given))
    x = rng.integers(2**60, size=400)
    y = np.concatenate([x[:100] - 12_345, x[100:130] + 2**59, rng.integers(2**60, size=270)])
    for seed in range(3):
        values, counts = difference_counts(x, y, more_than=20, seed=seed)
        assert values.tolist() == [-(2**59), 12_345]
        assert counts.tolist() == [30, 100]
    assert difference_counts(x, y, more_than=100)[0].size == 0
    assert len(taken) == 4


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        ([0.5], [1], {}, "X is float64 of shape"),
        ([1], [], {}, "Y is float64 of shape"),
        ([[1]], [1], {}, "X is int64 of shape"),
        ([2**61], [1], {}, "X holds numbers beyond 2\\^61"),
        ([1], [1], {"more_than": -1}, "more_than is -1"),
    ],
)
def test_what_are_no_integers_is_refused(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        difference_counts(x, y, **options)
