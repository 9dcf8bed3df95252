"""FFA-LoRA's Flower apps: equal to the engine, half the bytes, the fingerprint compared before round 1, and what goes wrong on the way."""

from __future__ import annotations

import logging
import math
import warnings

import pytest
import torch
from adapted import CLASSES, WIDTH, lora, net, points
from direct_grid import DirectGrid
from flwr.app import Array, ArrayRecord, Context, RecordDict
from lora_app import CLIENTS, PRIVACY, SETTINGS, app_of, in_process, load_data, strategy_of
from torch import nn

from fewer.federated import (
    LoRARoundsConfig,
    PrivacyConfig,
    epsilon_spent,
    ffa_lora_client_app,
    record_bytes,
    trained_arrays,
)
from fewer.federated._shared.flower import ASK


def difference(result, history):
    mine, theirs = result.arrays.to_torch_state_dict(), history.state_dict()
    assert list(mine) == list(theirs)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in theirs)


@pytest.mark.parametrize("frozen", [True, False], ids=["ffa", "lora"])
@pytest.mark.parametrize("settings", [SETTINGS, LoRARoundsConfig(local_steps=4, batch_size=10)], ids=["private", "not private"])
def test_the_apps_equal_the_engine(settings, frozen):
    def model():
        return lora(frozen=frozen)

    grid = DirectGrid(app_of(settings, model), CLIENTS)
    result = strategy_of(settings).start(grid, trained_arrays(model()), num_rounds=3)
    history = in_process(3, settings, model)
    assert difference(result, history) <= 1e-6
    assert history.server.x.norm() > 0.1
    for round, metrics in result.train_metrics_clientapp.items():
        told = {"epsilon": epsilon_spent(0.8, 1e-3, 0.25, 4 * round)} if settings.privacy else {}
        assert {name: metrics[name] for name in metrics if name == "epsilon"} == told
        assert float(metrics["drift"]) > 0  # pyright: ignore[reportArgumentType] - a number


def replies_of(model, settings=SETTINGS):
    """What one round sends down and up, as it is serialised."""
    grid = DirectGrid(app_of(settings, lambda: model), CLIENTS)
    strategy_of(settings).start(grid, trained_arrays(model), num_rounds=1)
    trained = [(sent, reply) for sent, reply in grid.messages if sent.metadata.message_type == "train"]
    return [record_bytes(sent.content) for sent, _ in trained], [record_bytes(reply.content) for _, reply in trained]


def test_a_reply_is_half_of_loras_where_layers_are_square():
    def square():
        return nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, CLASSES))

    down, up = zip(*[replies_of(lora(square(), rank=64, frozen=frozen, targets=["2"])) for frozen in (True, False)], strict=True)
    assert up[0][0] / up[1][0] == pytest.approx(0.5, abs=0.01)
    assert down[0][0] / down[1][0] == pytest.approx(0.5, abs=0.02)
    assert up[0][0] >= 4 * 64 * 128


def test_other_layers_save_what_their_sides_say():
    """196 -> 256: d_out / (d_in + d_out) = 0.566."""

    def wide():
        return nn.Sequential(nn.Linear(WIDTH, 196), nn.ReLU(), nn.Linear(196, 256), nn.ReLU(), nn.Linear(256, CLASSES))

    up = [replies_of(lora(wide(), rank=32, frozen=frozen, targets=["2"]))[1][0] for frozen in (True, False)]
    assert up[0] / up[1] == pytest.approx(0.566, abs=0.01)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda: lora(seed=1), r"says adapter fingerprint '\w{64}', others '\w{64}' and says layer base_model.model.0.default 'rank 4"),
        (lambda: lora(rank=3), r"says adapter fingerprint '\w{64}', others '\w{64}' and says layer base_model.model.0.default 'rank [34]"),
        (lambda: lora(nn.Sequential(*net(), nn.Linear(CLASSES, CLASSES))), r"says adapter fingerprint '\w{64}', others '\w{64}'; expected"),
    ],
    ids=["another seed", "another rank", "another base"],
)
def test_a_client_with_other_adapters_is_refused_before_round_1(other, told):
    usual, odd = app_of(), app_of(model_fn=other)

    def app(message, context):
        return (odd if context.node_config["partition-id"] == 1 else usual)(message, context)

    grid = DirectGrid(app, CLIENTS)
    with pytest.raises(ValueError, match=told):
        strategy_of().start(grid, trained_arrays(lora()), num_rounds=1)
    assert {sent.metadata.message_type for sent, _ in grid.messages} == {ASK}


def test_a_client_of_nan_is_left_out():
    def spoil(message, reply):
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 999:
            reply.content["model"] = ArrayRecord({"vector": Array(reply.content["model"]["vector"].numpy() * math.nan)})
        return reply

    grid = DirectGrid(app_of(), CLIENTS, spoil)
    with pytest.warns(UserWarning, match="client 1 sent 'model' with NaN"):
        result = strategy_of().start(grid, trained_arrays(lora()), num_rounds=1)
    sent = [reply.content["model"]["vector"].numpy() for message, reply in grid.messages if message.metadata.message_type == "train"]
    expected = torch.from_numpy(sum(each for each in sent if not math.isnan(each[0]))) / 2
    got = torch.cat([each.flatten() for each in result.arrays.to_torch_state_dict().values()])
    assert torch.allclose(got, expected, atol=1e-7)


