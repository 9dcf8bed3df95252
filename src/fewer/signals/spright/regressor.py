"""The transform as a scikit-learn estimator: it learns from queries of a model in place of a table of examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from fewer.signals.spright.bins.offsets import Design
from fewer.signals.spright.bins.plan import WHTConfig
from fewer.signals.spright.bins.queries import Executor
from fewer.signals.spright.recovery import sparse_wht
from fewer.signals.spright.spectrum import SparseSpectrum, as_bits


class SparseWalshRegressor(RegressorMixin, BaseEstimator):
    """Explain a model of binary features by its few interactions, from queries of the model.

    Args:
        sparsity, noise_std, design, groups, bins, max_queries, max_degree, refine: as in `sparse_wht`.
        random_state: seed of the queries.
        progress: show a bar on a terminal.

    Attributes:
        spectrum_: the `SparseSpectrum`.
        n_features_in_: features.

    Examples:
        >>> explained = SparseWalshRegressor(sparsity=4).fit(lambda x: 1.0 * x[:, 0] * x[:, 2], n_features=5)
        >>> explained.predict(np.array([[1, 0, 1, 0, 0], [1, 1, 0, 1, 1]])).round(9).tolist()
        [1.0, 0.0]
    """

    def __init__(
        self,
        sparsity: int | None = None,
        *,
        noise_std: float | None = None,
        design: Design = "so",
        groups: int | None = None,
        bins: int | None = None,
        max_queries: int | None = None,
        max_degree: int | None = None,
        refine: bool = True,
        random_state: int = 0,
        progress: bool = False,
    ) -> None:
        self.sparsity, self.noise_std, self.design, self.groups, self.bins = sparsity, noise_std, design, groups, bins
        self.max_queries, self.max_degree, self.refine = max_queries, max_degree, refine
        self.random_state, self.progress = random_state, progress

    def fit(self, model_predict: Callable[[np.ndarray], Any], n_features: int, *, executor: Executor | None = None) -> Self:
        """Ask the model where `sparse_wht` chooses.

        Args:
            model_predict: takes zeros and ones [q, n_features] uint8, returns q numbers.
            n_features: features of the model.
            executor: where the model is called, as in `sparse_wht`.

        Raises:
            TypeError: `model_predict` cannot be called.
            ValueError: as `sparse_wht`.
        """
        if not callable(model_predict):
            raise TypeError(f"model_predict is {type(model_predict).__name__}; expected a function of rows of bits, such as model.predict")
        given = self.get_params(deep=False)
        self.spectrum_: SparseSpectrum = sparse_wht(
            model_predict, n_features, seed=given.pop("random_state"), config=WHTConfig(executor=executor), **given
        )
        self.n_features_in_ = n_features
        return self

    def predict(self, X: Any) -> np.ndarray:
        """What the spectrum says of rows of zeros and ones [q, n_features], float64 [q]."""
        check_is_fitted(self, "spectrum_")
        return self.spectrum_(as_bits(X, self.n_features_in_))
