"""What a user may do wrong, the written quickstart, memory-mapped client states, and the model as a flat vector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from federations import examples, loss, net
from torch import nn
from torch.nn import functional as F

from fewer.federated import (
    FedAvg,
    FedSpeed,
    FedSpeedAlgorithm,
    FedSpeedConfig,
    FedSpeedOptimizer,
    FlatModel,
    Independent,
    LocalConfig,
    Shards,
    simulate,
)
from fewer.federated._shared.client_states import ClientStates


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prox": -0.1}, "prox is -0.1; expected 0"),
        ({"rho": -1}, "rho is -1; expected 0"),
        ({"lr": 2.0, "prox": 0.5}, r"lr \* prox is 1; expected less than 1"),
        ({"server_rule": "mean"}, "server_rule is 'mean'; expected 'paper' or 'released'"),
        ({"alpha": 1.5}, "alpha is 1.5; expected 0 to 1"),
        ({"lr": 0}, "lr is 0; expected a positive"),
        ({"local_epochs": 0}, "local_epochs is 0; expected at least 1"),
        ({"local_steps": 0}, "local_steps is 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"weight_decay": -1}, "weight_decay is -1; expected 0"),
    ],
)
def test_settings_out_of_range_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        FedSpeedConfig(**fields)


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_strategy_refuses_a_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match="more than 0 and at most 1"):
        FedSpeed(fraction_train=fraction)


def with_statistics():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def federation(bad: int | None = None):
    x, y = examples(60)
    if bad is not None:
        x[bad * 20] = float("nan")
    return Shards(x, y, torch.arange(60).split(20))


ROOT = Path(__file__).parents[2]
LOCAL = {"local_epochs": 1, "batch_size": 10}
AVERAGE = FedAvg(LocalConfig(**LOCAL))


def test_statistics_are_refused_by_the_name_of_their_layer_unless_averaging_is_said_aloud():
    with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm1d\) keeps statistics.*GroupNorm.*buffers='average'"):
        simulate(AVERAGE, with_statistics, federation(), 1, sampler=Independent(1.0))
    with pytest.raises(ValueError, match="buffers is 'mean'; expected None or 'average'"):
        FlatModel(with_statistics(), buffers="mean")
    with pytest.raises(ValueError, match="clients trained at once"):
        simulate(AVERAGE, with_statistics, federation(), 1, sampler=Independent(1.0), executor="vmap", buffers="average")
    history = simulate(AVERAGE, with_statistics, federation(), 1, sampler=Independent(1.0), buffers="average")
    assert history.server.vectors["buffers"].shape == (16,)


@pytest.mark.parametrize("executor", [None, "vmap"])
def test_a_reply_with_nan_is_left_out_and_the_round_goes_on(executor):
    with pytest.warns(UserWarning, match="client 1 sent 'model' with NaN or infinite numbers; its reply is left out"):
        history = simulate(AVERAGE, net, federation(bad=1), 1, sampler=Independent(1.0), executor=executor)
    others = simulate(AVERAGE, net, federation(), 1, sampler=lambda clients, round, seed: [0, 2])
    assert torch.allclose(history.server.x, others.server.x, atol=1e-6)


def test_a_round_without_a_good_reply_ends_with_an_error():
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="round 1: no good reply of 1"):
        simulate(AVERAGE, net, federation(bad=1), 1, sampler=lambda clients, round, seed: [1])


def test_a_sampler_that_chooses_nobody_is_told():
    with pytest.raises(ValueError, match="chose no client in round 1"):
        simulate(AVERAGE, net, federation(), 1, sampler=lambda clients, round, seed: [])


def test_a_checkpoint_of_another_federation_is_refused_and_stays(tmp_path):
    file = tmp_path / "state.pt"
    simulate(AVERAGE, net, federation(), 1, sampler=Independent(1.0), checkpoint=file)
    before = file.read_bytes()
    x, y = examples(60)
    with pytest.raises(ValueError, match="written with 3 clients and is resumed with 6"):
        simulate(AVERAGE, net, Shards(x, y, torch.arange(60).split(10)), 2, sampler=Independent(1.0), checkpoint=file)
    with pytest.raises(ValueError, match="written with seed 0; resumed with 1"):
        simulate(AVERAGE, net, federation(), 2, sampler=Independent(1.0), seed=1, checkpoint=file)
    with pytest.raises(ValueError, match="written with algorithm"):
        simulate(FedSpeedAlgorithm(), net, federation(), 2, sampler=Independent(1.0), checkpoint=file)
    assert file.read_bytes() == before
    file.write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match="state.pt.*checkpoint"):
        simulate(AVERAGE, net, federation(), 2, sampler=Independent(1.0), checkpoint=file)
    assert list(tmp_path.iterdir()) == [file]


def test_a_mean_loss_cannot_train_clients_of_unlike_sizes_at_once():
    x, y = examples(60)
    shards = Shards(x, y, [range(25), range(25, 60)])
    with pytest.raises(ValueError, match=r"one number a batch; expected one an example"):
        simulate(AVERAGE, net, shards, 1, sampler=Independent(1.0), executor="vmap", loss_fn=F.cross_entropy)
    one, all_ = (simulate(AVERAGE, net, federation(), 2, sampler=Independent(1.0), executor=each, loss_fn=each_loss).server.x
                 for each, each_loss in ((None, loss), ("vmap", F.cross_entropy)))  # fmt: skip
    assert torch.allclose(one, all_, atol=1e-5)


def test_parameters_of_unlike_dtypes_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="torch.float32.*torch.float64|torch.float64.*torch.float32"):
        FlatModel(model)


def test_frozen_parameters_stay_and_do_not_travel():
    model = net()
    model[0].requires_grad_(False)
    history = simulate(AVERAGE, lambda: model, federation(), 2, sampler=Independent(1.0))
    assert set(history.state_dict()) == {"1.weight", "1.bias", "3.weight", "3.bias"}
    assert history.rounds[0].numbers_up == 3 * history.flat.size


@pytest.mark.parametrize("executor", [None, "vmap"])
def test_dropout_draws_the_same_in_every_run(executor):
    def model():
        return nn.Sequential(*net(), nn.Dropout(0.5))

    one, other = (simulate(AVERAGE, model, federation(), 2, sampler=Independent(1.0), executor=executor).server.x for _ in range(2))
    assert torch.equal(one, other)


def test_large_client_states_lie_in_a_mapped_file():
    small, large = (ClientStates(50, ["g", "last"], 1000, torch.float32, large=limit) for limit in (2**30, 2**16))
    assert (small.mapped, large.mapped) == (False, True)
    for states in (small, large):
        states.put([3, 7], {"g": torch.ones(2, 1000), "last": torch.full((2, 1000), 2.0)})
        states.put(9, {"g": torch.full((1000,), 5.0), "last": torch.zeros(1000)})
        assert states.get(7)["last"].sum() == 2000
        assert torch.equal(states.get([0, 9])["g"].sum(1), torch.tensor([0.0, 5000.0]))
    assert FedSpeedAlgorithm().keeps == ("correction",)


def test_the_optimizer_refuses_what_does_not_fit_its_parameters():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="correction has the shapes .*expected those of the parameters"):
        FedSpeedOptimizer(model.parameters(), correction=[torch.zeros(3)])
    with pytest.raises(ValueError, match="2 groups of parameters"):
        FedSpeedOptimizer([{"params": [model.weight]}, {"params": [model.bias]}])


def test_the_optimizers_state_round_trips():
    def closure(model, optimizer):
        def compute():
            optimizer.zero_grad()
            value = model(torch.ones(3, 2)).square().mean()
            value.backward()
            return value

        return compute

    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = FedSpeedOptimizer(model.parameters())
    optimizer.step(closure(model, optimizer))
    optimizer.end_round()
    twin = nn.Linear(2, 1)
    twin.load_state_dict(model.state_dict())
    other = FedSpeedOptimizer(twin.parameters())
    other.load_state_dict(optimizer.state_dict())
    optimizer.step(closure(model, optimizer))
    other.step(closure(twin, other))
    assert torch.equal(model.weight, twin.weight)


def test_quickstart_writes_an_app_whole_and_never_over_something(fewer, tmp_path):
    target, here = tmp_path / "app", {"PYTHONPATH": str(ROOT / "src")}
    done = fewer("federated", "quickstart", "fedspeed", str(target), **here)
    assert f"flwr run {target}" in done.stdout
    assert {file.name for file in target.rglob("*") if file.is_file()} == {
        "pyproject.toml", "__init__.py", "client_app.py", "server_app.py", "task.py",
    }  # fmt: skip
    (target / "mine.txt").write_text("mine")
    refused = fewer("federated", "quickstart", "fedspeed", str(target), status=2, **here)
    assert "exists; expected a new folder" in refused.stderr
    assert (target / "mine.txt").read_text() == "mine"
    unknown = fewer("federated", "quickstart", "fedspede", str(tmp_path / "other"), status=2, **here)
    assert "'fedspede' has no quickstart; expected one of fedspeed" in unknown.stderr
    assert not (tmp_path / "other").exists()
