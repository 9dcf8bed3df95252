"""The four trainers as one scikit-learn estimator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_choice
from fewer.fitting import Callback, History, check_features, evaluating
from fewer.fitting import Epoch as Epoch
from fewer.forward_only._shared.backpropagation import BackpropagationConfig, cnn, fit_backpropagation, mlp
from fewer.forward_only.backprop_free_mlps.cascaded_forward import CascadedForwardCNN, CascadedForwardConfig, fit_cascaded_forward
from fewer.forward_only.backprop_free_mlps.forward_forward import ForwardForwardConfig, ForwardForwardMLP, fit_forward_forward
from fewer.forward_only.backprop_free_mlps.mono_forward import MonoForwardConfig, MonoForwardMLP, fit_mono_forward

MethodName = Literal["mono-forward", "forward-forward", "cascaded-forward", "backpropagation"]
Config = MonoForwardConfig | ForwardForwardConfig | CascadedForwardConfig | BackpropagationConfig

FLOATS = [np.float64, np.float32]
BLOCK = 128  # rows that are scored at a time


class Method(NamedTuple):
    """What a method's name stands for."""

    config: type[Config]
    fit: Any
    epochs: str  # the field of the config that limits the epochs


METHODS = {
    "mono-forward": Method(MonoForwardConfig, fit_mono_forward, "epochs_per_layer"),
    "forward-forward": Method(ForwardForwardConfig, fit_forward_forward, "epochs"),
    "cascaded-forward": Method(CascadedForwardConfig, fit_cascaded_forward, "epochs"),
    "backpropagation": Method(BackpropagationConfig, fit_backpropagation, "epochs"),
}


