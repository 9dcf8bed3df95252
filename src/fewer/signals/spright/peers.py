"""What the sparse transform is held against: LASSO on monomials, and sparse-transform."""

from __future__ import annotations

import itertools
import logging
import warnings
from typing import Any

import numpy as np

from fewer.errors import require
from fewer.signals.spright.bins.bits import Bits
from fewer.signals.spright.problems import Model
from fewer.signals.spright.spectrum import SparseSpectrum


def lasso_on_pairs(model: Model, n: int, queries: int, rng: np.random.Generator) -> Model:
    """LASSO, its penalty chosen by cross-validation, on all monomials of degree <= 2 at uniformly drawn inputs."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LassoCV

    pairs = np.array(list(itertools.combinations(range(n), 2)))

    def monomials(m: Bits) -> np.ndarray:
        parities = 1.0 - 2.0 * m
        return np.concatenate([parities, parities[:, pairs[:, 0]] * parities[:, pairs[:, 1]]], axis=1)

    asked = rng.integers(0, 2, (queries, n), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LassoCV(alphas=30, cv=3).fit(monomials(asked), model(asked))
    return lambda m: fitted.predict(monomials(m))


class PeerSignal:
    """sparse-transform on the same function, in its own way: 3 subsampling groups, offsets by its name, values by its regression.

    Args:
        f: the function.
        n: variables.
        bins: 2^b.
        noise_std: 0 reads bins as noiseless; above, by its noise-robust (NSO) offsets.
        repeats: of the noise-robust offsets.
    """

    def __init__(self, f: Model, n: int, bins: int, noise_std: float = 0.0, repeats: int = 1) -> None:
        self.f, self.n, self.b, self.noise_std, self.repeats = f, n, bins.bit_length() - 1, noise_std, repeats

    @property
    def queries(self) -> int:
        """What it will ask, repeated points counted (it keeps no cache)."""
        return 3 * self.repeats * (self.n + 1) << self.b

    def recover(self) -> SparseSpectrum:
        """Sample, transform, peel. Draws from NumPy's global generator, as it does."""
        qsft = require("sparse_transform", "peers").qsft
        signals = require("sparse_transform.qsft.signals.input_signal_subsampled", "peers")
        require("sparse_transform", "peers").set_logging_level(logging.ERROR)
        robust = self.noise_std > 0
        query_args = {
            "query_method": "complex",
            "num_subsample": 3,
            "delays_method_source": "identity",
            "subsampling_method": "qsft",
            "delays_method_channel": "nso" if robust else "identity",
            "num_repeat": self.repeats,
            "b": self.b,
        }
        signal = signals.SubsampledSignal(
            func=lambda m: self.f(np.asarray(m, dtype=np.uint8)), n=self.n, q=2, query_args=query_args, noise_sd=self.noise_std
        )
        found: dict[tuple[int, ...], Any] = qsft.transform(
            signal,
            reconstruct_method_source="identity",
            reconstruct_method_channel="nso-soft" if robust else "identity",
            num_subsample=3,
            num_repeat=self.repeats,
            b=self.b,
            source_decoder=None,
            noise_sd=self.noise_std,
            peeling_method="single-detect",
        )
        indices = np.array(list(found), dtype=np.uint8).reshape(-1, self.n)
        values = np.array([value.real for value in found.values()], dtype=np.float64)
        return SparseSpectrum(indices, values, np.zeros(len(values)), queries=self.queries)
