"""SFPrompt for Flower: the strategy of the ServerApp, which holds the body, and the ClientApp.

A round is one "train" message and its answer, then for each batch two messages more: "train.grad" brings b and gets dL/db, "train.smash"
brings dL/da and gets the next batch's activations, or after the last one p and W_t. Batches of all clients of a round go through the body
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from logging import WARNING, getLogger
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import Tensor

from fewer.federated._shared.algorithm import Reply
from fewer.federated._shared.clients import Shard, client_rng
from fewer.federated._shared.flat_model import FlatModel, Loss, cross_entropy
from fewer.federated._shared.flower import FlowerStrategy
from fewer.federated._shared.flower_clients import LoadData, answer_who, client_of
from fewer.federated._shared.flower_records import CONFIG, METRICS, Layout, flat_record, read_message, reply_record, tensor_of
from fewer.federated.sfprompt.algorithm import SFPrompt, SFPromptConfig, SplitClient
from fewer.federated.sfprompt.split_model import ClientModel, SplitModel
from fewer.federated.sfprompt.wire import BodyServer, Smashed, read_tensor, tensor_record
from fewer.files import model_digest
from fewer.meters import counting  # by name: Ray pickles the app, and a lazily loaded package cannot be pickled

log = getLogger("flwr").log
SMASHED, PROMPT, OUTPUT, GRADIENT, RETURNED = "smashed", "prompt", "output", "output_gradient", "returned_gradient"
HALF = "fewer.sfprompt"  # a half-done round in context.state
KEPT_ARRAYS = ("places", "x", "y")
SENT, STEPPED = "sent", "stepped"  # what has been done with its batch: activations sent, or the tail stepped as well


class SFPromptStrategy(FlowerStrategy):
    """SFPrompt as a Flower strategy over `trained_arrays(split)`: prompt and tail.

    A client that fails, that does not answer one of the exchange's messages within the round's `timeout`, or that sends NaN or another shape
    than the model was cut to, is left out of the round, which goes on with the others; so is one that comes back in the middle of a round
    without its half-done batch. Nothing is evaluated by the clients, who have no body: give `start` an `evaluate_fn`.

    Args:
        server: the body's, `split.server()`.
        config: the settings, the same as the clients'.
        fraction_train: each client takes part in a round with this probability (redrawn if none does).
        min_available_nodes: the strategy waits until so many nodes are there.
        keywords: `seed`, `sampler`, `clients`, `checkpoint`, `patience` (see `FlowerStrategy`).

    Raises:
        ValueError: (when started) the clients' heads differ, or where they are cut.

    Examples:
        >>> from torch import nn
        >>> strategy = SFPromptStrategy(BodyServer(nn.Linear(8, 8).requires_grad_(False)), SFPromptConfig(keep=0.2))
        >>> strategy.algorithm.config.keep
        0.2

        In a ServerApp: `strategy.start(grid, initial_arrays=trained_arrays(split), num_rounds=10)`.
    """

    def __init__(
        self,
        server: BodyServer,
        config: SFPromptConfig | None = None,
        fraction_train: float = 0.1,
        min_available_nodes: int = 2,
        **keywords: Any,
    ) -> None:
        super().__init__(SFPrompt(config or SFPromptConfig()), fraction_train, 0.0, min_available_nodes, **keywords)
        self.body = server
        self._grid: Grid | None = None
        self._nodes: dict[int, int] = {}  # client -> node of those in this round

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The messages that begin a round."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._grid = grid
        self._nodes = {client: message.metadata.dst_node_id for client, message in zip(self._asked, messages, strict=True)}
        return messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The exchange with those that have begun, and the mean of what they end with."""
        return super().aggregate_train(server_round, self._exchange(replies))

    def _exchange(self, replies: Iterable[Message]) -> list[Message]:
        """Batch after batch, until every client has ended or is left out; the replies that they end with."""
        ended: list[Message] = []
        while True:
            sent = {}
            for client, message in self._heard(replies).items():
                if SMASHED in message.content.array_records:
                    self.traffic.came(client, message.content)
                    sent[client] = message.content
                else:
                    ended.append(message)
            parts = {client: part for client, content in sent.items() if (part := self._read_part(client, content)) is not None}
            if not parts:
                return ended
            replies = self._batch(parts, {client: sent[client].config_records[CONFIG] for client in parts})

    def _batch(self, parts: Mapping[int, Smashed], about: Mapping[int, ConfigRecord]) -> list[Message]:
        """The body's forward and backward pass for a batch of each client; what they answer to its end."""
        outputs = self.body.forward_all(parts, keep=any(each["returns"] for each in about.values()))
        stepped = self._heard(self._ask_for("grad", {client: {OUTPUT: tensor_record(b)} for client, b in outputs.items()}, about))
        gradients = {}
        for client, message in stepped.items():
            self.traffic.came(client, message.content)
            gradient = self._read(client, message.content, GRADIENT) if about[client]["returns"] else None
            if gradient is not None and gradient.shape != outputs[client].shape:
                self._leave_out(client, f"{GRADIENT!r} of shape {tuple(gradient.shape)}; expected {tuple(outputs[client].shape)}")
            elif gradient is not None or not about[client]["returns"]:
                gradients[client] = gradient
        back = self.body.backward_all({client: each for client, each in gradients.items() if each is not None})
        self.body.drop(list(parts))
        records = {client: {RETURNED: tensor_record(back[client])} if client in back else {} for client in gradients}
        return self._ask_for("smash", records, about)

    def _ask_for(self, what: str, records: Mapping[int, Mapping[str, ArrayRecord]], about: Mapping[int, ConfigRecord]) -> list[Message]:
        """Send each client a message of the exchange; the replies."""
        assert self._grid is not None
        assert self.server is not None
        messages = []
        for client, arrays in records.items():
            record = RecordDict({**arrays, CONFIG: ConfigRecord({"key": self._key, "batch": about[client]["batch"]})})
            self.traffic.sent(self.server.round + 1, client, record)
            messages.append(Message(record, dst_node_id=self._nodes[client], message_type=f"train.{what}"))
        return list(self._grid.send_and_receive(messages, timeout=self._timeout)) if messages else []

    def _heard(self, replies: Iterable[Message]) -> dict[int, Message]:
        """client -> reply of those that came without an error, the others told."""
        replies = list(replies)
        good = self._answered(replies, "training")
        by_client = {self._names.get(reply.metadata.src_node_id, reply.metadata.src_node_id): reply for reply in replies}
        return {client: by_client[client] for client in good}

    def _read_part(self, client: int, content: RecordDict) -> Smashed | None:
        """What a client sent of a batch; None, with a warning, where it is of another shape than announced or no number."""
        smashed = self._read(client, content, SMASHED)
        prompt = self._read(client, content, PROMPT) if PROMPT in content.array_records else None
        if smashed is None or (prompt is None and PROMPT in content.array_records):
            return None
        if fault := self.body.fault_of(smashed, prompt):
            return self._leave_out(client, fault)
        return smashed, prompt

    def _read(self, client: int, content: RecordDict, name: str) -> Tensor | None:
        if name not in content.array_records:
            return self._leave_out(client, f"no {name!r}")
        tensor = read_tensor(content.array_records[name])
        return tensor if bool(tensor.isfinite().all()) else self._leave_out(client, f"{name!r} with NaN or infinite numbers")

    def _leave_out(self, client: int, fault: str) -> None:
        log(WARNING, "client %s sent %s; it is left out of this round", client, fault)


