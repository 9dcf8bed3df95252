"""What is asked of all trainers alike: labels, precision, modes, loaders, patience, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fewer.forward_only import (
    BackpropagationConfig,
    CascadedForwardCNN,
    CascadedForwardConfig,
    ForwardForwardConfig,
    ForwardForwardMLP,
    LocalLearningClassifier,
    MonoForwardConfig,
    MonoForwardMLP,
    cnn,
    fit_backpropagation,
    fit_cascaded_forward,
    fit_forward_forward,
    fit_mono_forward,
    mlp,
)

TRAINERS = {
    "mono-forward": (lambda: MonoForwardMLP(64, (24,), 10), fit_mono_forward, MonoForwardConfig(lr=1e-2, epochs_per_layer=4)),
    "mono-forward at once": (
        lambda: MonoForwardMLP(64, (24, 24), 10),
        fit_mono_forward,
        MonoForwardConfig(lr=1e-2, epochs_per_layer=4, schedule="simultaneous"),
    ),
    "forward-forward": (lambda: ForwardForwardMLP(64, (64,), 10), fit_forward_forward, ForwardForwardConfig(lr=1e-2, epochs=12)),
    "cascaded-forward": (
        lambda: CascadedForwardCNN(1, 8, (8, 16), 10),
        fit_cascaded_forward,
        CascadedForwardConfig(lr=1e-2, epochs=4),
    ),
    "cascaded-forward by feedback": (
        lambda: CascadedForwardCNN(1, 8, (4, 8), 10),
        fit_cascaded_forward,
        CascadedForwardConfig(lr=1e-2, epochs=3, blocks="dfa", block_epochs=2),
    ),
    "backpropagation": (lambda: mlp(64, (24,), 10), fit_backpropagation, BackpropagationConfig(lr=1e-2, epochs=4)),
}
ALL = pytest.mark.parametrize("name", TRAINERS)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.as_tensor(x, dtype=torch.float32).view(-1, 1, 8, 8)[:700] / 16, torch.as_tensor(y)[:700]


def fitted(name, x, y, dtype=torch.float32, **changes):
    make, fit, config = TRAINERS[name]
    torch.manual_seed(0)
    model = make().to(dtype)
    for field, value in changes.items():
        config = copy.copy(config)
        object.__setattr__(config, field, value)
    validation = (x[500:600], y[500:600])
    history = fit(model, x[:500], y[:500], validation=validation, config=config, generator=torch.Generator().manual_seed(0))
    return model, history


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((copy.deepcopy(model).eval()(x).argmax(1) == y).float().mean())


@ALL
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_type_give_the_same_model(digits, name, dtype):
    x, y = digits
    one, other = (fitted(name, x[:600], labels[:600])[0].state_dict() for labels in (y, y.to(dtype)))
    assert all(torch.equal(one[key], other[key]) for key in one)


@ALL
def test_rows_that_are_not_contiguous_give_the_same_model(digits, name):
    x, y = digits
    strided = torch.stack([x, x], dim=-1)[..., 0]
    one, other = (fitted(name, rows[:600], y[:600])[0].state_dict() for rows in (x, strided))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_validation_sees_the_network_without_dropout(digits):
    x, y = digits
    seen = []

    class Watching(nn.Dropout):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, len(x)))
            return super().forward(x)

    model = nn.Sequential(mlp(64, (24,), 10), Watching(0.5))
    config = BackpropagationConfig(epochs=2)
    fit_backpropagation(model, x[:200], y[:200], validation=(x[200:250], y[200:250]), config=config)
    assert {training for training, rows in seen if rows == 50} == {False}
    assert {training for training, rows in seen if rows in (128, 72)} == {True}
    assert not model.training


def test_an_estimators_predictions_do_not_depend_on_the_mode(digits):
    x, y = digits
    flat, shape = x.flatten(1).numpy(), (1, 8, 8)
    classifier = LocalLearningClassifier("backpropagation", channels=(4, 8), image_shape=shape, epochs=2, random_state=0).fit(
        flat, y.numpy()
    )
    expected = classifier.predict_proba(flat)
    state = {name: value.clone() for name, value in classifier.model_.state_dict().items()}
    classifier.model_.train()
    assert (classifier.predict_proba(flat) == expected).all()
    assert classifier.model_.training
    assert all(torch.equal(value, state[name]) for name, value in classifier.model_.state_dict().items())


@ALL
def test_a_loader_without_batches_is_said_in_one_line(name):
    make, fit, config = TRAINERS[name]
    empty = DataLoader(TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(ValueError, match="x yields no batches; expected at least one: check the DataLoader") as error:
        fit(make(), empty, None, validation=(torch.zeros(4, 1, 8, 8), torch.arange(4)), config=config)
    assert "\n" not in str(error.value)


@ALL
def test_patience_of_one_keeps_a_trained_state(digits, name):
    x, y = digits
    make, _, _ = TRAINERS[name]
    torch.manual_seed(0)
    initial = make()
    model, history = fitted(name, x[:600], y[:600], patience=1)
    assert min(history.best.values()) >= 1
    moved = [not torch.equal(value, initial.state_dict()[key]) for key, value in model.state_dict().items()]
    assert sum(moved) >= 2
    assert accuracy(model, x[600:], y[600:]) > accuracy(initial, x[600:], y[600:])


@ALL
def test_bfloat16_learns_as_float32_does(digits, name):
    x, y = digits
    half, whole = (fitted(name, x[:600], y[:600], dtype)[0] for dtype in (torch.bfloat16, torch.float32))
    assert accuracy(half, x[600:].bfloat16(), y[600:]) >= accuracy(whole, x[600:], y[600:]) - 0.06
    assert all(value.dtype == torch.bfloat16 for value in half.parameters())


@ALL
def test_float16_cannot_be_trained_and_says_so(digits, name):
    x, y = digits
    with pytest.raises(ValueError, match=r"the model is torch.float16; expected bfloat16, float32 or float64: train model.float\(\)"):
        fitted(name, x[:600], y[:600], torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_goodness_in_half_precision_tells_labels_apart_as_float32_does(dtype):
    """Sums of squares of 2,000 units: float16 ends at 65,504, bfloat16 has steps of 16 there."""
    torch.manual_seed(0)
    model = ForwardForwardMLP(100, (2000, 2000), 10)
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(50)
    x = torch.rand(20, 100)
    expected = model(x).detach()
    scores = model.to(dtype)(x.to(dtype)).detach().float()
    assert bool(scores.isfinite().all())
    spread = expected - expected.mean(1, keepdim=True)
    torch.testing.assert_close(scores - scores.mean(1, keepdim=True), spread, rtol=0, atol=0.2 * float(spread.abs().max()))


@ALL
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_fitted_model_is_copied_and_pickled(digits, name, duplicate):
    x, y = digits
    model, _ = fitted(name, x[:600], y[:600])
    assert torch.equal(duplicate(model).eval()(x[600:]), model.eval()(x[600:]))
    assert torch.equal(model(x[600:601]), duplicate(model)(x[600:601]))  # one row


def test_a_twin_with_batch_norm_keeps_its_statistics_while_it_is_asked(digits):
    x, y = digits
    model = cnn(1, 8, (4, 8))
    fit_backpropagation(model, x[:200], y[:200], validation=(x[200:300], y[200:300]), config=BackpropagationConfig(epochs=1))
    assert int(model[0][3].num_batches_tracked) == 2
