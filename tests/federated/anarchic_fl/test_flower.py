"""The strategy's loop on Flower's messages: it waits for nobody, equals the engine over the schedule that came about, and goes on whatever
a node does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from direct_grid import DirectGrid
from federations import loss, net
from flower_app import CLIENTS, initial, largest_difference, load_data, shards
from flwr.app import Array, ArrayRecord, Message, RecordDict
from torch import nn

from fewer.federated import Anarchic, AnarchicConfig, anarchic_client_app, simulate_anarchic
from fewer.federated.anarchic_fl import strategy as module

SETTINGS = {"lr": 0.05, "batch_size": 8, "buffer": 2, "server_lr": 3.0}
RETRY = 1e-6  # seconds: asked again as soon as the loop comes round


def choose_steps(context, visit):
    """1 to 4, differing from client to client and visit to visit."""
    return 1 + (context.node_config["partition-id"] + visit) % 4


def trains(message, node):
    """Whether a message asks this node to train."""
    return message.metadata.message_type == "train" and message.metadata.dst_node_id == node


def anarchic(variant: Any = "cd", app_config=None, steps=choose_steps, load=load_data, spoil=None, hold=None, **keywords):
    config = AnarchicConfig(variant=variant, **SETTINGS | keywords.pop("config", {}))
    app = anarchic_client_app(net, load, loss, app_config or config, steps)
    keywords = {"min_available_nodes": CLIENTS, "seed": 5, "clients": CLIENTS, "retry": RETRY} | keywords
    return DirectGrid(app, CLIENTS, spoil, hold), Anarchic(config, **keywords)


def in_process(strategy):
    return simulate_anarchic(strategy.algorithm, net, shards(), strategy.updates, seed=strategy.seed, loss_fn=loss)


def server_of(strategy):
    assert strategy.server is not None
    return strategy.server


def delays(strategy):
    return {(each.worker, number - each.version) for number, update in enumerate(strategy.updates) for each in update.returns}


@pytest.mark.parametrize("variant", ["cd", "cs"])
def test_the_schedule_that_came_about_gives_the_same_model_in_process(variant):
    grid, strategy = anarchic(variant)
    seen = []
    result = strategy.start(grid, initial(), num_rounds=9, evaluate_fn=lambda number, arrays: seen.append(number))
    assert largest_difference(result.arrays, in_process(strategy)) <= 1e-6
    assert seen == list(range(10))
    assert [len(update.returns) for update in strategy.updates] == [2] * 9
    assert sorted(result.train_metrics_clientapp) == list(range(1, 10))
    assert len({each.steps for update in strategy.updates for each in update.returns}) == 4


@pytest.mark.parametrize("variant", ["cd", "cs"])
def test_a_node_that_is_held_back_holds_up_nobody_and_its_late_reply_is_used_with_its_true_delay(variant):
    """Node 1000 (client 0) answers its first message when 20 updates were made meanwhile; the others make them all."""
    grid, strategy = anarchic(variant, hold=lambda message, newest: trains(message, 1000) and newest <= 20)
    result = strategy.start(grid, initial(), num_rounds=25)
    first = next(number for number, update in enumerate(strategy.updates) for each in update.returns if each.worker == 0)
    assert first >= 20
    assert (0, first) in delays(strategy)  # fetched at version 0
    assert max(delay for worker, delay in delays(strategy) if worker != 0) < 5
    assert largest_difference(result.arrays, in_process(strategy)) <= 1e-6


def test_a_node_that_never_answers_does_not_stop_the_run_and_is_sent_one_message():
    grid, strategy = anarchic("cs", hold=lambda message, newest: trains(message, 998))
    strategy.min_available_nodes = 3
    strategy.start(grid, initial(), num_rounds=12)
    assert {worker for worker, _ in delays(strategy)} == {0, 1, 3}
    assert len([message for message, _ in grid.out.values() if trains(message, 998)]) == 1
    assert not server_of(strategy).vectors["memory"][2].any()


def test_every_other_node_has_one_message_at_all_times():
    out = []

    def hold(message, newest):
        out.append(sum(each.metadata.dst_node_id == 1000 for each, _ in grid.out.values()))
        return False

    grid, strategy = anarchic(hold=hold)
    strategy.start(grid, initial(), num_rounds=6)
    assert max(out) == 1
    assert {each.client for each in strategy.traffic.transfers} == set(range(CLIENTS))


def spoiled(client, change):
    def spoil(message, reply):
        if message.metadata.message_type != "train" or message.metadata.dst_node_id != 1000 - client or reply.has_error():
            return reply
        vector = change(reply.content["update"]["vector"].numpy())
        other = Message(RecordDict(dict(reply.content) | {"update": ArrayRecord({"vector": Array(vector)})}), reply_to=message)
        other.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
        return other

    return spoil


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda v: v * np.nan, "with NaN"), (lambda v: v[:-1], r"of shape \(\d+,\); expected \(\d+,\)")],
    ids=["nan", "shape"],
)
def test_a_bad_reply_is_left_out_the_client_named_and_the_buffer_waits_for_another(change, words):
    grid, strategy = anarchic("cs", spoil=spoiled(1, change))
    with pytest.warns(UserWarning, match=f"client 1 sent 'update' {words}.*left out"):
        result = strategy.start(grid, initial(), num_rounds=6)
    assert [len(update.returns) for update in strategy.updates] == [2] * 6
    assert {worker for worker, _ in delays(strategy)} == {0, 2, 3}
    assert list(strategy.left_out) == [1]
    assert largest_difference(result.arrays, in_process(strategy)) <= 1e-6


def test_a_reply_that_is_too_late_is_left_out_and_its_client_comes_again():
    grid, strategy = anarchic(config={"max_delay": 3}, hold=lambda message, newest: trains(message, 1000) and newest <= 8)
    with pytest.warns(UserWarning, match=r"client 0 came with a delay of \d+ updates; expected at most 3"):
        strategy.start(grid, initial(), num_rounds=16)
    assert {worker for worker, _ in delays(strategy)} == {0, 1, 2, 3}
    assert max(delay for _, delay in delays(strategy)) <= 3


def test_a_client_that_raises_an_error_is_told_and_asked_again(caplog):
    failures = []

    def load(context):
        if context.node_config["partition-id"] == 2 and len(failures) < 3:
            failures.append(1)
            raise OSError("no disk")
        return load_data(context)

    grid, strategy = anarchic(load=load)
    strategy.start(grid, initial(), num_rounds=12)
    assert len(failures) == 3
    assert 2 in {worker for worker, _ in delays(strategy)}


def test_a_client_that_declines_is_asked_again_with_the_then_current_model():
    """Client 3 takes part at its fourth visit only; its batches are those of that visit."""
    grid, strategy = anarchic(steps=lambda context, visit: 0 if context.node_config["partition-id"] == 3 and visit < 4 else 2)
    result = strategy.start(grid, initial(), num_rounds=12)
    first = next(each for update in strategy.updates for each in update.returns if each.worker == 3)
    assert first.visit == 4
    assert first.version >= 1
    assert largest_difference(result.arrays, in_process(strategy)) <= 1e-6


@pytest.mark.parametrize("steps", [-1, 2.5])
def test_steps_that_cannot_be_are_an_error_of_that_client(steps, caplog):
    grid, strategy = anarchic(steps=lambda context, visit: steps if context.node_config["partition-id"] == 0 else 1)
    strategy.start(grid, initial(), num_rounds=5)
    reasons = {reply.error.reason for _, reply in grid.messages if reply.has_error()}
    assert len(reasons) == 1
    assert f"steps is {steps}; expected a whole number of at least 0" in reasons.pop()
    assert {worker for worker, _ in delays(strategy)} == {1, 2, 3}


def test_a_node_that_was_started_again_says_who_it_is_and_goes_on_as_the_same_client():
    grid, strategy = anarchic("cs", hold=lambda message, newest: trains(message, 1000))

    def restart(number, arrays):
        if number == 3:  # a new node with the old partition-id, in place of one that died without an answer
            grid.contexts[77] = grid.contexts.pop(1000)

    strategy.min_available_nodes = 3
    strategy.start(grid, initial(), num_rounds=10, evaluate_fn=restart)
    back = [number for number, update in enumerate(strategy.updates) for each in update.returns if each.worker == 0]
    assert back
    assert min(back) > 3


def test_a_new_node_with_another_model_is_left_alone(caplog):
    odd = anarchic_client_app(lambda: nn.Linear(6, 3), load_data, loss, AnarchicConfig(variant="cd", **SETTINGS), choose_steps)
    grid, strategy = anarchic()
    usual = grid.app

    def either(message, context):
        return (odd if context.node_config["partition-id"] == 0 and "late" in context.node_config else usual)(message, context)

    grid.app = either

    def join(number, arrays):
        if number == 2:
            grid.contexts[78] = grid.contexts.pop(1000)
            grid.contexts[78].node_config["late"] = 1

    strategy.start(grid, initial(), num_rounds=8, evaluate_fn=join)
    assert strategy._refused == {78}
    assert sum(message.metadata.dst_node_id == 78 for message, _ in grid.messages) == 1


def test_a_client_beyond_those_that_were_said_is_left_out_of_afa_cs():
    grid, strategy = anarchic("cs", clients=3, min_available_nodes=3)
    strategy.start(grid, initial(), num_rounds=6)
    assert {worker for worker, _ in delays(strategy)} == {0, 1, 2}
    assert server_of(strategy).vectors["memory"].shape[0] == 3


@pytest.mark.parametrize("variant", ["cd", "cs"])
def test_a_strategy_goes_on_from_its_checkpoint(variant, tmp_path):
    file = tmp_path / "server.pt"
    grid, first = anarchic(variant, checkpoint=file)
    half = first.start(grid, initial(), num_rounds=4)
    grid, second = anarchic(variant, checkpoint=file)
    second.start(grid, half.arrays, num_rounds=4)
    assert server_of(second).round == 8
    visits = [[(each.worker, each.visit) for update in one.updates for each in update.returns] for one in (first, second)]
    assert not set(visits[0]) & set(visits[1])  # no batch is drawn again
    if variant == "cs":
        assert (server_of(second).vectors["memory"] != 0).any(dim=1).all()
    with pytest.raises(ValueError, match="written with 4 clients and is resumed with 5"):
        anarchic(variant, checkpoint=file, clients=5)[1].start(grid, initial(), num_rounds=1)
    other = {"cd": "cs", "cs": "cd"}[variant]
    grid, third = anarchic(other, checkpoint=file)
    with pytest.raises(ValueError, match=f"written with algorithm .*resumed with .*variant='{other}'"):
        third.start(grid, initial(), num_rounds=1)


def test_without_any_good_reply_the_run_ends_with_an_error(monkeypatch):
    monkeypatch.setattr(module, "POLL", 0.0)
    grid, strategy = anarchic(hold=lambda message, newest: message.metadata.message_type == "train")
    with pytest.raises(RuntimeError, match=r"no good reply came in 0.05 s \(timeout\); expected one of clients \[0, 1, 2, 3\]"):
        strategy.start(grid, initial(), num_rounds=1, timeout=0.05)


def test_without_enough_nodes_that_say_who_they_are_the_run_ends_with_an_error(monkeypatch):
    monkeypatch.setattr(module, "POLL", 0.0)
    grid, strategy = anarchic(hold=lambda message, newest: message.metadata.dst_node_id == 1000, patience=0.05)
    with pytest.raises(RuntimeError, match=r"fewer than 4 nodes \(min_available_nodes\) said who they are in 0.05 s"):
        strategy.start(grid, initial(), num_rounds=1)


def test_messages_that_could_not_be_sent_are_tried_again(monkeypatch):
    grid, strategy = anarchic()
    push, refused = grid.push_messages, []

    def sometimes(messages):
        if len(refused) < 2:
            refused.append(1)
            return [] if len(refused) == 1 else [None] * len(messages)
        return push(messages)

    monkeypatch.setattr(grid, "push_messages", sometimes)
    strategy.start(grid, initial(), num_rounds=3)
    assert len(strategy.updates) == 3


def test_the_final_model_is_evaluated_where_that_is_asked_for():
    grid, strategy = anarchic(fraction_evaluate=1.0)
    result = strategy.start(grid, initial(), num_rounds=4)
    history, held = in_process(strategy), shards()
    right = history.flat.predict(history.server.x, held.x).argmax(1) == held.y
    assert result.evaluate_metrics_clientapp[4]["accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)


def test_afa_cs_must_know_how_many_clients_there_are():
    with pytest.raises(ValueError, match="clients is None with variant 'cs'; expected how many there are in all"):
        Anarchic(AnarchicConfig(variant="cs"))
    with pytest.raises(ValueError, match="retry is 0"):
        Anarchic(AnarchicConfig(variant="cd"), retry=0)
