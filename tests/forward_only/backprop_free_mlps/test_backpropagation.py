"""The twin: the same layers as the local learners, trained end to end by the same protocol."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fewer.forward_only import BackpropagationConfig, CascadedForwardCNN, ForwardForwardMLP, MonoForwardMLP, cnn, fit_backpropagation, mlp
from fewer.meters import counting

SHORT = BackpropagationConfig(lr=3e-3, epochs=3, batch_size=100, patience=None)


@pytest.fixture(scope="module")
def digits():
    """(x, y) to train on, to validate on and to test on."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = torch.as_tensor(x[order] / 16 - 0.3, dtype=torch.float32), torch.as_tensor(y[order])
    return (x[:1200], y[:1200]), (x[1200:1400], y[1200:1400]), (x[1400:], y[1400:])


def network(seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    return mlp(64, (64, 32), 10)


def fit(model, digits, config=SHORT, **settings):
    train, held_out, _ = digits
    return fit_backpropagation(model, *train, validation=held_out, config=config, generator=torch.Generator().manual_seed(0), **settings)


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def shapes(*modules) -> list[torch.Size]:
    return sorted(parameter.shape for module in modules for parameter in module.parameters())


def test_the_twin_of_an_mlp_has_its_layers_and_an_output_layer():
    twin = shapes(mlp(64, (32, 16), 10))
    output = [torch.Size([10]), torch.Size([10, 16])]
    for ours in (MonoForwardMLP(64, (32, 16), 10), ForwardForwardMLP(64, (32, 16), 10)):
        assert twin == sorted([*shapes(ours.layers), *output])


def test_the_twin_of_a_cnn_has_its_blocks_and_an_output_layer():
    ours = CascadedForwardCNN(1, (9, 8), (4, 8), 10)
    twin = cnn(1, (9, 8), (4, 8), 10)
    assert shapes(twin) == shapes(ours.blocks, ours.predictors[-1])
    named = [type(part).__name__ for part in twin.modules() if not list(part.children())]
    assert named == ["Conv2d", "ReLU", "MaxPool2d", "BatchNorm2d"] * 2 + ["Flatten", "Linear"]
    assert named[:8] == [type(part).__name__ for part in ours.blocks.modules() if not list(part.children())]


def test_a_fit_is_adamw_on_the_cross_entropy_of_shuffled_batches(digits):
    model, reference = network().double(), network().double()
    (x, y), _, _ = digits
    fit(model, digits, replace(SHORT, epochs=2, weight_decay=0.1))
    optimizer = torch.optim.AdamW(reference.parameters(), lr=3e-3, weight_decay=0.1, foreach=False)
    generator = torch.Generator().manual_seed(0)
    states = []
    for _ in range(2):
        for rows in torch.randperm(len(x), generator=generator).split(100):
            optimizer.zero_grad()
            F.cross_entropy(reference(x[rows].double()), y[rows]).backward()
            optimizer.step()
        states.append(copy.deepcopy(reference.state_dict()))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, states[-1][name], rtol=0, atol=1e-8)


def test_it_makes_one_backward_pass_a_step(digits):
    with counting() as counts:
        fit(network(), digits)
    assert counts["backward_passes"] == 3 * 12


def test_it_learns_the_digits(digits):
    x, y = digits[2]
    for model in (network(), nn.Sequential(nn.Unflatten(1, (1, 8, 8)), cnn(1, 8, (8, 16), 10))):
        fit(model, digits, replace(SHORT, epochs=15))
        assert (model(x).argmax(1) == y).float().mean() > 0.93


def test_one_seed_gives_one_result_bit_for_bit(digits):
    models = [network(), network()]
    histories = [fit(model, digits) for model in models]
    assert same(models[0].state_dict(), models[1].state_dict())
    assert [line[:5] for line in histories[0].epochs] == [line[:5] for line in histories[1].epochs]


def test_the_best_validation_state_is_kept(digits):
    model = network()
    states = []
    config = replace(SHORT, lr=0.05, epochs=30, patience=2)  # too high: validation soon gets worse
    history = fit(model, digits, config, callbacks=[lambda _: states.append(copy.deepcopy(model.state_dict()))])
    losses = [line.validation_loss for line in history.epochs]
    best = history.best["network"]
    assert losses[best - 1] == min(losses)
    assert len(losses) == best + 2 < 30
    assert same(model.state_dict(), states[best - 1])
    assert not same(model.state_dict(), states[-1])


def test_the_history_says_what_the_model_does(digits):
    model = network()
    history = fit(model, digits, replace(SHORT, patience=10))
    line = history.epochs[history.best["network"] - 1]
    x, y = digits[1]
    assert line.validation_accuracy == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
    assert line.validation_loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    assert 0 < history.epochs[0].seconds <= history.epochs[-1].seconds <= history.seconds


