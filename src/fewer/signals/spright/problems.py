"""What the arms of the study and the races share: sparse functions, networks as cuts, trained ensembles, LASSO, and sparse-transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fewer.errors import require
from fewer.inputs import load_function
from fewer.signals.spright.bins.bits import Bits, pack
from fewer.signals.spright.bins.queries import ArrayFunction
from fewer.signals.spright.spectrum import SparseSpectrum
from fewer.signals.spright.transform import fwht

Model = Callable[[Bits], np.ndarray]
FRESH = 5_000  # inputs on which an explanation is judged
LARGEST = 22  # bits up to which a user's Python function is asked for all of its values


class PythonFunction:
    """A user's function, named `module:name:BITS`, as the arms ask it.

    Attributes:
        n: its bits.
        array: all of its 2^n values, the first bit the highest of the index; it is asked for them once.
    """

    def __init__(self, named: str) -> None:
        self._function, self.n = load_function(named)

    def __call__(self, m: Bits) -> np.ndarray:
        return np.asarray(self._function(m))

    @cached_property
    def array(self) -> np.ndarray:
        index = np.arange(1 << self.n)[:, None]
        return self((index >> np.arange(self.n)[::-1] & 1).astype(np.uint8)).astype(np.float64)


Yours = ArrayFunction | PythonFunction


def k_sparse(n: int, k: int, rng: np.random.Generator) -> SparseSpectrum:
    """A function of exactly k coefficients +-1 at uniformly drawn places."""
    indices = np.zeros((0, n), dtype=np.uint8)
    while len(indices) < k:
        drawn = rng.integers(0, 2, (k - len(indices), n), dtype=np.uint8)
        indices = np.unique(np.concatenate([indices, drawn]), axis=0)
    return SparseSpectrum(indices, rng.choice([-1.0, 1.0], k), np.zeros(k))


def k_sparse_array(n: int, k: int, rng: np.random.Generator) -> tuple[SparseSpectrum, np.ndarray]:
    """Such a function, and all its values [2^n]."""
    true = k_sparse(n, k, rng)
    array = np.zeros(2**n)
    array[(pack(true.indices)[:, 0] >> np.uint64(64 - n)).astype(np.int64)] = true.values
    return true, fwht(array, normalize=False, inplace=True)


class Noisy:
    """A function with white noise on every answer."""

    def __init__(self, f: Model, std: float, rng: np.random.Generator) -> None:
        self.f, self.std, self.rng = f, std, rng

    def __call__(self, m: Bits) -> np.ndarray:
        return self.f(m) + self.std * self.rng.standard_normal(len(m))


def exact_support(found: SparseSpectrum, true: SparseSpectrum) -> bool:
    """Whether just the true coefficients were found."""
    return found.to_dict().keys() == true.to_dict().keys()


@dataclass(frozen=True)
class Network:
    """A graph as its cut function: f(m) is the weight between the nodes with bit 0 and those with bit 1."""

    adjacency: np.ndarray  # [n, n], symmetric

    @classmethod
    def named(cls, name: str) -> Network:
        """ "karate" (34 people, 78 friendships) or "les-miserables" (77 characters, 254 weighted co-appearances), both in networkx."""
        networkx = require("networkx", "signals")
        graph = networkx.karate_club_graph() if name == "karate" else networkx.les_miserables_graph()
        return cls(networkx.to_numpy_array(graph, weight=None if name == "karate" else "weight"))

    @property
    def n(self) -> int:
        return len(self.adjacency)

    @property
    def edges(self) -> int:
        return int(np.count_nonzero(np.triu(self.adjacency)))

    def __call__(self, m: Bits) -> np.ndarray:
        side = m.astype(np.float64)
        return (side @ self.adjacency * (1 - side)).sum(axis=1)

    def edges_right(self, found: SparseSpectrum) -> float:
        """The fraction of edges that are found with their weight, less one for a pair that is no edge (X = -w/2 for the pair)."""
        pairs = found.indices[found.order() == 2]
        weights = -2 * found.values[found.order() == 2]
        nodes = np.array([np.flatnonzero(pair) for pair in pairs]).reshape(-1, 2)
        right = np.isclose(self.adjacency[nodes[:, 0], nodes[:, 1]], weights, atol=1e-6)
        return float((right.sum() - (~right).sum()) / self.edges)


def trained_models() -> dict[str, Model]:
    """Ensembles trained on scikit-learn's breast-cancer data, its 30 features binarised at their medians: functions of 30 bits."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier

    x, y = load_breast_cancer(return_X_y=True)
    x = (x > np.median(x, axis=0)).astype(np.float32)
    boosted = GradientBoostingClassifier(n_estimators=60, max_depth=3, random_state=0).fit(x, y)
    forest = RandomForestClassifier(n_estimators=60, random_state=0).fit(x, y)
    return {
        "boosted trees": lambda m: boosted.decision_function(m.astype(np.float32)),
        "random forest": lambda m: forest.predict_proba(m.astype(np.float32))[:, 1],
    }


def r_squared(explanation: Model, model: Model, n: int, rng: np.random.Generator) -> float:
    """1 - (mean squared error) / (variance of the model), on fresh inputs drawn uniformly."""
    fresh = rng.integers(0, 2, (FRESH, n), dtype=np.uint8)
    answers = model(fresh)
    return float(1 - ((explanation(fresh) - answers) ** 2).mean() / answers.var())
