"""SFPrompt's Flower apps: equal to the engine, and what goes wrong on the way: deaths, stale batches, NaN, silence."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import pytest
import torch
from direct_grid import DirectGrid
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from split_app import CLIENTS, app_of, in_process, load_data, strategy_of
from split_vits import cut

from fewer.federated import SFPromptConfig, trained_arrays
from fewer.federated.sfprompt.strategy import HALF

BY_CUT = pytest.mark.parametrize(
    "words", [{}, {"at": "cut"}, {"at": "cut", "tail_blocks": 0}, {"prompt_tokens": 0}], ids=["input", "cut", "class token", "no prompt"]
)


def difference(result, history):
    mine, theirs = result.arrays.to_torch_state_dict(), history.state_dict()
    assert list(mine) == list(theirs)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in theirs)


def round_in(message) -> int:
    told: Any = message.content.config_records["config"]
    return int(told.get("round", 0))


def exchanged(message):
    return message.metadata.message_type.startswith("train.")


class Restoring(DirectGrid):
    """Between two messages a client's state is serialised, as in a deployment."""

    def _answer(self, message):
        context = self.contexts[message.metadata.dst_node_id]
        context.state = recorddict_from_proto(recorddict_to_proto(context.state))
        return super()._answer(message)


@BY_CUT
def test_the_apps_equal_the_engine(words):
    def model():
        return cut(**words)

    grid = Restoring(app_of(model_fn=model), CLIENTS)
    strategy = strategy_of(model_fn=model)
    result = strategy.start(grid, trained_arrays(model()), num_rounds=2)
    history = in_process(2, model_fn=model)
    assert difference(result, history) <= 1e-6
    assert (history.server.x - history.flat.initial()).norm() > 0.1
    assert not strategy.body.waiting
    assert not any(name.startswith(HALF) for context in grid.contexts.values() for name in context.state)


def test_the_body_runs_once_for_all_clients():
    strategy, passes = strategy_of(), []
    strategy.body.body.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    strategy.start(DirectGrid(app_of(), CLIENTS), trained_arrays(cut()), num_rounds=1)
    kept = [round(0.5 * size) for size in (23, 20, 17)]
    batches = [[min(8, left - start) for start in range(0, left, 8)] for left in kept]
    assert passes == [sum(each[place] for each in batches if place < len(each)) for place in range(max(map(len, batches)))]


def test_labels_and_examples_stay_with_the_client():
    grid = DirectGrid(app_of(), CLIENTS)
    strategy_of().start(grid, trained_arrays(cut()), num_rounds=1)
    kinds = {name for _, reply in grid.messages for name in reply.content.array_records}
    assert kinds == {"smashed", "output_gradient", "model"}
    down = {name for sent, _ in grid.messages for name in sent.content.array_records}
    assert down == {"arrays", "output", "returned_gradient"}


def test_all_bytes_are_counted():
    grid, strategy = DirectGrid(app_of(), CLIENTS), strategy_of()
    strategy.start(grid, trained_arrays(cut()), num_rounds=1)
    trained = [(sent, reply) for sent, reply in grid.messages if sent.metadata.message_type.startswith("train")]
    assert len(strategy.traffic.transfers) == len(trained)
    serialised = [sum(len(recorddict_to_proto(each.content).SerializeToString()) for each in side) for side in zip(*trained, strict=True)]
    down, up = strategy.traffic.total()
    assert down == pytest.approx(serialised[0], rel=0.01)
    assert up == pytest.approx(serialised[1], rel=0.01)


# What goes wrong


def only(clients):
    """In round 2 these take part."""
    return lambda ids, round, seed: sorted(clients) if round == 2 else sorted(ids)


@functools.cache
def without_client_1(rounds, at="input"):
    """The engine's run in which client 1 is left out of round 2."""
    return in_process(rounds, model_fn=lambda: cut(at=at), sampler=only([0, 2]))


class Failing(DirectGrid):
    """A client that fails at its so manieth message of the exchange in round 2: it dies, or never answers."""

    def __init__(self, app, how, client=1, at=1):
        super().__init__(app, CLIENTS)
        self.how, self.client, self.at, self.seen, self.round = how, client, at, 0, 0

    def send_and_receive(self, messages, *, timeout=None):
        messages, silent = list(messages), set()
        for message in messages:
            self.round = max(self.round, round_in(message))
            if message.metadata.dst_node_id == 1000 - self.client and exchanged(message) and self.round == 2:
                self.seen += 1
                if self.seen == self.at:
                    silent.add(message.metadata.dst_node_id)
        asked = [message for message in messages if self.how != "silent" or message.metadata.dst_node_id not in silent]
        if self.how == "restarted":
            for node in silent:
                self.contexts[node].state = RecordDict()
        return list(super().send_and_receive(asked, timeout=timeout))


