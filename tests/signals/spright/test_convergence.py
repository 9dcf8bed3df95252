"""What is said of a recovery: converged where all was found, the full transform where all would be read, fewer queries than the peer."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fewer.signals.spright import ArrayFunction, SparseSpectrum, sparse_wht
from fewer.signals.spright.peers import PeerSignal
from fewer.signals.spright.problems import Noisy, k_sparse


def spread_spectrum(k: int, seed: int, n: int = 20) -> SparseSpectrum:
    rng = np.random.default_rng(seed)
    indices = np.unique(rng.integers(0, 2, (k, n), dtype=np.uint8), axis=0)
    return SparseSpectrum(indices, rng.choice([-1, 1], len(indices)) * rng.uniform(0.5, 2, len(indices)), np.zeros(len(indices)))


def same(found: SparseSpectrum, true: SparseSpectrum) -> bool:
    ours, theirs = found.to_dict(), true.to_dict()
    return ours.keys() == theirs.keys() and all(abs(ours[k] - theirs[k]) <= 1e-6 for k in ours)


@pytest.mark.parametrize(("design", "sparsity"), [("so", 6), ("so", 20), ("nso", 6), ("none", 6)])
def test_converged_means_that_all_is_found(design, sparsity):
    """From 1 to 30 times as many coefficients as were announced."""
    for times in (1, 1.5, 2, 2.33, 3, 4, 6, 10, 15, 20, 30):
        for seed in range(3 if design == "nso" else 8):
            true = spread_spectrum(round(times * sparsity), seed)
            found = sparse_wht(true, 20, sparsity=sparsity, design=design, seed=seed)
            assert not found.converged or same(found, true), (times, seed)


@pytest.mark.parametrize("design", ["so", "nso", "none"])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_where_a_round_would_read_everything_the_transform_is_the_full_one(n, design):
    rng = np.random.default_rng(n)
    table = rng.standard_normal(2**n)
    f = ArrayFunction(table)
    for announced in ({}, {"sparsity": 1}, {"sparsity": 2**n}):
        found = sparse_wht(f, n, design=design, **announced)
        assert found.queries == 2**n
        assert found.converged
        assert np.allclose(found(all_bits(n)), table)
    first = sparse_wht(lambda m: 1.0 * m[:, 0] * m[:, -1], n, design=design)
    assert np.allclose(first(all_bits(n)), all_bits(n)[:, 0] * all_bits(n)[:, -1])


def all_bits(n: int) -> np.ndarray:
    return np.unpackbits(np.arange(2**n, dtype=">u4").view(np.uint8).reshape(-1, 4), axis=1)[:, -n:]


@pytest.mark.parametrize("noise_std", [None, 0.5])
def test_the_full_transform_tells_coefficients_from_noise(noise_std):
    exact = 0
    for seed in range(20):
        true = spread_spectrum(5, seed, 9)
        found = sparse_wht(Noisy(true, 0.5, np.random.default_rng(seed)), 9, sparsity=8, noise_std=noise_std, seed=seed)
        assert found.queries == 2**9
        exact += found.to_dict().keys() == true.to_dict().keys()
        assert found.noise_std == pytest.approx(0.5, rel=0.15)
    assert exact >= 18


def test_degrees_are_limited_in_the_full_transform_too():
    found = sparse_wht(lambda m: 1.0 * m.prod(axis=1), 4, max_degree=2)
    assert found.queries == 16
    assert sorted(found.order()) == [0] + [1] * 4 + [2] * 6


@pytest.mark.parametrize(
    ("decibels", "design", "peers"), [(None, "none", PeerSignal(None, 20, 128)), (10, "so", PeerSignal(None, 20, 128, 1.0, 3))]
)
def test_fewer_queries_than_sparse_transform_at_equal_recovery(decibels, design, peers):
    """n = 20, K = 100, all of 50 seeds. sparse-transform needs 2^7 bins without noise (2^6: four of five seeds); at 10 dB (|X|^2 over the
    noise of one of 2^7 bins) three repeats find 19 of 20 and four all."""
    std = 0.0 if decibels is None else math.sqrt(128 / 10 ** (decibels / 10))
    for seed in range(50):
        rng = np.random.default_rng(seed)
        true = k_sparse(20, 100, rng)
        found = sparse_wht(Noisy(true, std, rng), 20, sparsity=100, design=design, seed=seed)
        assert found.to_dict().keys() == true.to_dict().keys(), seed
        assert found.queries < peers.queries