def test_a_client_that_lost_its_state_goes_on_with_its_budget():
    """As by a SuperNode that was killed and started again: what the client kept is gone, the server's count is not."""

    class Forgetful(DirectGrid):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            if any(each.metadata.message_type == "train" for each in messages):
                context = self.contexts[999]
                self.contexts[999] = Context(context.run_id, 999, dict(context.node_config), RecordDict(), {})
            return super().send_and_receive(messages, timeout=timeout)

    grid = Forgetful(app_of(), CLIENTS)
    strategy_of().start(grid, trained_arrays(lora()), num_rounds=3)
    told = [
        reply.content.metric_records["metrics"]["epsilon"]
        for message, reply in grid.messages
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 999
    ]
    assert told == [epsilon_spent(0.8, 1e-3, 0.25, 4 * taken) for taken in (1, 2, 3)]


def test_a_spent_budget_ends_a_clients_part_and_is_told(caplog):
    settings = LoRARoundsConfig(local_steps=4, batch_size=10, privacy=PRIVACY, rounds=2)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        logging.getLogger("flwr").propagate = True
        result = strategy_of(settings).start(DirectGrid(app_of(settings), CLIENTS), trained_arrays(lora()), num_rounds=3)
    assert "is asked for round 3 of its own and its noise was computed for rounds=2" in caplog.text
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert difference(result, in_process(2, settings)) <= 1e-6


def test_a_resume_goes_on_with_the_budget(tmp_path):
    """The server starts anew from its checkpoint, and so do the clients."""
    file = tmp_path / "server.pt"
    strategy_of(checkpoint=file).start(DirectGrid(app_of(), CLIENTS), trained_arrays(lora()), num_rounds=2)
    result = strategy_of(checkpoint=file).start(DirectGrid(app_of(), CLIENTS), trained_arrays(lora()), num_rounds=1)
    assert result.train_metrics_clientapp[1]["epsilon"] == epsilon_spent(0.8, 1e-3, 0.25, 12)


def test_the_epsilon_that_is_told_is_the_largest_of_all_clients_so_far(tmp_path):
    """Client 0 takes part in the first two rounds, the others in the last two, the second of them after a resume."""
    turns, file = {1: [0], 2: [0], 3: [1, 2], 4: [1, 2]}, tmp_path / "server.pt"
    told = []
    for _ in range(2):
        strategy = strategy_of(checkpoint=file, sampler=lambda clients, round, seed: turns[round])
        result = strategy.start(DirectGrid(app_of(), CLIENTS), trained_arrays(lora()), num_rounds=2)
        told += [metrics["epsilon"] for metrics in result.train_metrics_clientapp.values()]
    after = [epsilon_spent(0.8, 1e-3, 0.25, 4 * taken) for taken in (1, 2)]
    assert told == [after[0], after[1], after[1], after[1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_travels_keeps_its_precision(dtype):
    model = lora(net(dtype), frozen=False)
    sent = trained_arrays(model).to_torch_state_dict()
    assert {each.dtype for each in sent.values()} == {torch.promote_types(dtype, torch.float32)}
    assert all(torch.equal(each, model.get_parameter(name).to(each.dtype)) for name, each in sent.items())


def test_noise_from_the_servers_seed_is_told():
    with pytest.warns(UserWarning, match="the server can take the noise away; expected secure=True"):
        ffa_lora_client_app(lora, load_data, config=SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ffa_lora_client_app(lora, load_data, config=LoRARoundsConfig(privacy=PrivacyConfig(epsilon=1.0, secure=True), rounds=2))


def test_with_privacy_nothing_is_told_of_the_clients_own_examples():
    grid = DirectGrid(app_of(), CLIENTS)
    result = strategy_of(fraction_evaluate=1.0).start(grid, trained_arrays(lora()), num_rounds=1)
    told = [reply.content.metric_records["metrics"] for sent, reply in grid.messages if sent.metadata.message_type == "evaluate"]
    assert [dict(metrics) for metrics in told] == [{"num-examples": 0}] * CLIENTS
    assert not result.evaluate_metrics_clientapp
    open_ = LoRARoundsConfig(local_steps=4, batch_size=10)
    result = strategy_of(open_, fraction_evaluate=1.0).start(DirectGrid(app_of(open_), CLIENTS), trained_arrays(lora()), num_rounds=1)
    assert float(result.evaluate_metrics_clientapp[1]["accuracy"]) > 0  # pyright: ignore[reportArgumentType] - a number


def test_evaluation_is_of_the_averaged_adapters():
    def load_test(context):
        return points(30, seed=9)

    strategy = strategy_of(fraction_evaluate=1.0)
    result = strategy.start(DirectGrid(app_of(load_test=load_test), CLIENTS), trained_arrays(lora()), num_rounds=2)
    x, y = points(30, seed=9)
    history = in_process(2)
    expected = float((history.flat.predict(history.server.x, x).argmax(1) == y).float().mean())
    assert result.evaluate_metrics_clientapp[2]["accuracy"] == pytest.approx(expected, abs=1e-6)