@pytest.mark.parametrize("at", [1, 2], ids=["before the gradient", "between the two messages"])
@pytest.mark.parametrize("how", ["silent", "restarted"])
def test_a_client_that_is_gone_in_the_middle_of_a_round_is_left_out(how, at, caplog):
    with caplog.at_level(logging.WARNING, "flwr"):
        strategy = strategy_of()
        result = strategy.start(Failing(app_of(), how, at=at), trained_arrays(cut()), num_rounds=3)
    assert difference(result, without_client_1(3)) <= 1e-6
    assert "round 2: no good answer from [1]" in caplog.text
    assert ("client 1 failed" in caplog.text) == (how == "restarted")
    if how == "restarted":
        assert "and has none half done; expected the same: it is left out until the next round" in caplog.text
    assert not strategy.body.waiting


def test_a_stale_batch_is_refused():
    """The same message again, and one of a batch that is over: nothing is trained twice."""
    grid = DirectGrid(app_of(), CLIENTS)
    strategy = strategy_of()
    began = list(strategy.configure_train(1, trained_arrays(cut()), ConfigRecord(), grid))
    (first, *_) = grid.send_and_receive(began[:1])
    node, name = began[0].metadata.dst_node_id, first.content.config_records["config"]["batch"]
    assert name == "1.0"

    def send(what, batch, **arrays) -> Any:
        record = RecordDict({**arrays, "config": ConfigRecord({"key": strategy._key, "batch": batch})})
        return grid._answer(Message(record, dst_node_id=node, message_type=f"train.{what}"))

    b = ArrayRecord({"value": Array(torch.zeros(8, 7, 16).numpy())})
    assert "is asked to go on with batch 1.1 and has 1.0 half done (sent)" in send("grad", "1.1", output=b).error.reason
    assert "has 1.0 half done (sent)" in send("smash", "1.0", returned_gradient=b).error.reason
    before = grid.contexts[node].state.array_records[f"{HALF}.y"]["vector"].numpy().copy()
    gradient = send("grad", "1.0", output=b).content.array_records["output_gradient"]["value"].numpy()
    assert gradient.shape == (8, 7, 16)
    once = grid.contexts[node].state.array_records[f"{HALF}.y"]["vector"].numpy().copy()
    assert (once != before).any()
    assert "has 1.0 half done (stepped)" in send("grad", "1.0", output=b).error.reason
    assert (grid.contexts[node].state.array_records[f"{HALF}.y"]["vector"].numpy() == once).all()
    assert not send("smash", "1.0", returned_gradient=b).has_error()
    assert "and has 1.1 half done (sent)" in send("smash", "1.0", returned_gradient=b).error.reason


def spoiled(name, change, round=2):
    """Client 1's first such array of a round, changed."""
    state = {"round": 0, "done": False}

    def spoil(message, reply):
        state["round"] = max(state["round"], round_in(message))
        mine = message.metadata.dst_node_id == 999 and state["round"] == round and not state["done"]
        if mine and not reply.has_error() and name in reply.content.array_records:
            record = reply.content.array_records[name]
            (key,) = record
            changed = change(record[key].numpy().copy())
            if changed is None:
                del reply.content[name]
            else:
                reply.content[name] = ArrayRecord({key: Array(changed)})
            state["done"] = True
        return reply

    return spoil


def to_nan(array):
    array.flat[0] = math.nan
    return array


