"""Splits over clients: each example once, seeded, large enough; a large concentration makes clients alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.federated import FixedSize, Independent, Shards, describe, dirichlet, iid, pathological

LABELS = np.arange(2000) % 10


def covers(parts, count):
    return np.array_equal(np.sort(np.concatenate(parts)), np.arange(count))


@settings(max_examples=40, deadline=None)
@given(
    clients=st.integers(1, 12), classes=st.integers(1, 6), alpha=st.floats(0.3, 50), seed=st.integers(0, 2**32), count=st.integers(300, 500)
)
def test_every_split_covers_each_example_once_and_depends_on_its_seed_alone(clients, classes, alpha, seed, count):
    labels = np.random.default_rng(seed).integers(classes, size=count)
    for split in (
        lambda: iid(labels, clients, seed),
        lambda: dirichlet(labels, clients, alpha, seed, min_size=3),
        lambda: pathological(labels, clients, 2, seed),
    ):
        parts = split()
        assert len(parts) == clients
        assert covers(parts, count)
        assert all(np.array_equal(one, other) for one, other in zip(parts, split(), strict=True))


def test_other_seeds_give_other_splits():
    for split in (
        lambda seed: iid(LABELS, 5, seed),
        lambda seed: dirichlet(LABELS, 5, 0.5, seed),
        lambda seed: pathological(LABELS, 5, 2, seed),
    ):
        assert not all(np.array_equal(one, other) for one, other in zip(split(0), split(1), strict=True))


@pytest.mark.parametrize("min_size", [1, 10, 40])
def test_every_client_has_the_least_size(min_size):
    assert min(map(len, dirichlet(LABELS, 20, 0.3, seed=4, min_size=min_size))) >= min_size


def class_shares(alpha):
    counts = describe(LABELS, dirichlet(LABELS, 10, alpha, seed=2)).counts
    return counts / counts.sum(1, keepdims=True)


def test_a_large_concentration_makes_clients_alike_and_a_small_one_unlike():
    assert np.abs(class_shares(1e6) - 0.1).max() < 0.02
    assert class_shares(0.1).max(1).mean() > 0.5


def test_pathological_clients_have_few_classes():
    parts = pathological(LABELS, 20, classes_per_client=2, seed=0)
    assert max(len(np.unique(LABELS[part])) for part in parts) <= 2


def test_the_description_counts_classes_and_draws_a_heat_map():
    parts = dirichlet(LABELS, 4, 0.5)
    described = describe(LABELS, parts)
    assert described.counts.sum() == len(LABELS)
    assert described.counts[2].sum() == len(parts[2])
    chart = described.heat_map().to_dict()
    assert len(chart["data"]["values"]) == 40


def test_sampling_depends_on_seed_and_round_alone_and_is_never_empty():
    sampler = Independent(0.02)
    drawn = [sampler(range(20), round, 1) for round in range(200)]
    assert all(drawn)
    assert drawn == [sampler(list(range(20))[::-1], round, 1) for round in range(200)]
    assert len({tuple(each) for each in drawn}) > 10
    often = [len(Independent(0.3)(range(100), round, 0)) for round in range(200)]
    assert 28 < np.mean(often) < 32
    assert len(set(often)) > 5
    assert {len(FixedSize(0.1)(range(50), round, 0)) for round in range(10)} == {5}


@pytest.mark.parametrize("alpha", [0, -1, float("nan")])
def test_a_concentration_that_is_not_positive_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha is .*expected a positive"):
        dirichlet(LABELS, 4, alpha)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan")])
@pytest.mark.parametrize("sampler", [Independent, FixedSize])
def test_a_fraction_outside_0_to_1_is_refused(sampler, fraction):
    with pytest.raises(ValueError, match="fraction of clients is .*more than 0 and at most 1"):
        sampler(fraction)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([[0, 1], [1, 2]], "client 1 overlaps: example 1 is also in that of client 0"),
        ([[0, 0], [1, 2]], "client 0 overlaps: example 0 is in it twice"),
        ([[0, 1], []], "client 1 is empty"),
        ([[0, 1], [2, 9]], "client 1 has indices 2 to 9; expected 0 to 3"),
        ([], "no shards"),
    ],
)
def test_shards_that_overlap_or_are_empty_are_refused_by_client(parts, words):
    with pytest.raises(ValueError, match=words):
        Shards(torch.zeros(4, 1), torch.zeros(4), parts)


def test_too_many_clients_or_too_large_a_least_size_is_refused():
    with pytest.raises(ValueError, match="clients is 11; expected 1 to 10"):
        iid(np.zeros(10), 11)
    with pytest.raises(ValueError, match="min_size is 600 for 4 clients and 2000 examples; expected at most 500"):
        dirichlet(LABELS, 4, 0.5, min_size=600)
    with pytest.raises(ValueError, match="no draw in 1000 gave each of 4 clients 490"):
        dirichlet(LABELS, 4, 0.01, min_size=490)
