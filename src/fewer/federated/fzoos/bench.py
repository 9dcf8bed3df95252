"""Races: the surrogate's gradient against scikit-learn's process and finite differences, a local step's time, queries and bytes against FedZO."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern

from fewer.devices import one_thread
from fewer.federated.fzoos.algorithm import FZooSConfig
from fewer.federated.fzoos.peers import FedZOConfig
from fewer.federated.fzoos.problems import Problem, quadratics
from fewer.federated.fzoos.search import Result, minimize
from fewer.federated.fzoos.surrogate import GradientSurrogate, RandomFeatures
from fewer.study import Bench

bench = Bench("fzoos")
N, D, STEP = 150, 300, 1e-5
ROUNDS = 10


@cache
def queries(n: int = N, d: int = D) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.random((n, d))
    return x, np.sin(x[:, 0]) + (x**2).sum(axis=1)


@bench.race(f"a gradient at {N} points of {D} numbers", peer="GaussianProcessRegressor and finite differences, all at once", reach=0.1)
def gradient() -> tuple[Callable[[], object], Callable[[], object]]:
    x, y = queries()
    ours = GradientSurrogate(x, y, length_scale=5.0)
    theirs = GaussianProcessRegressor(Matern(5.0, nu=2.5), alpha=1e-6, optimizer=None).fit(  # pyright: ignore[reportArgumentType] - None is its word for no fitting
        x, (y - y.mean()) / np.ptp(y)
    )
    z = np.full(D, 0.4)
    points = np.concatenate([z[None], z + STEP * np.eye(D)])

    def differences() -> np.ndarray:
        values = theirs.predict(points)
        return (values[1:] - values[0]) / STEP

    return lambda: ours.gradient(z), differences


@bench.quantity("a local step: 100 points, 196 numbers, 100 candidates, 2,000 features", peer="5 ms on one core", unit="s", reach=1.0)
def local_step() -> tuple[float, float]:
    x, y = queries(100, 196)
    features, weights = RandomFeatures.draw(196, 2000), torch.ones(2000, dtype=torch.float64)
    z, candidates = torch.full((196,), 0.4, dtype=torch.float64), torch.rand(100, 196, dtype=torch.float64)

    def step() -> None:
        surrogate = GradientSurrogate(x, y, length_scale=5.0)
        surrogate.gradient(z)
        surrogate.uncertainty(candidates)
        features.gradient(z, weights)

    with one_thread():
        step()
        times = []
        for _ in range(30):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2], 5e-3


@cache
def unlike() -> Problem:
    return quadratics(50, 5, 5.0, seed=0)


def queries_to(bound: float, settings: FZooSConfig | FedZOConfig, rounds: int) -> float:
    """Queries of all clients until F - F* of quadratics of unlike clients is within a bound."""
    problem, found = unlike(), [math.inf]
    assert problem.least is not None

    def tell(round: int, result: Result) -> None:
        if math.isinf(found[0]) and problem.value(result.x) - problem.least <= bound:  # pyright: ignore[reportOperatorIssue]
            found[0] = sum(result.queries)

    with one_thread():
        minimize(problem.boxes, problem.x0, rounds, settings, tell=tell)
    return found[0]


@bench.quantity("queries until F - F* <= 0.1 on unlike quadratics of 50 numbers", peer="FedZO", unit="queries", reach=0.6)
def fewer_queries() -> tuple[float, float]:
    return queries_to(0.1, FZooSConfig(features=1000), 4 * ROUNDS), queries_to(0.1, FedZOConfig(), 4 * ROUNDS)


@bench.quantity("numbers up in a round, 196 numbers, 2,000 features", peer="FedZO", unit="numbers")
def numbers_up() -> tuple[float, float]:
    boxes, x0 = [lambda x: float(x @ x)] * 2, np.full(196, 0.5)
    settings = (FZooSConfig(features=2000, local_steps=2, active_round=0), FedZOConfig(local_steps=2))
    ours, theirs = (minimize(boxes, x0, 1, each).numbers_up[0] for each in settings)
    return ours, theirs
