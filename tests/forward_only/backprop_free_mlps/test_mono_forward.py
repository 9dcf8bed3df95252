"""Mono-Forward against autograd, logistic regression and itself: the formulas, the locality, the schedules, the kept inputs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fewer.fitting import BestState
from fewer.forward_only import MonoForwardConfig, MonoForwardMLP, fit_mono_forward
from fewer.forward_only.backprop_free_mlps.layers.layer_training import BLOCK, LayerTrainer, set_projection_gradient
from fewer.meters import counting, tensor_memory
from house import on_two_processes

SHORT = MonoForwardConfig(lr=3e-3, epochs_per_layer=3, batch_size=100, patience=2)


@pytest.fixture(scope="module")
def digits():
    """(x, y) to train on, to validate on and to test on."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = torch.as_tensor(x[order] / 16 - 0.3, dtype=torch.float32), torch.as_tensor(y[order])
    return (x[:1200], y[:1200]), (x[1200:1400], y[1200:1400]), (x[1400:], y[1400:])


def network(sizes=(32, 24, 16), classes=10, seed=0, **settings) -> MonoForwardMLP:
    torch.manual_seed(seed)
    return MonoForwardMLP(64, sizes, classes, **settings)


def fit(model, digits, config=SHORT, seed=0, **settings):
    train, held_out, _ = digits
    return fit_mono_forward(model, *train, validation=held_out, config=config, generator=torch.Generator().manual_seed(seed), **settings)


def same(one, other) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def autograd_gradients(model, x, y):
    """The gradients and losses of every layer's own loss, by autograd on one layer at a time."""
    gradients, losses, a = {}, [], x
    activation = {"relu": torch.relu, "tanh": torch.tanh}[model.activation]
    for i, projection in enumerate(model.projections):
        own = [(f"projections.{i}.weight", projection.weight)]
        if i > 0:
            layer = model.layers[i - 1]
            a = activation(a.detach() @ layer.weight.T + layer.bias)
            own += [(f"layers.{i - 1}.weight", layer.weight), (f"layers.{i - 1}.bias", layer.bias)]
        loss = F.cross_entropy(a @ projection.weight.T, y)
        found = torch.autograd.grad(loss, [parameter for _, parameter in own])
        gradients |= {name: gradient for (name, _), gradient in zip(own, found, strict=True)}
        losses.append(loss.detach())
    return gradients, torch.stack(losses)


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_closed_form_gradients_equal_autograd_of_each_layers_own_loss(batch, activation):
    model = network(activation=activation).double()
    for layer in model.layers:
        torch.nn.init.normal_(layer.bias)
    x, y = torch.randn(batch, 64, dtype=torch.float64), torch.randint(10, (batch,))
    losses = model.local_gradients(x, y)
    expected, expected_losses = autograd_gradients(model, x, y)
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=1e-12)
    assert expected.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    batch=st.integers(1, 9), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=3), classes=st.integers(2, 5), seed=st.integers(0, 99)
)
def test_closed_form_gradients_equal_autograd_whatever_the_shapes(batch, sizes, classes, seed):
    model = network(sizes, classes, seed).double()
    x, y = torch.randn(batch, 64, dtype=torch.float64), torch.randint(classes, (batch,))
    model.local_gradients(x, y)
    expected, _ = autograd_gradients(model, x, y)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [24, BLOCK // 64 + 8])  # one block of W's gradient, and two
def test_a_step_of_the_fast_path_is_adam_on_the_autograd_gradient(width):
    model = network((width,)).double()
    reference = copy.deepcopy(model)
    trainer = LayerTrainer(model.layers[0], model.projections[1], "relu", lr=1e-2)
    optimizer = torch.optim.Adam([*reference.layers[0].parameters(), *reference.projections[1].parameters()], lr=1e-2)
    for rows in (7, 5):
        x, y = torch.randn(rows, 64, dtype=torch.float64), torch.randint(10, (rows,))
        trainer.step(x, y)
        for name, gradient in autograd_gradients(reference, x, y)[0].items():
            if name != "projections.0.weight":
                reference.get_parameter(name).grad = gradient
        optimizer.step()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_without_hidden_layers_it_is_multinomial_logistic_regression():
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(x))[:600]
    x = np.abs(x[rows][:, rng.permutation(64)[:6]]) / 16 + 0.1 * rng.normal(size=(600, 6))  # few noisy pixels: no plane parts the classes
    y = y[rows] % 4
    theirs = LogisticRegression(fit_intercept=False, C=np.inf, tol=1e-10, max_iter=10_000).fit(x, y)
    projection = torch.nn.Linear(6, 4, bias=False, dtype=torch.float64)
    features, labels = torch.as_tensor(x), torch.as_tensor(y)
    optimizer = torch.optim.LBFGS(
        projection.parameters(), max_iter=2000, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    optimizer.step(lambda: set_projection_gradient(projection, features, labels))
    ours = F.cross_entropy(projection(features), labels).item()
    assert ours == pytest.approx(log_loss(y, theirs.predict_proba(x)), abs=1e-6)


@pytest.mark.parametrize("changed", ["layers.1.weight", "layers.1.bias", "projections.2.weight", "layers.2.weight", "projections.3.weight"])
def test_a_later_layer_changes_nothing_in_the_first_layers_gradient(changed):
    x, y = torch.randn(7, 64), torch.randint(10, (7,))
    gradients = []
    for perturbed in (False, True):
        model = network()
        if perturbed:
            model.get_parameter(changed).data.add_(1.0)
        model.local_gradients(x, y)
        gradients.append([model.layers[0].weight.grad, model.layers[0].bias.grad, model.projections[1].weight.grad])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("schedule", ["sequential", "simultaneous"])
def test_training_builds_no_graph_and_makes_no_backward_pass(digits, schedule):
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
        counting() as counts,
    ):
        fit(network(), digits, replace(SHORT, schedule=schedule, epochs_per_layer=1))
    assert saved == []
    assert counts["backward_passes"] == 0


