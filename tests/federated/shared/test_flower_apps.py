"""The same algorithms as Flower apps: equal to the in-process engine, their bytes, and what goes wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from direct_grid import DirectGrid
from federations import loss, net
from flower_app import ALGORITHMS, CLIENTS, FRACTION, LOCAL, SEED, in_process, initial, largest_difference, load_data, shards, strategy_of
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto
from torch import nn

from fewer.federated import (
    FedAvg,
    FedProx,
    FedSpeed,
    FedSpeedAlgorithm,
    FedSpeedConfig,
    FlatModel,
    FlowerStrategy,
    Independent,
    LocalConfig,
    fedspeed_client_app,
    flower_client_app,
    ideal_bytes,
    record_bytes,
    simulate,
)
from fewer.federated._shared.clients import batch_rows, client_rng


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
def test_flower_apps_equal_the_engine(algorithm):
    grid = DirectGrid(flower_client_app(algorithm, net, load_data, loss), CLIENTS)
    strategy = strategy_of(algorithm)
    result = strategy.start(grid, initial(), num_rounds=4)
    history = in_process(algorithm, rounds=4)
    assert any(len(each.clients) < CLIENTS for each in history.rounds)
    assert largest_difference(result.arrays, history) <= 1e-6
    assert [result.train_metrics_clientapp[each.round]["gradients"] > 0 for each in history.rounds] == [True] * 4


def test_counted_bytes_are_those_of_the_serialised_records():
    algorithm = ALGORITHMS["fedspeed"]
    grid = DirectGrid(flower_client_app(algorithm, net, load_data, loss), CLIENTS)
    strategy = strategy_of(algorithm)
    strategy.start(grid, initial(), num_rounds=2)
    trained = [each for each in grid.messages if each[0].metadata.message_type == "train"]
    down, up = (sum(len(recorddict_to_proto(each[way].content).SerializeToString()) for each in trained) for way in (0, 1))
    assert strategy.traffic.total() == (down, up)
    assert len(strategy.traffic.transfers) == len(trained)
    first = strategy.traffic.total([1])
    assert 0 < first[0] < down
    assert record_bytes(trained[0][0].content) == strategy.traffic.transfers[0].down


def wide():
    return nn.Linear(6, 3000)


@pytest.mark.parametrize(
    ("algorithm", "models"),
    [
        (ALGORITHMS["fedspeed"], 1),
        (ALGORITHMS["fedspeed, paper's rule"], 1),
        (FedAvg(LocalConfig(**LOCAL)), 1),
        (ALGORITHMS["scaffold"], 2),
    ],
    ids=["fedspeed", "paper", "fedavg", "scaffold"],
)
def test_fedspeed_sends_one_model_each_way_and_scaffold_two(algorithm, models):
    grid = DirectGrid(flower_client_app(algorithm, wide, load_data, loss), CLIENTS)
    strategy = strategy_of(algorithm)
    strategy.start(grid, initial(wide), num_rounds=1)
    parameters = FlatModel(wide()).size
    for each in strategy.traffic.transfers:
        assert each.ideal_down == each.ideal_up == ideal_bytes(parameters, models)
        for sent in (each.down, each.up):
            assert ideal_bytes(parameters, models) <= sent <= 1.02 * ideal_bytes(parameters, models) + 1500


def test_a_strategy_goes_on_from_its_checkpoint(tmp_path):
    """The clients keep their state; the server's comes from the file, with the mean of the corrections."""
    algorithm = ALGORITHMS["fedspeed, relaxed"]
    grid = DirectGrid(flower_client_app(algorithm, net, load_data, loss), CLIENTS)
    file = tmp_path / "server.pt"
    first = strategy_of(algorithm, checkpoint=file).start(grid, initial(), num_rounds=3)
    second = strategy_of(algorithm, checkpoint=file).start(grid, first.arrays, num_rounds=3)
    assert largest_difference(second.arrays, in_process(algorithm, rounds=6)) <= 1e-6


def test_a_strategy_refuses_a_checkpoint_of_another_number_of_clients(tmp_path):
    algorithm, file = ALGORITHMS["fedspeed, relaxed"], tmp_path / "server.pt"
    app = flower_client_app(algorithm, net, load_data, loss)
    strategy_of(algorithm, checkpoint=file).start(DirectGrid(app, CLIENTS), initial(), num_rounds=1)
    with pytest.raises(ValueError, match="written with 4 clients and is resumed with 5"):
        strategy_of(algorithm, checkpoint=file, clients=5).start(DirectGrid(app, CLIENTS), initial(), num_rounds=1)
    other = flower_client_app(algorithm, wide, load_data, loss)
    with pytest.raises(ValueError, match="has a model of 99 parameters and is resumed with one of 21000; expected the same model"):
        strategy_of(algorithm, checkpoint=file).start(DirectGrid(other, CLIENTS), ArrayRecord(wide().state_dict()), num_rounds=1)


