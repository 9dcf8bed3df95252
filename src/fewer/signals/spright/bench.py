"""Races: the sparse transform against full ones on an array, and against sparse-transform at equal recovery."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fewer.errors import require
from fewer.signals.spright.bins.queries import ArrayFunction
from fewer.signals.spright.peers import PeerSignal
from fewer.signals.spright.problems import exact_support, k_sparse, k_sparse_array
from fewer.signals.spright.recovery import sparse_wht
from fewer.signals.spright.transform import fwht
from fewer.study import Bench

bench = Bench("spright")
K = 64
BINS = 128  # of both sides against sparse-transform
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


@bench.race("n = 20, K = 100, exact support", peer="sparse-transform", reach=1 / 3)
def against_sparse_transform() -> tuple[Call, Call]:
    true = k_sparse(20, 100, np.random.default_rng(0))
    peer = PeerSignal(true, 20, bins=BINS)
    if not exact_support(peer.recover(), true):
        raise RuntimeError("sparse-transform did not find the 100 coefficients; give it more bins")

    def ours() -> Any:
        return sparse_wht(true, 20, sparsity=100, bins=BINS, design="none", progress=False)

    if not exact_support(ours(), true):
        raise RuntimeError("the sparse transform did not find the 100 coefficients")
    return ours, peer.recover


@bench.quantity("queries, n = 20, K = 100, exact support", peer="sparse-transform", unit="queries")
def queries() -> tuple[float, float]:
    true = k_sparse(20, 100, np.random.default_rng(0))
    return sparse_wht(true, 20, sparsity=100, bins=BINS, design="none", progress=False).queries, PeerSignal(
        true, 20, bins=BINS
    ).recover().queries
