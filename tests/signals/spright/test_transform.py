"""The full transform against the Hadamard matrix, and the aliasing identity that the sparse one rests on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

from fewer.signals.spright.bins.bits import pack, signs, sum_of_parities, unpack
from fewer.signals.spright.bins.hashing import add_columns, distinct_offsets, partition_columns, rank, span
from fewer.signals.spright.bins.peeling import hash_all
from fewer.signals.spright.transform import bins_of, fwht


def all_bits(n: int) -> np.ndarray:
    return np.array(list(itertools.product((0, 1), repeat=n)), dtype=np.uint8).reshape(2**n, n)


@pytest.mark.parametrize("n", range(11))
def test_fwht_is_the_product_with_the_hadamard_matrix(n):
    x = np.random.default_rng(n).standard_normal((3, 2**n))
    assert np.abs(fwht(x) - x @ hadamard(2**n) / 2**n).max() < 1e-12
    assert np.abs(fwht(x.T, axis=0, normalize=False) - hadamard(2**n) @ x.T).max() < 1e-12 * 2**n


@given(st.integers(0, 15), st.integers(0, 2**32 - 1))
def test_fwht_is_an_involution_up_to_scale_and_keeps_energy(n, seed):
    x = np.random.default_rng(seed).standard_normal(2**n)
    transform = fwht(x)
    assert np.allclose(fwht(transform, normalize=False), x, atol=1e-12)
    orthogonal = np.sqrt(2**n) * transform
    assert np.allclose(np.sqrt(2**n) * fwht(orthogonal), x, atol=1e-12)
    assert np.isclose((x**2).mean(), (transform**2).sum(), rtol=1e-12)


def test_fwht_of_long_lines_agrees_with_the_definition_at_random_places():
    """Beyond the block that stays in the cache: an even and an odd number of long strides."""
    for n in (13, 14, 15, 16):
        rng = np.random.default_rng(n)
        x, k = rng.standard_normal(2**n), rng.integers(0, 2, (5, n), dtype=np.uint8)
        index = (pack(k)[:, 0] >> np.uint64(64 - n)).astype(int)
        expected = signs(pack(k), pack(all_bits(n))) @ x / 2**n
        assert np.abs(fwht(x)[index] - expected).max() < 1e-12


def test_fwht_in_place_overwrites_and_keeps_float32():
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    expected = fwht(x)
    assert expected.dtype == np.float32
    assert fwht(x, inplace=True) is x
    assert (x == expected).all()
    middle = np.random.default_rng(0).standard_normal((2, 8, 3))
    expected = fwht(np.moveaxis(middle, 1, 2).copy())
    assert np.allclose(np.moveaxis(fwht(middle, axis=1, inplace=True), 1, 2), expected, atol=1e-15)


@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (np.zeros(6), {}, "length 6; expected a power of two, such as 8"),
        (np.zeros((4, 0)), {}, "length 0; expected a power of two"),
        (np.zeros(4, dtype=complex), {}, "complex128 of shape"),
        (np.zeros(4, dtype=int), {"inplace": True}, "leave out inplace"),
        (np.zeros((4, 8)).T, {"inplace": True}, "leave out inplace"),
    ],
)
def test_fwht_says_what_it_cannot_transform(x, kwargs, message):
    with pytest.raises(ValueError, match=message):
        fwht(x, **kwargs)


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_packed_vectors_are_the_same_vectors(n, seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 2, (6, n), dtype=np.uint8) for _ in range(2))
    assert (unpack(pack(a), n) == a).all()
    products = (a.astype(int) @ b.T.astype(int)) % 2
    assert (signs(pack(a), pack(b)) == 1 - 2 * products).all()
    values = rng.standard_normal(6)
    assert np.allclose(sum_of_parities(pack(a), pack(b), values), (1 - 2 * products) @ values)


@given(st.integers(4, 90), st.integers(0, 2**32 - 1))
def test_random_columns_are_independent_and_grow_by_appending(n, seed):
    rng = np.random.default_rng(seed)
    few = add_columns(np.zeros((0, n), dtype=np.uint8), 2, rng)
    more = add_columns(few, 4, rng)
    assert rank(more) == 4
    assert (more[:2] == few).all()
    assert len(np.unique(span(pack(more)), axis=0)) == 16  # full column rank: M is injective
    dependent = np.vstack([more, more[0] ^ more[2]])
    assert rank(dependent) == 4


def test_partition_columns_are_disjoint_coordinates_and_grow_by_appending():
    blocks = np.vstack([partition_columns(c, 3, 3, 10) for c in range(3)])
    assert (blocks.sum(axis=1) == 1).all()
    assert len(np.unique(blocks, axis=0)) == 9
    for c in range(3):
        assert (partition_columns(c, 3, 2, 10) == partition_columns(c, 3, 3, 10)[:2]).all()


def test_offsets_are_told_apart_modulo_the_span_by_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        columns, offsets = add_columns(np.zeros((0, 6), dtype=np.uint8), 3, rng), rng.integers(0, 2, (12, 6), dtype=np.uint8)
        points = unpack(span(pack(columns)), 6)
        cosets = {frozenset(map(bytes, points ^ offset)) for offset in offsets}
        assert distinct_offsets(columns, offsets) == len(cosets)


def test_bins_add_up_the_coset_with_signs():
    """The aliasing identity: U[j] = sum over {k: M^T k = j} of X[k] (-1)^<d,k>, every j, from samples alone."""
    n, b, rng = 10, 4, np.random.default_rng(0)
    every = all_bits(n)
    for _ in range(20):
        x = rng.standard_normal(2**n)
        coefficients = fwht(x)
        columns, d = add_columns(np.zeros((0, n), dtype=np.uint8), b, rng), rng.integers(0, 2, n, dtype=np.uint8)
        points = span(pack(columns)) ^ pack(d[None])
        samples = x[(points[:, 0] >> np.uint64(64 - n)).astype(int)]
        bins = bins_of(samples[None, :, None])[0, :, 0]
        j = (every.astype(int) @ columns.T.astype(int)) % 2 @ (1 << np.arange(b))
        signature = 1 - 2 * ((every.astype(int) @ d) % 2)
        expected = np.bincount(j, weights=coefficients * signature, minlength=2**b)
        assert np.abs(bins - expected).max() < 1e-12
        assert (hash_all(pack(columns), pack(every)) == j).all()


def test_torch_transforms_the_groups_alike():
    samples = np.random.default_rng(0).standard_normal((3, 16, 5))
    assert np.allclose(bins_of(samples, device="cpu"), bins_of(samples), atol=1e-15)