def test_another_federation_does_not_find_a_clients_old_correction():
    algorithm = ALGORITHMS["fedspeed"]
    grid = DirectGrid(flower_client_app(algorithm, net, load_data, loss), CLIENTS)
    for _ in range(2):
        result = strategy_of(algorithm).start(grid, initial(), num_rounds=3)
        assert largest_difference(result.arrays, in_process(algorithm)) <= 1e-6


def spoiling(client, change):
    def spoil(message, reply):
        if message.metadata.message_type != "train" or message.metadata.dst_node_id != 1000 - client:
            return reply
        content = reply.content
        vector = change(content["model"]["vector"].numpy())
        spoiled = Message(RecordDict(dict(content) | {"model": ArrayRecord({"vector": Array(vector)})}), reply_to=message)
        spoiled.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
        return spoiled

    return spoil


@pytest.mark.parametrize(
    ("change", "words"), [(lambda v: v * np.nan, "NaN"), (lambda v: v[:-1], r"shape \(\d+,\); expected \(\d+,\)")], ids=["nan", "shape"]
)
def test_a_bad_reply_is_left_out_and_the_client_named(change, words):
    algorithm = FedAvg(LocalConfig(**LOCAL))
    grid = DirectGrid(flower_client_app(algorithm, net, load_data, loss), CLIENTS, spoiling(1, change))
    strategy = FlowerStrategy(algorithm, 1.0, 0.0, CLIENTS, seed=SEED)
    with pytest.warns(UserWarning, match=f"client 1 sent 'model' (of|with).*{words}.*left out"):
        result = strategy.start(grid, initial(), num_rounds=1)
    others = simulate(algorithm, net, shards(), 1, sampler=lambda clients, round, seed: [0, 2, 3], seed=SEED)
    assert largest_difference(result.arrays, others) <= 1e-6


def test_without_a_good_reply_the_model_stays_and_the_next_round_works():
    algorithm, rounds = ALGORITHMS["fedspeed"], []

    def spoil(message, reply):
        if message.metadata.message_type == "train":
            rounds.append(message.content["config"]["round"])
            if rounds[-1] == 1:
                return spoiling(1000 - message.metadata.dst_node_id, lambda v: v + math.inf)(message, reply)
        return reply

    grid = DirectGrid(flower_client_app(algorithm, net, load_data, loss), CLIENTS, spoil)
    strategy = strategy_of(algorithm)
    with pytest.warns(UserWarning, match="left out"):
        result = strategy.start(grid, initial(), num_rounds=2)
    assert set(rounds) == {1, 2}
    assert list(result.train_metrics_clientapp) == [2]
    assert strategy.server.round == 2


def test_without_a_good_reply_a_resumed_run_goes_on_from_its_checkpoint(tmp_path):
    """The first round after the resume is lost; Flower's own arrays are then those that the run was started with."""
    algorithm, file = FedAvg(LocalConfig(**LOCAL)), tmp_path / "server.pt"

    def started(rounds, spoil=None):
        strategy = FlowerStrategy(algorithm, 1.0, 0.0, CLIENTS, seed=SEED, checkpoint=file)
        return strategy.start(DirectGrid(flower_client_app(algorithm, net, load_data, loss), CLIENTS, spoil), initial(), num_rounds=rounds)

    before = started(2).arrays.to_torch_state_dict()

    def lost(message, reply):
        return spoiling(1000 - message.metadata.dst_node_id, lambda v: v * np.nan)(message, reply)

    with pytest.warns(UserWarning, match="left out"):
        after = started(1, lost).arrays.to_torch_state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(not torch.equal(after[name], start) for name, start in initial().to_torch_state_dict().items())


def test_a_client_with_other_settings_is_told_and_left_out(caplog):
    config = FedSpeedConfig(**LOCAL)
    app = fedspeed_client_app(net, load_data, loss, FedSpeedConfig(**LOCAL | {"lr": 0.2}))
    strategy = FedSpeed(config, fraction_train=1.0, min_available_nodes=CLIENTS, fraction_evaluate=0.0)
    replies = DirectGrid(app, CLIENTS)
    strategy.start(replies, initial(), num_rounds=1)
    reasons = [reply.error.reason for message, reply in replies.messages if message.metadata.message_type == "train"]
    assert len(reasons) == CLIENTS
    assert all("lr=0.1" in reason and "lr=0.2" in reason and "same settings on both sides" in reason for reason in reasons)