@pytest.mark.parametrize("input_projection", [True, False])
def test_kept_inputs_give_what_recomputed_ones_give_bit_for_bit(digits, input_projection):
    kept, recomputed = network(), network()
    config = replace(SHORT, train_input_projection=input_projection, batch_size=70)  # which leaves a short batch at the end
    history = fit(kept, digits, config)
    fallen_back = fit(recomputed, digits, replace(config, cache_bytes=1000))
    assert same(kept.state_dict(), recomputed.state_dict())
    assert [line[:5] for line in history.epochs] == [line[:5] for line in fallen_back.epochs]
    assert history.cache_bytes == (1200 + 200) * 32 * 4
    assert history.notes == []
    assert fallen_back.cache_bytes == 0
    assert "above cache_bytes=1000" in fallen_back.notes[0]


@pytest.mark.parametrize("schedule", ["sequential", "simultaneous"])
def test_one_seed_gives_one_result_bit_for_bit(digits, schedule):
    models = [network(), network()]
    for model in models:
        fit(model, digits, replace(SHORT, schedule=schedule))
    assert same(models[0].state_dict(), models[1].state_dict())


@pytest.mark.parametrize("schedule", ["sequential", "simultaneous"])
@pytest.mark.parametrize("prediction", ["last", "sum"])
def test_it_learns_the_digits(digits, schedule, prediction):
    model = network((100, 100), prediction=prediction)
    fit(model, digits, replace(SHORT, schedule=schedule, epochs_per_layer=10))
    x, y = digits[2]
    assert (model(x).argmax(1) == y).float().mean() > 0.9