def without(array):
    """The record is missing."""


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("smashed", to_nan, "client 1 sent 'smashed' with NaN or infinite numbers; it is left out of this round"),
        ("smashed", lambda array: array[:, 1:], "client 1 sent activations of shape (8, 6, 16); expected [B, 7, 16]"),
        ("smashed", lambda array: array.astype(int), "client 1 sent torch.int64 numbers; expected floating-point ones"),
        ("output_gradient", to_nan, "client 1 sent 'output_gradient' with NaN"),
        ("output_gradient", lambda array: array[1:], "client 1 sent 'output_gradient' of shape (7, 7, 16); expected (8, 7, 16)"),
    ],
)
def test_a_client_that_sends_what_it_should_not_is_left_out(name, change, said, caplog):
    with caplog.at_level(logging.WARNING, "flwr"):
        strategy = strategy_of()
        grid = DirectGrid(app_of(), CLIENTS, spoil=spoiled(name, change))
        result = strategy.start(grid, trained_arrays(cut()), num_rounds=2)
    assert said in caplog.text
    assert difference(result, without_client_1(2)) <= 1e-6
    assert not strategy.body.waiting


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (to_nan, "client 1 sent 'prompt' with NaN"),
        (lambda array: array[1:], "client 1 sent 6 tokens, its prompt's with them; expected 7, as the model was cut"),
        (without, "client 1 sent 5 tokens, its prompt's with them; expected 7"),
    ],
)
def test_a_client_whose_prompt_does_not_fit_is_left_out(change, said, caplog):
    def model():
        return cut(at="cut")

    with caplog.at_level(logging.WARNING, "flwr"):
        grid = DirectGrid(app_of(model_fn=model), CLIENTS, spoil=spoiled("prompt", change))
        result = strategy_of(model_fn=model).start(grid, trained_arrays(model()), num_rounds=2)
    assert said in caplog.text
    assert difference(result, without_client_1(2, "cut")) <= 1e-6


def test_a_client_with_nan_in_its_data_is_left_out(caplog):
    def broken(context):
        x, y = load_data(context)
        return (x * math.nan if context.node_config["partition-id"] == 1 else x), y

    with caplog.at_level(logging.WARNING, "flwr"):
        result = strategy_of().start(DirectGrid(app_of(load=broken), CLIENTS), trained_arrays(cut()), num_rounds=1)
    assert difference(result, in_process(1, sampler=lambda ids, round, seed: [0, 2])) <= 1e-6
    assert "client 1 sent 'smashed' with NaN" in caplog.text


def test_a_round_in_which_all_are_gone_leaves_the_model_as_it_is(caplog):
    class Silent(DirectGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return super().send_and_receive([each for each in messages if not exchanged(each)], timeout=timeout)

    with caplog.at_level(logging.WARNING, "flwr"):
        strategy = strategy_of()
        result = strategy.start(Silent(app_of(), CLIENTS), trained_arrays(cut()), num_rounds=1)
    assert "no good reply of 0" in caplog.text
    assert not strategy.body.waiting
    assert not result.arrays or difference(result, in_process(1)) > 1e-3


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    words = {"checkpoint": tmp_path / "server.pt"}
    grid = DirectGrid(app_of(), CLIENTS)
    strategy_of(**words).start(grid, trained_arrays(cut()), num_rounds=1)
    result = strategy_of(**words).start(grid, trained_arrays(cut()), num_rounds=1)
    assert difference(result, in_process(2)) <= 1e-6


def test_heads_and_settings_that_differ_are_refused(caplog):
    heads = iter([0, 1, 2, 3])

    def unlike():
        split = cut()
        with torch.no_grad():
            next(split.head.parameters()).add_(next(heads))
        return split

    with pytest.raises(ValueError, match=r"client \d says head '\w+', others '\w+'; expected the same of all clients"):
        strategy_of().start(DirectGrid(app_of(model_fn=unlike), CLIENTS), trained_arrays(cut()), num_rounds=1)
    places = iter(["input", "cut", "cut"])
    with pytest.raises(ValueError, match=r"client \d says cut '(input|cut), 5 tokens of 16, 2 of the prompt'"):
        strategy_of().start(DirectGrid(app_of(model_fn=lambda: cut(at=next(places))), CLIENTS), trained_arrays(cut()), num_rounds=1)
    with caplog.at_level(logging.WARNING, "flwr"):
        strategy_of().start(DirectGrid(app_of(SFPromptConfig(keep=0.1)), CLIENTS), trained_arrays(cut()), num_rounds=1)
    assert "expected the same settings on both sides" in caplog.text


def test_a_client_without_examples_says_so(caplog):
    with caplog.at_level(logging.WARNING, "flwr"):
        app = app_of(load=lambda context: (torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)))
        strategy_of().start(DirectGrid(app, CLIENTS), trained_arrays(cut()), num_rounds=1)
    assert "has no examples; expected at least one: leave the client out" in caplog.text
