"""The clients' side of the same algorithms in Flower: a ClientApp that answers training, evaluation, and the question who it is.

A client is named by its node's `partition-id` where it has one (as every simulated node has), else by its node id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fewer.checks import check_whole
from fewer.federated._shared.algorithm import BUFFERS, Algorithm, lengths_of, run_local
from fewer.federated._shared.clients import Shard, client_rng
from fewer.federated._shared.flat_model import FlatModel, Loss, cross_entropy
from fewer.federated._shared.flower_records import (
    ARRAYS,
    CONFIG,
    KEPT,
    METRICS,
    Layout,
    flat_record,
    read_message,
    reply_record,
    tensor_of,
)
from fewer.meters import counting  # by name: Ray pickles the app, and a lazily loaded package cannot be pickled

AGREE = "agree"  # words that must be the same for all clients
LoadData = Callable[[Context], tuple[Tensor, Tensor]]
ChooseSteps = Callable[[Context, int], int]
STEPS = "steps"  # the metric by which a client tells how many it made


def flower_client_app(
    algorithm: Algorithm,
    model_fn: Callable[[], nn.Module],
    load_data: LoadData,
    loss_fn: Loss = cross_entropy,
    *,
    load_test: LoadData | None = None,
    buffers: Literal["average"] | None = None,
    agree: Callable[[nn.Module], Mapping[str, str]] | None = None,
    choose_steps: ChooseSteps | None = None,
) -> ClientApp:
    """A federated algorithm's clients as a Flower ClientApp.

    Args:
        algorithm: the same as the strategy's.
        model_fn: makes the model.
        load_data: `load_data(context)`: the client's examples (x [n, ...], y [n, ...]); `context.node_config["partition-id"]` says which.
        loss_fn: `loss_fn(output, y)`: the losses of the examples [B], or their mean.
        load_test: examples to evaluate on, which may be none; those to train on by default.
        buffers: "average" for models with BatchNorm.
        agree: words about the model, by name, that must be the same for all clients though they never travel with it, such as a
            fingerprint of frozen parameters; the server compares them before a client's first round.
        choose_steps: `choose_steps(context, visit)`: how many local steps the client makes at a visit (from 1); 0: it does not take part
            now. As the algorithm's settings say where it is not given.

    Returns:
        an app that answers training, evaluation, and the server's question who it is. What the client keeps lies in `context.state`.

    Raises:
        ValueError: (when the app is asked) the client has no examples, or its algorithm is set up differently from the server's.
    """
    app = ClientApp()

    def flat_model() -> FlatModel:
        return FlatModel(model_fn(), loss_fn, buffers)

    @app.query("who")
    def who(message: Message, context: Context) -> Message:
        flat = flat_model()
        return answer_who(message, context, Layout.of(flat), agree(flat.model) if agree is not None else {})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        flat = flat_model()

        def shard(client: int, asked: Any) -> Shard:
            x, y = load_data(context)
            if not len(x):
                raise ValueError(f"client {client} has no examples; expected at least one: leave the client out")
            return Shard(client, flat, x, y, torch.arange(len(x)), asked.steps)

        return answer_training(algorithm, message, context, Layout.of(flat), shard, choose_steps)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        flat = flat_model()
        vectors = Layout.of(flat).vectors(message.content.array_records[ARRAYS])
        x, y = (load_test or load_data)(context)
        if not len(x):  # nothing to say, and the server leaves it out
            return Message(RecordDict({METRICS: MetricRecord({"num-examples": 0})}), reply_to=message)
        output = flat.predict(vectors["x"], x, vectors.get(BUFFERS))
        metrics: dict[str, Any] = {"num-examples": len(x), "loss": float(loss_fn(output, y).mean())}
        if output.ndim == 2 and not y.is_floating_point():
            metrics["accuracy"] = float((output.argmax(1) == y).float().mean())
        return Message(RecordDict({METRICS: MetricRecord(metrics)}), reply_to=message)

    return app


def answer_training(
    algorithm: Algorithm,
    message: Message,
    context: Context,
    layout: Layout,
    shard_of: Callable[[int, Any], Any],
    choose_steps: ChooseSteps | None = None,
) -> Message:
    """A client's round: what it was asked, by the algorithm's `local` on its shard; what it keeps goes into `context.state`.

    Args:
        algorithm: the same as the strategy's.
        message, context: as Flower hands them over.
        layout: of the model's arrays.
        shard_of: `shard_of(client, asked)`: what `local` sees of the client, `asked` being the message as the engine knows it.
        choose_steps: see `flower_client_app`; the reply then tells the steps.

    Raises:
        ValueError: the client's algorithm is set up differently from the server's, or the steps that it chose are below 0.
    """
    client, settings = client_of(context), message.content.config_records[CONFIG]
    if settings["algorithm"] != repr(algorithm):
        raise ValueError(
            f"the server runs {settings['algorithm']}, client {client} {algorithm!r}; expected the same settings on both sides"
        )
    asked, key = read_message(message.content, layout, client), str(settings["key"])
    rng = client_rng(int(settings["seed"]), asked.draw, client)  # pyright: ignore[reportArgumentType] - an int
    steps = None if choose_steps is None else choose_steps(context, asked.draw)
    check_whole(least=0, optional=["steps"], steps=steps)
    if steps == 0:
        return Message(RecordDict({METRICS: MetricRecord({"num-examples": 0, STEPS: 0})}), reply_to=message)
    asked = replace(asked, steps=steps)
    shard = shard_of(client, asked)
    with counting() as counts:
        kept, reply = run_local(algorithm, kept_vectors(context, algorithm, shard.flat, key), asked, shard, rng)
    keep(context, key, kept)
    if steps is not None:
        reply = replace(reply, metrics=reply.metrics | {STEPS: steps})
    return Message(reply_record(reply, counts["gradients"]), reply_to=message)


def answer_who(message: Message, context: Context, layout: Layout, agreed: Mapping[str, str] | None = None) -> Message:
    """A client's name, its model's layout, and words that must be the same for all clients."""
    about: dict[str, Any] = {"client": client_of(context)} | layout.words()
    if agreed:
        about[AGREE] = "\n".join(f"{name}\t{said}" for name, said in agreed.items())
    return Message(RecordDict({CONFIG: ConfigRecord(about)}), reply_to=message)


def client_of(context: Context) -> int:
    """The client's name: its node's partition-id, or else the node id."""
    return int(context.node_config.get("partition-id", context.node_id))


def kept_vectors(context: Context, algorithm: Algorithm, flat: Any, key: str) -> dict[str, Tensor]:
    """What the client kept since its last round in this federation; zeros where there was none."""
    state = context.state
    if KEPT in state.config_records and state.config_records[KEPT]["key"] == key:
        return {name: tensor_of(state.array_records[f"{KEPT}.{name}"]["vector"]).clone() for name in algorithm.keeps}
    lengths = lengths_of(algorithm, algorithm.keeps, flat.size)
    return {name: torch.zeros(length, dtype=flat.dtype) for name, length in lengths.items()}


def keep(context: Context, key: str, vectors: dict[str, Tensor]) -> None:
    """Keep vectors for the client's next round."""
    context.state[KEPT] = ConfigRecord({"key": key})
    for name, vector in vectors.items():
        context.state[f"{KEPT}.{name}"] = flat_record(vector)