def test_the_sequential_schedule_leaves_trained_layers_alone(digits):
    model = network()
    seen = {}

    def look(line):
        seen.setdefault(line.stage, [p.detach().clone() for p in (*model.layers[0].parameters(), *model.projections[1].parameters())])

    fit(model, digits, callbacks=[look])
    assert list(seen) == ["input projection", "layer 1", "layer 2", "layer 3"]
    after = [*model.layers[0].parameters(), *model.projections[1].parameters()]
    assert all(torch.equal(one, other) for one, other in zip(seen["layer 2"], after, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(seen["layer 3"], after, strict=True))
    assert not torch.equal(seen["input projection"][0], after[0])


@pytest.mark.parametrize("schedule", ["sequential", "simultaneous"])
def test_the_input_projection_takes_no_part_in_the_network(digits, schedule):
    with_it, without = network(), network()
    config = replace(SHORT, schedule=schedule, patience=None)
    fit(with_it, digits, config)
    history = fit(without, digits, replace(config, train_input_projection=False))
    assert torch.equal(without.projections[0].weight, network().projections[0].weight)
    assert "input projection" not in {line.stage for line in history.epochs}
    for model in (with_it, without):
        x = digits[2][0]
        before = model(x)
        model.prediction = "sum"
        summed = model(x)
        torch.nn.init.normal_(model.projections[0].weight)
        assert torch.equal(model(x), summed)
        model.prediction = "last"
        assert torch.equal(model(x), before)


def test_scores_are_the_last_goodness_or_the_sum_over_hidden_layers(digits):
    x = digits[2][0]
    model = network()
    goodness = model.goodness(x)
    torch.testing.assert_close(model(x), goodness[3])
    model.prediction = "sum"
    torch.testing.assert_close(model(x), goodness[1] + goodness[2] + goodness[3])


@pytest.mark.parametrize("prediction", ["last", "sum"])
def test_the_networks_validation_figures_are_those_of_its_predictions(digits, prediction):
    model = network(prediction=prediction)
    history = fit(model, digits, replace(SHORT, schedule="simultaneous", epochs_per_layer=1))
    x, y = digits[1]
    last = history.epochs[-1]
    assert last.stage == "network"
    assert last.validation_loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    assert last.validation_accuracy == pytest.approx((model(x).argmax(1) == y).float().mean().item())


@pytest.mark.parametrize("schedule", ["sequential", "simultaneous"])
def test_the_best_validation_state_is_kept(digits, schedule):
    model = network()
    states = {}

    def look(line):
        states[line.stage, line.epoch] = copy.deepcopy(model.state_dict())

    config = replace(SHORT, schedule=schedule, lr=0.1, epochs_per_layer=30, patience=2)  # too high: validation soon gets worse
    history = fit(model, digits, config, callbacks=[look])
    stages = [line.stage for line in history.epochs]
    deciding = ["layer 1", "layer 2", "layer 3"] if schedule == "sequential" else ["network"]
    for stage in deciding:
        losses = [line.validation_loss for line in history.epochs if line.stage == stage]
        best = history.best[stage]
        assert losses[best - 1] <= min(losses) + config.min_delta
        assert stages.count(stage) == min(best + 2, 30)
    assert any(history.best[stage] < stages.count(stage) for stage in deciding), "no stage stopped early: the check says nothing"
    if schedule == "simultaneous":
        assert same(model.state_dict(), states["network", history.best["network"]])
    else:
        for i in (1, 2, 3):
            assert torch.equal(model.layers[i - 1].weight, states[f"layer {i}", history.best[f"layer {i}"]][f"layers.{i - 1}.weight"])
            assert torch.equal(model.projections[i].weight, states[f"layer {i}", history.best[f"layer {i}"]][f"projections.{i}.weight"])


def test_predictions_do_not_depend_on_the_company_in_the_batch(digits):
    model = network((100, 100))
    fit(model, digits)
    x = torch.cat([digits[2][0]] * 3)[:1000]
    whole = model(x)
    singly = torch.cat([model(row[None]) for row in x[:200]])
    order = torch.randperm(len(x))
    assert torch.equal(singly.argmax(1), whole[:200].argmax(1))
    assert torch.equal(model(x[order]).argmax(1), whole[order].argmax(1))
    torch.testing.assert_close(singly, whole[:200])
    torch.testing.assert_close(model(x[order]), whole[order])


def test_the_state_dict_round_trip_is_bit_equal(digits, tmp_path):
    model = network()
    fit(model, digits)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = network(seed=1)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert same(model.state_dict(), other.state_dict())
    assert torch.equal(model(digits[2][0]), other(digits[2][0]))


@pytest.mark.parametrize("schedule", ["sequential", "simultaneous"])
def test_a_dataloader_gives_what_tensors_give(digits, schedule):
    config = replace(SHORT, schedule=schedule, epochs_per_layer=1, train_input_projection=False)
    (x, y), held_out, _ = digits
    generator = torch.Generator().manual_seed(0)
    unshuffled = torch.randperm(len(x), generator=generator).argsort()  # what the shuffle of the first epoch puts in order again
    from_loader, from_tensors = network((32,)), network((32,))
    loader = DataLoader(TensorDataset(x.view(-1, 8, 8), y), batch_size=100)
    fit_mono_forward(from_loader, loader, None, validation=DataLoader(TensorDataset(*held_out), batch_size=100), config=config)
    fit_mono_forward(from_tensors, x[unshuffled], y[unshuffled], validation=held_out, config=config, generator=generator.manual_seed(0))
    assert same(from_loader.state_dict(), from_tensors.state_dict())


def test_behind_a_dataloader_inputs_are_recomputed_and_the_history_says_so(digits):
    train, held_out, _ = digits
    model = network()
    history = fit_mono_forward(model, DataLoader(TensorDataset(*train), batch_size=100), None, validation=held_out, config=SHORT)
    assert history.cache_bytes == 200 * 32 * 4  # of the validation rows alone
    assert "x is a DataLoader" in history.notes[0]


@pytest.mark.parametrize(("schedule", "stage"), [("sequential", "layer 2"), ("simultaneous", "network")])
def test_a_loss_that_is_not_finite_stops_the_layer_and_keeps_the_last_finite_state(digits, schedule, stage):
    model = network()
    finite = {}

    def spoil(line):
        if (line.stage, line.epoch) == (stage, 2):
            model.layers[1].bias.data[3] = float("nan")  # after the first epoch's state was taken in
        elif (line.stage, line.epoch) == (stage, 1):
            finite.update(copy.deepcopy(model.state_dict()))

    with pytest.raises(FloatingPointError, match=rf"{stage}.* epoch 2") as raised:
        fit(model, digits, replace(SHORT, schedule=schedule, epochs_per_layer=4), callbacks=[spoil])
    assert "\n" not in str(raised.value)
    assert same(model.state_dict(), finite)


@pytest.mark.parametrize("schedule", ["sequential", "simultaneous"])
def test_a_learning_rate_without_bounds_ends_in_a_floating_point_error(digits, schedule):
    model = network()
    with pytest.raises(FloatingPointError, match=r"(layer \d|input projection|network).* epoch \d+.*try a lower lr"):
        fit(model, digits, replace(SHORT, schedule=schedule, lr=1e37, patience=None))
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_sequential_training_holds_gradients_and_adam_state_of_one_layer(digits):
    (x, y), held_out, _ = digits
    model = network((256, 256, 256, 256))
    with tensor_memory(model) as peak:
        fit_mono_forward(model, x[:200], y[:200], validation=held_out, config=replace(SHORT, epochs_per_layer=1))
    layer = 4 * (256 * 256 + 256 + 256 * 10)
    assert peak.bytes["optimizer state"] <= 2 * layer + 100
    assert peak.bytes.get("gradients", 0) <= layer
    assert peak.bytes["kept inputs"] == 4 * (200 + 200) * 256


def half_of_each_batch(rank: int, folder: Path, model: MonoForwardMLP, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for rows in torch.arange(len(x)).split(64):
        half = rows[rank::2]
        model.local_gradients(x[half], y[half])
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        optimizer.step()
    torch.save(model.state_dict(), folder / f"end{rank}.pt")


def test_two_processes_with_half_of_each_batch_learn_what_one_learns(digits, tmp_path):
    x, y = digits[0][0][:320].double(), digits[0][1][:320]
    alone = network((32, 16)).double()
    on_two_processes(half_of_each_batch, tmp_path, copy.deepcopy(alone), x, y)
    optimizer = torch.optim.Adam(alone.parameters(), lr=1e-3)
    for rows in torch.arange(len(x)).split(64):
        alone.local_gradients(x[rows], y[rows])
        optimizer.step()
    first, second = (torch.load(tmp_path / f"end{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first, second)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-10)


def test_layers_handed_on_one_by_one_learn_what_the_whole_learns():
    """A pipeline: the next layer works on a layer's output at once, and no backward pass is waited for."""
    model = network()
    x, y = torch.randn(7, 64), torch.randint(10, (7,))
    model.local_gradients(x, y)
    together = [parameter.grad.clone() for parameter in model.parameters()]
    stages = network()
    a = x
    set_projection_gradient(stages.projections[0], a, y)
    for i in (1, 2, 3):
        _, a = stages.layer_gradients(i, a, y)
        assert not a.requires_grad
    assert all(torch.equal(one, other.grad) for one, other in zip(together, stages.parameters(), strict=True))


def test_early_stopping_without_a_best_state_keeps_the_first():
    layer = torch.nn.Linear(2, 2)
    before = copy.deepcopy(layer.state_dict())
    stopping = BestState([layer], 1)
    torch.nn.init.constant_(layer.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="not finite after epoch 1"), stopping:
        stopping.update(0.0, 1)
    assert same(before, layer.state_dict())
