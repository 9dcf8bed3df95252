"""Races: the sparse transform against full ones on an array, and against sparse-transform at equal recovery."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fewer.errors import require
from fewer.signals.spright.bins.queries import ArrayFunction
from fewer.signals.spright.peers import PeerSignal
from fewer.signals.spright.problems import Model, Noisy, exact_support, k_sparse, k_sparse_array
from fewer.signals.spright.recovery import sparse_wht
from fewer.signals.spright.spectrum import SparseSpectrum
from fewer.signals.spright.transform import fwht
from fewer.study import Bench

bench = Bench("spright")
K = 64
SEEDS = 50
Call = Callable[[], Any]


def lookups(n: int) -> tuple[Call, np.ndarray]:
    """The sparse transform of an array of 2^n entries with K coefficients, and the array."""
    true, array = k_sparse_array(n, K, np.random.default_rng(0))
    f = ArrayFunction(array)

    def ours() -> Any:
        return sparse_wht(f, n, sparsity=K, design="none", progress=False)

    if not exact_support(ours(), true):
        raise RuntimeError(f"the sparse transform did not find the {K} coefficients at n = {n}")
    return ours, array


@bench.race("array lookup, N = 2^22, K = 64", peer="fwht, our full transform", reach=1 / 20)
def against_full_22() -> tuple[Call, Call]:
    ours, array = lookups(22)
    return ours, lambda: fwht(array)


@bench.race("array lookup, N = 2^26, K = 64", peer="fwht, our full transform", reach=1 / 200)
def against_full_26() -> tuple[Call, Call]:
    ours, array = lookups(26)
    return ours, lambda: fwht(array)


@bench.race("array lookup, N = 2^22, K = 64 (hadamard-transform)", peer="hadamard-transform", reach=1 / 20)
def against_hadamard_transform() -> tuple[Call, Call]:
    peer = require("hadamard_transform", "peers")
    ours, array = lookups(22)
    tensor = torch.as_tensor(array)
    return ours, lambda: peer.hadamard_transform(tensor)


@bench.race("full transform, N = 2^20", peer="hadamard-transform", reach=1.0)
def full_transform() -> tuple[Call, Call]:
    peer = require("hadamard_transform", "peers")
    x = np.random.default_rng(0).standard_normal(2**20)
    tensor = torch.as_tensor(x)
    return lambda: fwht(x), lambda: peer.hadamard_transform(tensor)


# Against sparse-transform, n = 20, K = 100: both with what finds every coefficient, and no other, for each of 50 functions


def functions(decibels: float | None) -> Iterator[tuple[SparseSpectrum, Model, int]]:
    """A spectrum, the function to ask, and a seed; noise is relative to that of one of 128 bins."""
    std = 0.0 if decibels is None else math.sqrt(128 / 10 ** (decibels / 10))
    for seed in range(SEEDS):
        true = k_sparse(20, 100, np.random.default_rng(seed))
        yield true, Noisy(true, std, np.random.default_rng([seed, 1])) if std else true, seed


def ours_of(f: Model, decibels: float | None, seed: int) -> SparseSpectrum:
    return sparse_wht(f, 20, sparsity=100, design="none" if decibels is None else "so", seed=seed, progress=False)


@functools.cache
def peer_of(decibels: float | None) -> dict[str, Any]:
    """The cheapest settings of sparse-transform that find all 50."""
    std = 0.0 if decibels is None else math.sqrt(128 / 10 ** (decibels / 10))
    for settings in (
        {"bins": bins, "repeats": repeats} for repeats, bins in ((1, 64), (1, 128), (2, 128), (3, 128), (4, 128), (5, 128), (6, 128))
    ):
        np.random.seed(0)
        if all(exact_support(PeerSignal(f, 20, noise_std=std, **settings).recover(), true) for true, f, _ in functions(decibels)):
            return settings | {"noise_std": std}
    raise RuntimeError("sparse-transform did not find the 100 coefficients of 50 functions; give it more bins or repeats")


def race_queries(decibels: float | None) -> tuple[float, float]:
    asked = []
    for true, f, seed in functions(decibels):
        found = ours_of(f, decibels, seed)
        if not exact_support(found, true):
            raise RuntimeError(f"the sparse transform did not find the 100 coefficients of function {seed}")
        asked.append(found.queries)
    return float(np.mean(asked)), PeerSignal(true, 20, **peer_of(decibels)).queries


def race_time(decibels: float | None) -> tuple[Call, Call]:
    _, f, seed = next(functions(decibels))
    return lambda: ours_of(f, decibels, seed), PeerSignal(f, 20, **peer_of(decibels)).recover


for told, level in (("no noise", None), ("10 dB", 10.0)):
    peer = "sparse-transform, at equal recovery of 50 functions"
    bench.quantity(f"queries, n = 20, K = 100, {told}", peer=peer, unit="queries", reach=1.0)(functools.partial(race_queries, level))
    bench.race(f"n = 20, K = 100, exact support, {told}", peer=peer, reach=1 / 3)(functools.partial(race_time, level))