def sfprompt_client_app(
    split_model_fn: Callable[[], ClientModel], load_data: LoadData, config: SFPromptConfig | None = None, loss_fn: Loss = cross_entropy
) -> ClientApp:
    """SFPrompt's clients as a Flower ClientApp.

    Between two messages a half-done round lies in `context.state`: its vectors and the places of its examples. The head runs once more when
    a batch's gradient comes.

    Args:
        split_model_fn: makes the client's model, `SplitModel.client()`; of a `SplitModel` that is taken.
        load_data: `load_data(context)`: the client's examples (x [n, ...], y [n]).
        config: the settings, the same as the strategy's.
        loss_fn: `loss_fn(logits, y)`: the losses of the examples [B].

    Raises:
        ValueError: (when the app is asked) the client has no examples, its settings differ from the server's, or it is asked for another
            batch than the one that is half done.

    Examples:
        >>> from torch import nn
        >>> def model():
        ...     head, body = (nn.Linear(3, 3).requires_grad_(False) for _ in range(2))
        ...     return SplitModel(head, body, nn.Linear(3, 2), at="cut", width=3)
        >>> app = sfprompt_client_app(model, lambda context: (torch.zeros(4, 5, 3), torch.tensor([0, 1, 0, 1])))
    """
    app, algorithm = ClientApp(), SFPrompt(config or SFPromptConfig())

    def flat_model() -> FlatModel:
        model = split_model_fn()
        return FlatModel(model.client() if isinstance(model, SplitModel) else model, loss_fn)

    def splits(context: Context, x: Tensor, round: int, flat: FlatModel) -> SplitClient:
        examples, y = load_data(context)
        client = client_of(context)
        if not len(examples):
            raise ValueError(f"client {client} has no examples; expected at least one: leave the client out")
        return SplitClient(Shard(client, flat, examples, y, torch.arange(len(examples))), x, algorithm.config, round)

    @app.query("who")
    def who(message: Message, context: Context) -> Message:
        flat = flat_model()
        return answer_who(message, context, Layout.of(flat), agreement(flat.model))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        flat, settings = flat_model(), message.content.config_records[CONFIG]
        client = client_of(context)
        if settings["algorithm"] != repr(algorithm):
            raise ValueError(
                f"the server runs {settings['algorithm']}, client {client} {algorithm!r}; expected the same settings on both sides"
            )
        asked = read_message(message.content, Layout.of(flat), client)
        rng = client_rng(int(settings["seed"]), asked.draw, client)  # pyright: ignore[reportArgumentType] - an int
        rng.integers(2**62)  # what `run_local` seeds layers with
        with torch.no_grad(), counting() as counts:
            split = splits(context, asked.vectors["x"], asked.round, flat)
            batches = split.begin(rng)
        half = HalfDone(str(settings["key"]), asked.round, asked.vectors["x"], split.y, batches, split.sent, gradients=counts["gradients"])
        return half.answer(split, message, context)

    @app.train("grad")
    def grad(message: Message, context: Context) -> Message:
        half = HalfDone.of(message, context, SENT)
        with torch.no_grad():
            split = splits(context, half.y, half.round, flat_model())
            gradient = split.step_tail(half.rows, read_tensor(message.content.array_records[OUTPUT]))
        half.y, half.stage, half.gradients = split.y, STEPPED, half.gradients + 1
        half.save(context)
        return Message(RecordDict({GRADIENT: tensor_record(gradient)} if split.returns else {}), reply_to=message)

    @app.train("smash")
    def smash(message: Message, context: Context) -> Message:
        half = HalfDone.of(message, context, STEPPED)
        with torch.no_grad():
            split = splits(context, half.y, half.round, flat_model())
            if split.returns:
                split.step_prompt(half.rows, read_tensor(message.content.array_records[RETURNED]))
        half.y, half.batch, half.stage = split.y, half.batch + 1, SENT
        return half.answer(split, message, context)

    return app