class LocalLearningClassifier(ClassifierMixin, BaseEstimator):
    """A network trained layer by layer, or its twin trained by backpropagation, with scikit-learn's interface.

    It passes scikit-learn's `check_estimator` for "mono-forward", "forward-forward" and "backpropagation" with nothing skipped.
    "cascaded-forward", and any method given an `image_shape`, takes images alone, which the checks' tables are not.

    Args:
        method: "mono-forward", "forward-forward", "cascaded-forward", or "backpropagation" (an MLP, with `image_shape` a CNN).
        hidden_sizes: widths of the hidden layers of an MLP.
        channels: channels of the blocks of a CNN.
        image_shape: (channels, height, width) of the images that the rows of X are, flattened; for a CNN only.
        config: the method's config, such as `MonoForwardConfig(schedule="simultaneous")`; None takes its defaults.
        lr: learning rate, in place of the config's (of the layers; of the predictors for "cascaded-forward"); None keeps that.
        epochs: passes over the data at most, in place of the config's (for each layer or predictor where these train in turn).
        validation_fraction: part of the rows, drawn by `random_state`, that early stopping looks at and training does not see; with 0
            all rows are trained on for all epochs.
        normalize: subtract the mean of all entries of the training data and divide by their deviation, one number each.
        device: "cpu" or "cuda".
        random_state: seeds the initial weights, the validation rows and the order of the batches.

    Attributes:
        classes_: the labels, sorted.
        model_: the trained module. For "forward-forward" it takes C columns of zeros before the features, where it writes the label,
            so that no feature is lost to it.
        history_: what happened during the fit.
        mean_, scale_: what `normalize` found (0 and 1 without).
        n_features_in_: features of a row.

    Examples:
        >>> from sklearn.datasets import load_iris
        >>> x, y = load_iris(return_X_y=True)
        >>> classifier = LocalLearningClassifier(hidden_sizes=(32,), lr=1e-2, epochs=50, random_state=0).fit(x, y)
        >>> classifier.score(x, y) > 0.9
        True
        >>> classifier.predict_proba(x[:5]).shape
        (5, 3)
    """

    n_features_in_: int
    history_: History

    def __init__(
        self,
        method: MethodName = "mono-forward",
        *,
        hidden_sizes: Sequence[int] = (1000, 1000),
        channels: Sequence[int] = (32, 128, 512),
        image_shape: tuple[int, int, int] | None = None,
        config: Config | None = None,
        lr: float | None = None,
        epochs: int | None = None,
        validation_fraction: float = 0.1,
        normalize: bool = True,
        device: str = "cpu",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.method = method
        self.hidden_sizes = hidden_sizes
        self.channels = channels
        self.image_shape = image_shape
        self.config = config
        self.lr = lr
        self.epochs = epochs
        self.validation_fraction = validation_fraction
        self.normalize = normalize
        self.device = device
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike, *, callbacks: Iterable[Callback] = ()) -> Self:
        """Train on rows X [N, features] with labels y [N] of any kind; each callback is called with every `Epoch` as it ends.

        Raises:
            ValueError: a parameter or data that cannot be used.
            FloatingPointError: a loss is not finite; the message names layer and epoch.
        """
        config = self._chosen_config()
        given: Any = validate_data(self, X=X, y=y, dtype=FLOATS, ensure_all_finite=False, ensure_min_samples=2)  # pyright: ignore[reportArgumentType]
        x, y = given
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y holds 1 class, {self.classes_[0]!r}; expected at least 2 classes: add rows of another class")
        check_features(torch.tensor(x), "X")
        self.mean_, self.scale_ = (float(x.mean()), float(x.std()) or 1.0) if self.normalize else (0.0, 1.0)
        draw = check_random_state(self.random_state)
        train, held_out = self._split(len(x), draw)
        if not len(held_out):
            config = replace(config, patience=None)
        seed = int(draw.randint(2**31 - 1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build_network().to(self.device)
        inputs, labels = self._inputs(x), torch.as_tensor(numbers)
        self.history_ = METHODS[self.method].fit(
            model,
            inputs[train],
            labels[train],
            validation=(inputs[held_out], labels[held_out]) if len(held_out) else None,
            config=config,
            callbacks=callbacks,
            generator=torch.Generator().manual_seed(seed),
        )
        self.model_ = model
        return self

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The label of each row of X [N, features].

        Raises:
            NotFittedError: before `fit`.
            ValueError: X has another number of features than in `fit`, or values that are not finite.
        """
        scores = self._scores(X)
        return self.classes_[scores.argmax(1).numpy()]

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Softmax of the class scores [N, classes]; nothing calibrates them, and Forward-Forward's goodness makes them sharp.

        Raises:
            NotFittedError: before `fit`.
            ValueError: X has another number of features than in `fit`, or values that are not finite.
        """
        return torch.softmax(self._scores(X).double(), dim=1).numpy()

    def build_network(self) -> nn.Module:
        """A new network for the classes and features that `fit` found; ValueError where the parameters do not suit them."""
        classes, features = len(self.classes_), self.n_features_in_
        if self.image_shape is None:
            if self.method == "cascaded-forward":
                raise ValueError(
                    "image_shape is None; expected (channels, height, width) for cascaded-forward: say how a row folds into an image"
                )
            make = {"mono-forward": MonoForwardMLP, "forward-forward": ForwardForwardMLP, "backpropagation": mlp}[self.method]
            return make(features + self._label_columns, self.hidden_sizes, classes)
        if self.method not in ("cascaded-forward", "backpropagation"):
            raise ValueError(f"image_shape is {self.image_shape} for {self.method}, which has no CNN; expected None: leave it out")
        if len(self.image_shape) != 3 or math.prod(self.image_shape) != features:
            raise ValueError(
                f"image_shape is {self.image_shape} and X has {features} features; expected channels x height x width to give them"
            )
        channels, height, width = self.image_shape
        make = CascadedForwardCNN if self.method == "cascaded-forward" else cnn
        return make(channels, (height, width), self.channels, classes)

    @property
    def _label_columns(self) -> int:
        """Columns of zeros before the features, for Forward-Forward's label."""
        return len(self.classes_) if self.method == "forward-forward" else 0

    def _chosen_config(self) -> Config:
        check_choice(METHODS, method=self.method)
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; expected at least 0 and less than 1")
        method = METHODS[self.method]
        config = method.config() if self.config is None else self.config
        if not isinstance(config, method.config):
            raise ValueError(f"config is a {type(config).__name__}; expected a {method.config.__name__} for {self.method}")
        changes = {"lr": self.lr, method.epochs: self.epochs}
        return replace(config, **{name: value for name, value in changes.items() if value is not None})

    def _split(self, rows: int, draw: np.random.RandomState) -> tuple[Tensor, Tensor]:
        """Rows to train on and rows to validate on."""
        order = torch.as_tensor(draw.permutation(rows))
        held_out = min(math.ceil(self.validation_fraction * rows), rows - 1)
        return order[held_out:], order[:held_out]

    def _inputs(self, x: NDArray[Any]) -> Tensor:
        """What the network sees of the rows."""
        inputs = torch.tensor((x - self.mean_) / self.scale_, dtype=torch.float32, device=self.device)
        check_features(inputs, "X")
        if self.image_shape is not None:
            return inputs.unflatten(1, self.image_shape)
        return F.pad(inputs, (self._label_columns, 0))

    @torch.no_grad()
    def _scores(self, X: ArrayLike) -> Tensor:
        """Class scores [N, classes], in blocks of one size, so that a row's scores do not depend on how many came with it."""
        check_is_fitted(self)
        x: Any = validate_data(self, X=X, reset=False, dtype=FLOATS, ensure_all_finite=False)  # pyright: ignore[reportArgumentType]
        scores = []
        with evaluating(self.model_):
            for block in self._inputs(x).split(BLOCK):
                whole = torch.cat([block, block.new_zeros(BLOCK - len(block), *block.shape[1:])])
                scores.append(self.model_(whole)[: len(block)])
        return torch.cat(scores).cpu()
