"""Forward-Forward in the released variant: losses and gradients against explicit loops, labels tried one by one."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from fewer.forward_only import ForwardForwardConfig, ForwardForwardMLP, fit_forward_forward
from fewer.forward_only.backprop_free_mlps.forward_forward import ForwardForwardTrainer, learning_rate_factor
from fewer.forward_only.backprop_free_mlps.layers.label_embedding import embed_labels, embed_neutral, normalised, wrong_labels
from fewer.meters import counting


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.as_tensor(images[order], dtype=torch.float32) / 16
    return torch.cat([torch.zeros(len(x), 10), x], dim=1), torch.as_tensor(labels[order])  # room for the label


def network(sizes=(100, 100), dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return ForwardForwardMLP(74, sizes, 10).to(dtype)


def fitted(digits, model=None, rows=1200, **given):
    x, y = digits
    model = model or network()
    config = ForwardForwardConfig(**{"lr": 3e-3, "epochs": 15, "batch_size": 50, "patience": 15} | given)
    held_out = (x[1200:1500], y[1200:1500])
    history = fit_forward_forward(model, x[:rows], y[:rows], validation=held_out, config=config, generator=torch.Generator().manual_seed(1))
    return model, history


def test_it_learns_digits(digits):
    x, y = digits
    model, history = fitted(digits)
    assert float((model(x[1500:]).argmax(1) == y[1500:]).float().mean()) > 0.85
    assert [line.stage for line in history.epochs[:4]] == ["layer 1", "layer 2", "downstream", "network"]


# Against a re-derivation with explicit loops


def by_loops(model, x, labels, rows, m_old):
    """The losses of the layers and their gradients for W, b by autograd, all written out: identity backward, peers, norm by detach."""
    losses, gradients = [], []
    h = normalised(embed_labels(x.repeat(2, 1), labels, 10))
    for layer, m in zip(model.layers, m_old, strict=True):
        z = h @ layer.weight.T + layer.bias
        a = z + (z.clamp(min=0) - z).detach()  # ReLU forwards, identity backwards
        width = a.shape[1]
        entropy = 0.0
        for row in range(2 * rows):
            logit = sum(a[row, unit] ** 2 for unit in range(width)) - width
            entropy = entropy + torch.log1p(torch.exp(-logit)) + (0 if row < rows else logit)  # -log p, or -log (1 - p)
        new_m = 0.9 * m + 0.1 * sum(a[row] for row in range(rows)) / rows
        mean = sum(new_m[unit] for unit in range(width)) / width
        peers = sum((mean - new_m[unit]) ** 2 for unit in range(width)) / width
        loss = entropy / (2 * rows) + 0.03 * peers
        losses.append(float(loss.detach()))
        gradients.append(torch.autograd.grad(loss, [layer.weight, layer.bias]))
        out = a.detach()
        h = torch.stack([row / (torch.sqrt(sum(value**2 for value in row) / width) + 1e-8) for row in out])
    return losses, gradients


class Watched(ForwardForwardTrainer):
    """Keeps the gradients that the real trainer sets, and moves nothing."""

    def __init__(self, model, config, generator):
        super().__init__(model, config, generator)
        self.seen = []

    def _update(self):
        self.seen += [[p.grad.clone() for p in group if p.grad is not None] for group in self._groups()]
        self.seen = [gradients for gradients in self.seen if gradients]
        self.optimizer.zero_grad()

    def _groups(self):
        return [list(layer.parameters()) for layer in self.model.layers] + [list(self.model.downstream.parameters())]


def test_losses_and_gradients_equal_explicit_loops(digits):
    rows = 5
    x, y = digits[0][:rows].double(), digits[1][:rows]
    model = network((12, 9), torch.float64)
    trainer = Watched(model, ForwardForwardConfig(), torch.Generator().manual_seed(0))
    labels = torch.cat([y, wrong_labels(y, 10, torch.Generator().manual_seed(0))])
    for step in range(2):  # the second with running means that have moved
        m_old = [m.clone() for m in trainer.peer_means]
        if step:
            trainer.generator, trainer.seen = torch.Generator().manual_seed(0), []
        losses = trainer.step(x, y)
        expected, gradients = by_loops(model, x, labels, rows, m_old)
        assert torch.allclose(losses[:2], torch.tensor(expected, dtype=torch.float64), atol=1e-10)
        for ours, theirs in zip(trainer.seen[:2], gradients, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert (one - other).abs().max() < 1e-10


def test_a_silent_unit_still_feels_its_loss(digits):
    x, y = digits[0][:5].double(), digits[1][:5]
    model = network((12, 9), torch.float64)
    with torch.no_grad():
        model.layers[0].bias[3] = -100.0
    trainer = Watched(model, ForwardForwardConfig(), None)
    trainer.step(x, y)
    assert trainer.seen[0][1][3] != 0  # with ReLU's own slope it would be 0


def test_the_downstream_classifier_sees_normalised_true_activations_of_the_upper_layers(digits):
    x, y = digits[0][:5].double(), digits[1][:5]
    model = network((12, 9, 7), torch.float64)
    torch.nn.init.normal_(model.downstream.weight)
    trainer = Watched(model, ForwardForwardConfig(), torch.Generator().manual_seed(0))
    losses = trainer.step(x, y)
    h, features = normalised(embed_labels(x, y, 10)), []
    for layer in model.layers:
        h = normalised(layer(h).clamp(min=0).detach())
        features.append(h)
    scores = model.downstream(torch.cat(features[1:], dim=1))
    loss = torch.nn.functional.cross_entropy(scores, y)
    assert torch.allclose(losses[3], loss.detach(), atol=1e-10)
    assert torch.allclose(trainer.seen[3][0], torch.autograd.grad(loss, model.downstream.weight)[0], atol=1e-10)
    assert torch.allclose(losses[-1], losses[:-1].sum(), atol=1e-10)


def test_a_layer_does_not_feel_the_layers_above(digits):
    x, y = digits[0][:5].double(), digits[1][:5]
    seen = []
    for scale in (1.0, 3.0):
        model = network((12, 9), torch.float64)
        with torch.no_grad():
            model.layers[1].weight.mul_(scale)
        trainer = Watched(model, ForwardForwardConfig(), torch.Generator().manual_seed(0))
        trainer.step(x, y)
        seen.append(trainer.seen)
    assert all(torch.equal(one, other) for one, other in zip(seen[0][0], seen[1][0], strict=True))
    assert not torch.equal(seen[0][1][0], seen[1][1][0])


def test_no_backward_pass_and_no_graph(digits):
    saved = []
    with counting() as counts, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fitted(digits, epochs=1)
    assert counts["backward_passes"] == 0
    assert not saved


# Labels


@settings(max_examples=30, deadline=None)
@given(classes=st.integers(2, 12), seed=st.integers(0, 2**31))
def test_a_wrong_label_is_any_label_but_the_true_one(classes, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (400,), generator=generator)
    wrong = wrong_labels(y, classes, generator)
    assert not (wrong == y).any()
    assert wrong.min() >= 0
    assert wrong.max() < classes
    if classes <= 5:  # enough draws to see every shift
        assert len(torch.unique((wrong - y) % classes)) == classes - 1


def test_the_scores_equal_brute_force_over_the_labels(digits):
    x = digits[0][:40].double()
    for sizes in [(30, 20, 10), (30,)]:
        model = network(sizes, torch.float64)
        expected = []
        for label in range(10):
            goodness = model.layer_goodness(embed_labels(x, torch.full((40,), label), 10))
            expected.append(sum(goodness[1:]) if len(sizes) > 1 else goodness[0])
        assert torch.allclose(model(x), torch.stack(expected, dim=1), atol=1e-9)


def test_goodness_is_taken_before_normalisation(digits):
    model = network((30, 20), torch.float64)
    x = embed_labels(digits[0][:4].double(), digits[1][:4], 10)
    a = torch.relu(model.layers[0](x / (x.square().mean(1, keepdim=True).sqrt() + 1e-8)))
    b = torch.relu(model.layers[1](a / (a.square().mean(1, keepdim=True).sqrt() + 1e-8)))
    for ours, expected in zip(model.layer_goodness(x), (a.square().sum(1), b.square().sum(1)), strict=True):
        assert torch.allclose(ours, expected, atol=1e-10)


def test_a_label_that_is_no_candidate_is_never_predicted(digits):
    x = digits[0]
    model, _ = fitted(digits, epochs=3)
    scores = model(x[1500:], candidates=[0, 3, 7])
    assert set(scores.argmax(1).tolist()) <= {0, 3, 7}
    whole = model(x[1500:])
    assert torch.allclose(scores[:, [0, 3, 7]], whole[:, [0, 3, 7]], rtol=1e-4)
    assert scores[:, [1, 2, 4, 5, 6, 8, 9]].isneginf().all()


def test_what_stands_where_the_label_goes_is_not_read(digits):
    x, y = digits
    model, _ = fitted(digits, epochs=3)
    told = embed_labels(x[1500:], y[1500:], 10)  # the true label, smuggled in
    assert torch.equal(model(told), model(x[1500:]))
    assert torch.equal(model.classify(told), model.classify(x[1500:]))


def test_the_neutral_label_claims_nothing(digits):
    x = digits[0][:6]
    model = network()
    neutral = embed_neutral(x, 10)
    assert torch.equal(neutral[:, :10], torch.full((6, 10), 0.1))
    h = normalised(neutral)
    features = []
    for layer in model.layers:
        h = normalised(layer(h).clamp(min=0))
        features.append(h)
    assert torch.allclose(model.classify(x), model.downstream(features[1]), atol=1e-6)


def test_batches_of_any_size_and_order_give_the_same_predictions(digits):
    model, _ = fitted(digits, epochs=3)
    x = digits[0][1500:1700]  # more than `forward` takes at a time
    whole = model(x).argmax(1)
    assert model(x[:0]).shape == (0, 10)
    assert torch.equal(torch.cat([model(one[None]) for one in x]).argmax(1), whole)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    assert torch.equal(model(x[order]).argmax(1), whole[order])


# Training


def test_the_learning_rate_is_constant_for_half_of_the_epochs_and_ends_at_two_over_them():
    for epochs in (1, 2, 3, 30, 100):
        factors = [learning_rate_factor(epoch, epochs) for epoch in range(1, epochs + 1)]
        assert all(factor == 1 for factor in factors[: math.ceil(epochs / 2)])
        assert factors[-1] == pytest.approx(min(1.0, 2 / epochs))
        for e in range(math.floor(epochs / 2) + 2, epochs + 1):
            assert factors[e - 1] == pytest.approx(2 * (1 + epochs - e) / epochs)


def test_both_learning_rates_follow_it(digits, monkeypatch):
    rates = []

    class Spy(ForwardForwardTrainer):
        def step(self, x, y):
            rates.append(tuple(group["lr"] for group in self.optimizer.param_groups))
            return super().step(x, y)

    from fewer.forward_only.backprop_free_mlps import forward_forward

    monkeypatch.setattr(forward_forward, "ForwardForwardTrainer", Spy)
    fitted(digits, rows=50, epochs=4, batch_size=50, lr=1e-3, downstream_lr=1e-2)
    assert rates == [pytest.approx(each) for each in [(1e-3, 1e-2), (1e-3, 1e-2), (1e-3, 1e-2), (5e-4, 5e-3)]]


def test_weights_start_by_their_output_width_and_the_classifier_at_zero():
    model = network((400, 100))
    assert float(model.layers[0].weight.detach().std()) == pytest.approx(1 / 20, rel=0.03)
    assert float(model.layers[1].weight.detach().std()) == pytest.approx(1 / 10, rel=0.03)
    assert not any(layer.bias.any() for layer in model.layers)
    assert not model.downstream.weight.any()
    assert model.downstream.bias is None
    assert model.downstream.in_features == 100


def test_early_stopping_keeps_the_state_of_the_best_validation_accuracy(digits):
    x, y = digits
    model, history = fitted(digits, epochs=25, patience=3, lr=1e-2, rows=300)
    lines = [line for line in history.epochs if line.stage == "network"]
    best = max(line.validation_accuracy for line in lines)
    assert lines[history.best["network"] - 1].validation_accuracy == best
    assert float((model(x[1200:1500]).argmax(1) == y[1200:1500]).float().mean()) == pytest.approx(best, abs=1e-6)


def test_sgd_with_momentum_is_the_other_optimiser(digits):
    trainer = ForwardForwardTrainer(network(), ForwardForwardConfig(optimizer="sgd"), None)
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert [group["momentum"] for group in trainer.optimizer.param_groups] == [0.9, 0.9]


def test_one_seed_gives_one_result_and_a_state_dict_all_of_it(digits):
    one, _ = fitted(digits, epochs=2)
    other, _ = fitted(digits, epochs=2)
    copied = network(seed=5)
    copied.load_state_dict(one.state_dict())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    assert torch.equal(copied(digits[0][:50]), one(digits[0][:50]))


def test_a_data_loader_gives_what_the_tensors_give(digits):
    x, y = digits[0][:200], digits[1][:200]
    config = ForwardForwardConfig(epochs=1, batch_size=100, patience=None)
    one, other = network(), network()
    generator = torch.Generator().manual_seed(0)
    fit_forward_forward(other, x, y, validation=None, config=config, generator=generator)
    generator.manual_seed(0)
    order = torch.randperm(200, generator=generator)  # the fit's own shuffle; the wrong labels are drawn after it
    loader = DataLoader(TensorDataset(x[order], y[order]), batch_size=100)
    fit_forward_forward(one, loader, None, validation=None, config=config, generator=generator)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# Bad input


def test_networks_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"10 classes and 9 input features; expected fewer classes than features"):
        ForwardForwardMLP(9, (5,), 10)
    for sizes in ((), (0,), (5, -2)):
        with pytest.raises(ValueError, match="expected at least one whole number above 0"):
            ForwardForwardMLP(74, sizes, 10)
    with pytest.raises(ValueError, match="activation is 'tanh'; expected one of relu"):
        ForwardForwardMLP(74, (5,), 10, activation="tanh")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected a whole number of at least 1"),
        ({"lr": -1e-3}, "lr is -0.001; expected a finite number above 0"),
        ({"downstream_lr": 0}, "downstream_lr is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"optimizer": "adam"}, "optimizer is 'adam'; expected one of adamw, sgd"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        ForwardForwardConfig(**bad)


def test_data_that_cannot_be_used_are_refused_and_change_nothing(digits):
    x, y = digits
    model = network()
    before = copy.deepcopy(model.state_dict())
    broken = x.clone()
    broken[11, 3] = float("inf")
    for bad_x, bad_y, held_out, message in [
        (x, y + 1, (x, y), "y holds labels 1..10; expected 0..9"),
        (x, y.double(), (x, y), "expected an integer tensor"),
        (broken, y, (x, y), "NaN or infinite value in row 11"),
        (x[:, :50], y, (x, y), "x has 50 features an example; expected 74"),
        (x, y, None, "validation is empty while early stopping is on"),
        (x, y, (x[:0], y[:0]), "validation is empty while early stopping is on"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_forward_forward(model, bad_x, bad_y, validation=held_out)
    for call in (model, model.classify, model.layer_goodness):
        with pytest.raises(ValueError, match="50 features an example; expected 74"):
            call(x[:, :50])
    with pytest.raises(ValueError, match=r"y holds labels 0\.\.10"):
        model(x[:3], candidates=[0, 10])
    with pytest.raises(ValueError, match="candidates is empty; expected at least one"):
        model(x[:3], candidates=[])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_finite_state(digits):
    x, y = digits
    model = network()
    config = ForwardForwardConfig(lr=1e30, patience=None, epochs=5)
    with pytest.raises(FloatingPointError, match=r"(layer 1|layers\.0\.\w+) .*epoch 1.*last finite state is kept"):
        fit_forward_forward(model, x[:200], y[:200], validation=None, config=config)
    assert all(value.isfinite().all() for value in model.state_dict().values())