def test_nodes_that_do_not_say_who_they_are_end_the_run_with_their_reason():
    app = ClientApp()

    @app.query("who")
    def broken(message, context):
        raise OSError("no disk")

    with pytest.raises(RuntimeError, match="0 of 4 nodes say who they are; expected at least 4 .*node 1000: no disk"):
        strategy_of(ALGORITHMS["fedspeed"]).start(DirectGrid(app, CLIENTS), initial(), num_rounds=1)


def test_clients_evaluate_the_global_model_weighed_by_examples():
    algorithm = ALGORITHMS["fedspeed"]
    grid = DirectGrid(flower_client_app(algorithm, net, load_data, loss), CLIENTS)
    strategy = FlowerStrategy(algorithm, FRACTION, 1.0, CLIENTS, seed=SEED)
    result = strategy.start(grid, initial(), num_rounds=3)
    history, held = in_process(algorithm), shards()
    right = history.flat.predict(history.server.x, held.x).argmax(1) == held.y
    assert result.evaluate_metrics_clientapp[3]["accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)


def with_statistics():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def test_statistics_are_averaged_in_both_engines_where_that_is_said_aloud():
    algorithm = FedSpeedAlgorithm(FedSpeedConfig(**LOCAL | {"batch_size": 100}))  # BatchNorm refuses a last batch of one example
    app = flower_client_app(algorithm, with_statistics, load_data, loss, buffers="average")
    result = strategy_of(algorithm).start(DirectGrid(app, CLIENTS), initial(with_statistics), num_rounds=3)
    history = in_process(algorithm, model_fn=with_statistics, buffers="average")
    mine = result.arrays.to_torch_state_dict()
    with_statistics().load_state_dict(mine)
    averaged = torch.cat([mine["1.running_mean"], mine["1.running_var"]])
    assert torch.allclose(averaged, history.server.vectors["buffers"], atol=1e-6)
    assert averaged[:8].abs().max() > 1e-3
    assert max(float((mine[name] - tensor).abs().max()) for name, tensor in history.state_dict().items()) <= 1e-6


def plain_client_app(prox: float) -> ClientApp:
    """A client as Flower's tutorials write it: torch.optim.SGD on the batches of the engine."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        client, model = context.node_config["partition-id"], net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        anchor = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-3)
        x, y = load_data(context)
        rng = client_rng(SEED, message.content["config"]["server-round"], client)
        rng.integers(2**62)
        for rows in batch_rows(len(x), 8, 2, None, rng):
            optimizer.zero_grad()
            value = loss(model(x[rows]), y[rows]).mean()
            value = value + prox / 2 * sum((p - a).square().sum() for p, a in zip(model.parameters(), anchor, strict=True))
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
        metrics = MetricRecord({"num-examples": len(x)})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app


@pytest.mark.parametrize("prox", [0.0, 0.4])
def test_the_baselines_equal_flowers_own_strategies(prox):
    from flwr.serverapp.strategy import FedAvg as FlowersFedAvg
    from flwr.serverapp.strategy import FedProx as FlowersFedProx

    peer = FlowersFedProx(proximal_mu=prox, fraction_evaluate=0.0) if prox else FlowersFedAvg(fraction_evaluate=0.0)
    result = peer.start(DirectGrid(plain_client_app(prox), CLIENTS), initial(), num_rounds=3)
    local = LocalConfig(weighted=True, lr_decay=1.0, **LOCAL)
    ours = FedProx(local, mu=prox) if prox else FedAvg(local)
    history = simulate(ours, net, shards(), 3, sampler=Independent(1.0), seed=SEED)
    assert largest_difference(result.arrays, history) <= 1e-5


class SlowGrid(DirectGrid):
    """Nodes that do not answer who they are the first `silent[node]` times that they are asked; how long each question might take."""

    def __init__(self, app, nodes, silent):
        super().__init__(app, nodes)
        self.silent, self.waited = dict(silent), {"query.who": [], "train": []}

    def send_and_receive(self, messages, *, timeout=None):
        messages, heard = list(messages), []
        if not messages:  # nobody evaluates
            return []
        self.waited.setdefault(messages[0].metadata.message_type, []).append(timeout)
        for message in messages:
            node = message.metadata.dst_node_id
            if message.metadata.message_type == "query.who" and self.silent.get(node, 0):
                self.silent[node] -= 1
            else:
                heard.append(message)
        return super().send_and_receive(heard, timeout=timeout)


def slow(silent, rounds=1, needed=CLIENTS, **keywords):
    algorithm = FedAvg(LocalConfig(**LOCAL))
    grid = SlowGrid(flower_client_app(algorithm, net, load_data, loss), CLIENTS, silent)
    strategy = FlowerStrategy(algorithm, 1.0, 0.0, needed, seed=SEED, **keywords)
    result = strategy.start(grid, initial(), num_rounds=rounds, timeout=2.0)
    return grid, strategy, result


def test_new_nodes_have_a_patience_of_their_own_to_say_who_they_are():
    """Only training obeys the run's timeout: a node that starts up imports torch first."""
    grid, _, _ = slow({})
    assert grid.waited == {"query.who": [120.0], "train": [2.0]}
    grid, _, _ = slow({}, patience=7.0)
    assert grid.waited["query.who"] == [7.0]


def test_a_slow_start_does_not_end_the_run():
    grid, strategy, result = slow({1000: 1, 999: 2})
    assert grid.waited["query.who"] == [120.0] * 3
    others = simulate(strategy.algorithm, net, shards(), 1, sampler=Independent(1.0), seed=SEED)
    assert largest_difference(result.arrays, others) <= 1e-6


def test_a_node_that_was_silent_is_asked_again_in_the_next_round():
    grid, strategy, _ = slow({1000: 1}, rounds=2, needed=3)
    assert [sorted(each.client for each in strategy.traffic.transfers if each.round == round) for round in (1, 2)] == [
        [1, 2, 3],
        [0, 1, 2, 3],
    ]
    assert grid.waited["query.who"] == [120.0, 2.0]  # it had its time; it does not hold up every round


def test_nodes_that_never_answer_end_the_run_by_name():
    with pytest.raises(RuntimeError, match="3 of 4 nodes say who they are; expected at least 4 .*node 998: no answer in"):
        slow({998: 9})


@pytest.mark.parametrize("empty", [{1}, {0, 1, 2, 3}])
def test_clients_without_test_examples_are_left_out_of_the_evaluation(empty):
    def load_test(context):
        x, y = load_data(context)
        return (x[:0], y[:0]) if context.node_config["partition-id"] in empty else (x, y)

    algorithm = FedAvg(LocalConfig(**LOCAL))
    grid = DirectGrid(flower_client_app(algorithm, net, load_data, loss, load_test=load_test), CLIENTS)
    result = FlowerStrategy(algorithm, 1.0, 1.0, CLIENTS, seed=SEED).start(grid, initial(), num_rounds=1)
    if len(empty) == CLIENTS:
        assert not result.evaluate_metrics_clientapp
        return
    held = shards()
    history = simulate(algorithm, net, held, 1, sampler=Independent(1.0), seed=SEED)
    rows = torch.cat([part for client, part in enumerate(held.parts) if client not in empty])
    right = history.flat.predict(history.server.x, held.x[rows]).argmax(1) == held.y[rows]
    assert result.evaluate_metrics_clientapp[1]["accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    assert math.isfinite(result.evaluate_metrics_clientapp[1]["loss"])


def test_a_client_that_the_sampler_names_twice_is_asked_once():
    algorithm = FedAvg(LocalConfig(**LOCAL))
    grid = DirectGrid(flower_client_app(algorithm, net, load_data, loss), CLIENTS)
    strategy = FlowerStrategy(algorithm, fraction_evaluate=0.0, min_available_nodes=CLIENTS, sampler=lambda *_: [1, 1, 3])
    result = strategy.start(grid, initial(), num_rounds=1)
    assert [each.client for each in strategy.traffic.transfers] == [1, 3]
    assert largest_difference(result.arrays, simulate(algorithm, net, shards(), 1, sampler=lambda *_: [1, 3])) <= 1e-6


def test_the_metrics_of_a_reply_that_is_left_out_do_not_count():
    algorithm = FedAvg(LocalConfig(**LOCAL))

    def load(context):
        x, y = load_data(context)
        return (x * float("nan") if context.node_config["partition-id"] == 1 else x), y

    grid = DirectGrid(flower_client_app(algorithm, net, load, loss), CLIENTS)
    with pytest.warns(UserWarning, match="client 1 sent"):
        result = FlowerStrategy(algorithm, 1.0, 0.0, CLIENTS, seed=SEED).start(grid, initial(), num_rounds=1)
    assert math.isfinite(result.train_metrics_clientapp[1]["drift"])