class HalfDone:
    """A client's round between two messages, as it lies in `context.state`.

    Args:
        key: of the federation.
        round: its number.
        x, y: the vectors [d] that the round began with, and as they are now.
        batches: places of the examples of each batch.
        sent: examples that are kept.
        batch: the place of the batch that is half done.
        stage: what has been done with it.
        gradients: computed so far.
    """

    def __init__(
        self, key: str, round: int, x: Tensor, y: Tensor, batches: list[np.ndarray], sent: int, batch: int = 0, stage: str = SENT,
        gradients: float = 0,
    ) -> None:  # fmt: skip
        self.key, self.round, self.x, self.y, self.batches, self.sent = key, round, x, y, batches, sent
        self.batch, self.stage, self.gradients = batch, stage, gradients

    @property
    def name(self) -> str:
        """Which batch it is."""
        return f"{self.round}.{self.batch}"

    @property
    def rows(self) -> np.ndarray:
        return self.batches[self.batch]

    def answer(self, split: SplitClient, message: Message, context: Context) -> Message:
        """The next batch's activations, or after the last one p and W_t."""
        if self.batch == len(self.batches):
            for name in (HALF, *(f"{HALF}.{each}" for each in KEPT_ARRAYS)):
                context.state.pop(name, None)
            split.sent = self.sent
            reply = Reply(client_of(context), {"model": self.y}, split.metrics(self.x))
            return Message(reply_record(reply, self.gradients), reply_to=message)
        self.save(context)
        with torch.no_grad():
            smashed, prompt = split.smash(self.rows)
        records: dict[str, Any] = {SMASHED: tensor_record(smashed)} | ({} if prompt is None else {PROMPT: tensor_record(prompt)})
        records |= {
            CONFIG: ConfigRecord({"batch": self.name, "returns": split.returns}),
            METRICS: MetricRecord({"num-examples": len(self.rows)}),
        }
        return Message(RecordDict(records), reply_to=message)

    def save(self, context: Context) -> None:
        places = np.concatenate(self.batches)
        lengths = [len(rows) for rows in self.batches]
        context.state[HALF] = ConfigRecord(
            {"key": self.key, "round": self.round, "batch": self.batch, "stage": self.stage, "sent": self.sent, "lengths": lengths,
             "gradients": float(self.gradients)}
        )  # fmt: skip
        context.state[f"{HALF}.places"] = ArrayRecord({"vector": Array(places)})
        for name in ("x", "y"):
            context.state[f"{HALF}.{name}"] = flat_record(getattr(self, name))

    @classmethod
    def of(cls, message: Message, context: Context, stage: str) -> HalfDone:
        """The half-done round that a message goes on with.

        Raises:
            ValueError: there is none, or it is of another batch, or at another stage.
        """
        told, kept = message.content.config_records[CONFIG], context.state.config_records.get(HALF)
        at = None if kept is None else f"{kept['round']}.{kept['batch']}"
        if kept is None or (kept["key"], at, kept["stage"]) != (told["key"], told["batch"], stage):
            raise ValueError(
                f"client {client_of(context)} is asked to go on with batch {told['batch']} and has "
                + ("none half done" if kept is None else f"{at} half done ({kept['stage']})")
                + "; expected the same: it is left out until the next round"
            )
        held: Any = kept
        records = {name: context.state.array_records[f"{HALF}.{name}"]["vector"] for name in KEPT_ARRAYS}
        x, y = (tensor_of(records[name]).clone() for name in ("x", "y"))
        batches = np.split(records["places"].numpy().copy(), np.cumsum(held["lengths"])[:-1])
        return cls(held["key"], held["round"], x, y, batches, held["sent"], held["batch"], held["stage"], held["gradients"])


def agreement(model: Any) -> dict[str, str]:
    """What all clients must have alike though it never travels: the head, and where the model is cut."""
    return {
        "cut": f"{model.at}, {model.tokens} tokens of {model.width}, {model.prompt_tokens} of the prompt",
        "head": model_digest(model.head),
    }
