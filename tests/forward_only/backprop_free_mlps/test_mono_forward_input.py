"""What Mono-Forward refuses, each in one line that says what was given and what was expected."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fewer.forward_only import MonoForwardConfig, MonoForwardMLP, fit_mono_forward

SHORT = MonoForwardConfig(epochs_per_layer=1)
X, Y = torch.zeros(20, 64), torch.zeros(20, dtype=torch.long)


def network() -> MonoForwardMLP:
    return MonoForwardMLP(64, (32, 16), 10)


@pytest.mark.parametrize(
    ("x", "y", "what"),
    [
        (X, Y + 10, r"labels 10..10; expected 0..9"),
        (X, Y - 1, r"labels -1..-1; expected 0..9"),
        (X, Y.float(), r"y is \(20,\) torch.float32; expected an integer tensor"),
        (X, Y[:5], r"y is \(5,\)"),
        (torch.full((20, 64), float("nan")).where(torch.arange(20)[:, None] == 7, X), Y, "NaN or infinite value in row 7"),
        (torch.full((20, 64), float("inf")).where(torch.arange(20)[:, None] == 19, X), Y, "NaN or infinite value in row 19"),
        (torch.zeros(20, 63), Y, "63 features an example; expected 64"),
        (X.long(), Y, "expected a float tensor"),
        (X[:0], Y[:0], "N >= 1"),
    ],
)
def test_data_that_cannot_be_used_are_refused_in_one_line(x, y, what):
    for given_x, given_y, held_out in [(x, y, (X, Y)), (X, Y, (x, y))][: 2 if len(x) else 1]:
        with pytest.raises(ValueError, match=what) as raised:
            fit_mono_forward(network(), given_x, given_y, validation=held_out)
        assert "\n" not in str(raised.value)


def test_a_batch_of_a_dataloader_is_checked_too():
    with pytest.raises(ValueError, match=r"labels 12..12; expected 0..9"):
        fit_mono_forward(network(), DataLoader(TensorDataset(X, Y + 12)), None, validation=(X, Y))
    with pytest.raises(ValueError, match="brings its own labels"):
        fit_mono_forward(network(), DataLoader(TensorDataset(X, Y)), Y, validation=(X, Y))


@pytest.mark.parametrize("empty", [None, (X[:0], Y[:0]), [X[:0], Y[:0]], DataLoader(TensorDataset(X[:0], Y[:0]))])
def test_early_stopping_needs_validation_data(empty):
    with pytest.raises(ValueError, match="validation is empty while early stopping is on"):
        fit_mono_forward(network(), X, Y, validation=empty)
    if not isinstance(empty, DataLoader):
        history = fit_mono_forward(network(), X, Y, validation=empty, config=replace(SHORT, patience=None))
        assert np.isnan(history.epochs[0].validation_accuracy)


def test_a_stream_without_batches_is_told():
    class Nothing(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="x of validation yields no batches; expected at least one"):
        fit_mono_forward(network(), X, Y, validation=DataLoader(Nothing()), config=SHORT)
    with pytest.raises(ValueError, match="x yields no batches"):
        fit_mono_forward(network(), DataLoader(Nothing()), None, validation=(X, Y), config=SHORT)


@pytest.mark.parametrize(
    "setting",
    [
        {"batch_size": 0},
        {"batch_size": True},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"epochs_per_layer": 0},
        {"patience": 0},
        {"schedule": "parallel"},
        {"cache_bytes": -1},
        {"min_delta": -1e-4},
    ],
)
def test_a_setting_that_cannot_be_used_is_refused(setting):
    with pytest.raises(ValueError, match=f"^{next(iter(setting))} is .*; expected"):
        MonoForwardConfig(**setting)


@pytest.mark.parametrize("sizes", [(), (10, 0), (-1,), (2.5,), (True,)])
def test_layer_sizes_that_cannot_be_used_are_refused(sizes):
    with pytest.raises(ValueError, match=r"hidden_sizes is .*; expected at least one whole number above 0"):
        MonoForwardMLP(64, sizes, 10)


def test_a_fitted_model_refuses_another_width():
    model = network()
    fit_mono_forward(model, X, Y, validation=(X, Y), config=SHORT)
    for ask in (model, model.activations, lambda x: model.local_gradients(x, Y)):
        with pytest.raises(ValueError, match="65 features an example; expected 64"):
            ask(torch.zeros(20, 65))