def test_batch_norm_does_not_see_validation_or_test_rows(digits):
    (x, y), (held_x, held_y), (test_x, _) = digits
    found = []
    config = replace(SHORT, epochs=1)  # so that the same epoch is the best one
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        model = cnn(1, 8, (4,), 10)
        generator = torch.Generator().manual_seed(0)
        held_out = (held_x.view(-1, 1, 8, 8) * scale, held_y)
        fit_backpropagation(model, x.view(-1, 1, 8, 8), y, validation=held_out, config=config, generator=generator)
        assert not model.training
        kept = copy.deepcopy(model.state_dict())
        model(test_x.view(-1, 1, 8, 8))
        assert same(model.state_dict(), kept)
        found.append(model)
    torch.testing.assert_close(*[model[0][3].running_var for model in found], rtol=0, atol=0)


def test_a_dataloader_gives_what_tensors_give(digits):
    (x, y), held_out, _ = digits
    unshuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).argsort()
    config = replace(SHORT, epochs=1)
    from_loader, from_tensors = network(), network()
    loaders = [DataLoader(TensorDataset(*data), batch_size=100) for data in ((x, y), held_out)]
    fit_backpropagation(from_loader, loaders[0], None, validation=loaders[1], config=config)
    generator = torch.Generator().manual_seed(0)
    fit_backpropagation(from_tensors, x[unshuffled], y[unshuffled], validation=held_out, config=config, generator=generator)
    assert same(from_loader.state_dict(), from_tensors.state_dict())


def test_a_loss_that_is_not_finite_stops_it_and_keeps_the_last_finite_state(digits):
    model = network()
    finite = {}

    def spoil(line):
        if line.epoch == 2:
            model[1].bias.data[3] = float("nan")
        else:
            finite.update(copy.deepcopy(model.state_dict()))

    with pytest.raises(FloatingPointError, match=r"network.* epoch 2"):
        fit(model, digits, callbacks=[spoil])
    assert same(model.state_dict(), finite)


X, Y = torch.zeros(20, 64), torch.zeros(20, dtype=torch.long)


@pytest.mark.parametrize(
    ("x", "y", "what"),
    [
        (X, Y + 10, r"labels 10..10; expected 0..9"),
        (X, Y.float(), "expected an integer tensor"),
        (X.index_fill(0, torch.tensor([4]), math.nan), Y, "NaN or infinite value in row 4"),
        (torch.zeros(20, 63), Y, "x is .*63.*, which the model cannot take"),
        (X.long(), Y, "expected a float tensor"),
    ],
)
def test_data_that_cannot_be_used_are_refused_in_one_line(x, y, what):
    with pytest.raises(ValueError, match=what) as raised:
        fit_backpropagation(network(), x, y, validation=(X, Y))
    assert "\n" not in str(raised.value)


def test_a_refusal_leaves_the_model_as_it_was_and_validation_is_checked_too():
    model = network().train()
    with pytest.raises(ValueError, match="which the model cannot take"):
        fit_backpropagation(model, torch.zeros(20, 63), Y, validation=(X, Y))
    assert model.training
    with pytest.raises(ValueError, match="x of validation has 63 features an example; expected 64"):
        fit_backpropagation(model, X, Y, validation=(torch.zeros(20, 63), Y))


def test_a_model_whose_output_is_no_scores_is_refused():
    with pytest.raises(ValueError, match=r"gives \(1, 8, 8\) for one example; expected scores"):
        fit_backpropagation(nn.Sequential(nn.Linear(64, 64), nn.Unflatten(1, (8, 8))), X, Y, validation=(X, Y))


def test_early_stopping_needs_validation_data():
    with pytest.raises(ValueError, match="validation is empty while early stopping is on"):
        fit_backpropagation(network(), X, Y, validation=None)
    history = fit_backpropagation(network(), X, Y, validation=None, config=SHORT)
    assert math.isnan(history.epochs[0].validation_loss)


@pytest.mark.parametrize(
    "setting", [{"batch_size": 0}, {"lr": 0.0}, {"epochs": 0}, {"patience": 0}, {"weight_decay": -1.0}, {"min_delta": -1.0}]
)
def test_a_setting_that_cannot_be_used_is_refused(setting):
    with pytest.raises(ValueError, match=f"^{next(iter(setting))} is .*; expected"):
        BackpropagationConfig(**setting)


def test_sizes_that_cannot_be_used_are_refused():
    for sizes in [(), (0,), (10, -1)]:
        with pytest.raises(ValueError, match=r"hidden_sizes is .*; expected"):
            mlp(64, sizes, 10)
        with pytest.raises(ValueError, match=r"channels is .*; expected"):
            cnn(1, 8, sizes, 10)
    with pytest.raises(ValueError, match="an image of 8x7 pixels is too small for 3 blocks; expected at least 8 a side"):
        cnn(1, (8, 7), (2, 2, 2), 10)
