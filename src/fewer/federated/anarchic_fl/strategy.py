"""Anarchic federated learning for Flower: a strategy whose loop waits for no node in particular, and the ClientApp."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor, nn

from fewer.checks import check_positive, check_whole
from fewer.federated._shared.algorithm import Message as Sent
from fewer.federated._shared.algorithm import Reply, aggregated, good_replies, run_configure
from fewer.federated._shared.asynchrony import Return, Update, in_time
from fewer.federated._shared.flat_model import Loss
from fewer.federated._shared.flower import PATIENCE, POLL, FlowerStrategy
from fewer.federated._shared.flower_clients import STEPS, ChooseSteps, LoadData, flower_client_app
from fewer.federated._shared.flower_records import METRICS, message_record, read_reply
from fewer.federated.anarchic_fl.algorithm import AnarchicAlgorithm, AnarchicConfig
from fewer.files import check_new_file

log = getLogger("flwr").log
RETRY = 5.0  # seconds after which a node that did not take part is asked again


@dataclass(frozen=True)
class Errand:
    """A message that is out.

    Attributes:
        node: whom it went to.
        client: who that is; None where it was asked just that.
        version, visit: of the model that it was sent, and its how manieth visit this is.
        since: when.
    """

    node: int
    client: int | None
    version: int
    visit: int
    since: float


@dataclass(frozen=True)
class Arrived:
    """A good reply that waits in the buffer: what it holds, what it is a return of, and its metrics."""

    reply: Reply
    back: Return
    metrics: MetricRecord


class Anarchic(FlowerStrategy):
    """AFA-CD or AFA-CS as a Flower strategy.

    At all times a message is out to every node; a node that answers joins the buffer, and as soon as `config.buffer` good replies are in
    it the server steps and goes on, whoever is still away. A late reply is used when it comes, on the model of that moment. What may go
    wrong costs the others nothing:

    - a node that dies, or never answers: the run goes on without it. Its message is given up when Flower says that the node is gone, or
      after `timeout` seconds; if it is there again (a node that was started again says who it is first) it gets the current model.
    - a client that raises an error, or sends NaN, a wrong shape, or an update older than `max_delay`: a warning names it, its reply is
      left out, the buffer waits for another, and the client is asked again after `retry` seconds. One whose model is another than the
      others' is not asked again.
    - nobody sends a good reply for `timeout` seconds: the run ends with an error; the checkpoint holds the last update.

    Args:
        config: the settings, the same as the clients'.
        min_available_nodes: the strategy starts when so many nodes are there; fewer may stay.
        fraction_evaluate: of the nodes that evaluate the final model, each with this probability; 0: none does. (They are waited for, at
            most `patience` seconds, when all updates are made.)
        seed: of every client's batches, which depend on it, the client and its visit alone.
        clients: how many clients there are in all, numbered from 0 by their partition-ids; AFA-CS needs to know, AFA-CD does not.
        checkpoint: a file that the server's state is written into after each update, and taken up from where it exists.
        patience: seconds in which `min_available_nodes` nodes must say who they are at the start (each imports torch first).
        retry: seconds after which a node that took no part (0 steps, an error) is asked again, with the then current model.

    Attributes:
        updates: the schedule as it came about: `simulate_anarchic` over it gives the same model.
        left_out: how many replies of each client were left out (NaN, a wrong shape, too late).
        traffic: bytes of every version and client.
        server: the server's state.

    Raises:
        ValueError: AFA-CS without `clients`, or a number is out of its range.

    Examples:
        >>> strategy = Anarchic(AnarchicConfig(variant="cs", buffer=3), clients=10)
        >>> strategy.algorithm.config.buffer
        3

        In a ServerApp: `strategy.start(grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=100)` makes 100 updates.
    """

    algorithm: AnarchicAlgorithm

    def __init__(
        self,
        config: AnarchicConfig,
        min_available_nodes: int = 2,
        *,
        fraction_evaluate: float = 0.0,
        seed: int = 0,
        clients: int | None = None,
        checkpoint: Path | None = None,
        patience: float = PATIENCE,
        retry: float = RETRY,
    ) -> None:
        if config.variant == "cs" and clients is None:
            raise ValueError("clients is None with variant 'cs'; expected how many there are in all: AFA-CS remembers an update of each")
        check_positive(retry=retry)
        super().__init__(
            AnarchicAlgorithm(config), 1.0, fraction_evaluate, min_available_nodes,
            seed=seed, clients=clients, checkpoint=checkpoint, patience=patience,
        )  # fmt: skip
        self.updates: list[Update] = []
        self.left_out: Counter[int] = Counter()
        self._retry = retry
        self._out: dict[str, Errand] = {}  # by the message's id
        self._buffer: list[Arrived] = []
        self._visits: Counter[int] = Counter()  # of each client, those that it declined too
        self._not_before: dict[int, float] = {}  # node -> when it may be asked again
        self._refused: set[int] = set()
        self._sent_version, self._sent_arrays = -1, ArrayRecord()
        self._started = self._last_good = time.monotonic()

    def summary(self) -> None:
        """Log what the strategy is set to."""
        log(INFO, "\t├──> %s", self.algorithm)
        log(INFO, "\t└──> An update every %d replies, seed: %d", self.algorithm.config.buffer, self.seed)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Make `num_rounds` updates from `ArrayRecord(model.state_dict())`.

        Args:
            grid: as Flower hands it to the ServerApp.
            initial_arrays: the model to start with.
            num_rounds: how many updates.
            timeout: seconds that a message may be out.
            train_config, evaluate_config: settings that travel with the messages.
            evaluate_fn: `evaluate_fn(update, arrays)`, called before the first update and after each.

        Raises:
            RuntimeError: nobody sent a good reply for `timeout` seconds, or too few nodes said who they are at the start.
        """
        check_whole(num_rounds=num_rounds)
        check_positive(timeout=timeout)
        self._timeout = timeout
        if self.checkpoint is not None:
            check_new_file(self.checkpoint, overwrite=True, option="checkpoint")
        self.summary()
        result = Result()
        self._judge(0, initial_arrays, evaluate_fn, result)
        settings, made = dict(train_config or {}), 0
        self._meet_enough(grid)
        self._take(initial_arrays, self.min_available_nodes)
        self._started = self._last_good = time.monotonic()
        while made < num_rounds:
            self._send(grid, settings)
            for message in self._pull(grid):
                self._receive(message)
                if len(self._buffer) == self.algorithm.config.buffer:
                    made += 1
                    result.train_metrics_clientapp[made] = self._step()
                    self._judge(made, self._current(), evaluate_fn, result)
                    if made == num_rounds:
                        break
        result.arrays = self._current()
        if self.fraction_evaluate:
            asked = self.configure_evaluate(made, result.arrays, evaluate_config or ConfigRecord(), grid)
            answers = grid.send_and_receive(asked, timeout=min(timeout, self._patience))
            if (metrics := self.aggregate_evaluate(made, answers)) is not None:
                result.evaluate_metrics_clientapp[made] = metrics
        log(INFO, "Bytes on the wire: %d down, %d up", *self.traffic.total())
        return result

    def _judge(self, number: int, arrays: ArrayRecord, evaluate_fn: Any, result: Result) -> None:
        if evaluate_fn is not None and (metrics := evaluate_fn(number, arrays)) is not None:
            result.evaluate_metrics_serverapp[number] = metrics

    # Who is there

    def _meet_enough(self, grid: Grid) -> None:
        """Wait until enough nodes have said who they are; those that do not answer hold up nobody.

        Raises:
            RuntimeError: they did not in time.
        """
        deadline = None
        while len(self._there(self._wait(grid))) < self.min_available_nodes:
            deadline = deadline or time.monotonic() + self._patience
            if time.monotonic() > deadline:
                reasons = "; ".join(f"node {node}: {reason}" for node, reason in self._silent.items())
                raise RuntimeError(
                    f"fewer than {self.min_available_nodes} nodes (min_available_nodes) said who they are in {self._patience:g} s (patience); "
                    f"expected each to run a ClientApp made by anarchic_client_app. {reasons}"
                )
            self._send(grid, {})
            for message in self._pull(grid):
                self._receive(message)

    def _clients(self, grid: Grid) -> dict[int, int]:
        """client -> node of those that are there now; nobody is waited for."""
        return self._there(list(grid.get_node_ids()))

    def _there(self, nodes: list[int]) -> dict[int, int]:
        """client -> node of those nodes that have said who they are and can take part."""
        found = self._by_client(node for node in nodes if node in self._names and node not in self._refused)
        if self.algorithm.config.variant == "cd" or self.clients is None:
            return found
        for client in [client for client in found if not 0 <= client < self.clients]:
            log(WARNING, "node %d says that it is client %d; expected 0 to %d (clients=%d): it is left out", found[client], client, self.clients - 1, self.clients)  # fmt: skip
            self._refused.add(found.pop(client))
        return found

    # A message out to every node at all times

    def _send(self, grid: Grid, settings: dict[str, Any]) -> None:
        """Ask new nodes who they are; send the current model, once there is one, to every other node that owes nothing."""
        now, nodes = time.monotonic(), list(grid.get_node_ids())
        busy = {errand.node for errand in self._out.values()}
        free = {node for node in nodes if node not in busy | self._refused and self._not_before.get(node, now) <= now}
        errands = [Errand(node, None, 0, 0, now) for node in nodes if node in free and node not in self._names]
        messages = [self._question(errand.node, self._timeout) for errand in errands]
        if self.server is not None:
            there = {client: node for client, node in self._there(nodes).items() if node in free}
            for one in run_configure(self.algorithm, self.server, sorted(there)):
                self._visits[one.client] += 1
                errands.append(Errand(there[one.client], one.client, self.server.round, self._visits[one.client], now))
                messages.append(self._errand_message(one, errands[-1], settings))
        if not messages:
            return
        ids = list(grid.push_messages(messages)) or [None] * len(messages)  # Flower returns nothing where messages are too large for it
        for errand, number in zip(errands, ids, strict=True):
            if number is None:
                log(WARNING, "a message to node %d could not be sent; it is tried again", errand.node)
                self._later(errand.node)
            else:
                self._out[number] = errand

    def _errand_message(self, one: Sent, errand: Errand, settings: dict[str, Any]) -> Message:
        """What a client is sent, as Flower's message."""
        own = {
            "server-round": one.round, "round": one.round, "visit": errand.visit, "seed": self.seed, "key": self._key,
            "algorithm": repr(self.algorithm),
        }  # fmt: skip
        record = message_record(one, self._current(), settings | own)
        self.traffic.sent(one.round, one.client, record)
        return Message(record, dst_node_id=errand.node, message_type="train", ttl=self._timeout)

    def _current(self) -> ArrayRecord:
        """The global model by name, made once a version."""
        assert self.server is not None
        if self._sent_version != self.server.round:
            self._sent_version, self._sent_arrays = self.server.round, self._named()
        return self._sent_arrays

    def _pull(self, grid: Grid) -> list[Message]:
        """What came, or a moment's wait; messages that are out for too long are given up.

        Raises:
            RuntimeError: no good reply came for too long.
        """
        came = list(grid.pull_messages(list(self._out))) if self._out else []
        if came:
            return came
        now = time.monotonic()
        if self.server is not None and now - self._last_good > self._timeout:
            away = sorted(errand.client for errand in self._out.values() if errand.client is not None)
            raise RuntimeError(
                f"no good reply came in {self._timeout:g} s (timeout); expected one of clients {away}, whose messages are out: see the "
                "warnings and the clients' logs, or give them more time"
            )
        for number, errand in list(self._out.items()):
            if now - errand.since > self._timeout:
                log(WARNING, "node %d has not answered in %g s; its message is given up", errand.node, self._timeout)
                del self._out[number]
        time.sleep(POLL)
        return []

    def _later(self, node: int) -> None:
        """Ask a node again, but not at once."""
        self._not_before[node] = time.monotonic() + self._retry

    # What comes back

    def _receive(self, message: Message) -> None:
        """Put a reply into the buffer if it is a good one."""
        errand = self._out.pop(message.metadata.reply_to_message_id, None)
        if errand is None:
            return
        if errand.client is None:
            self._meet(errand.node, message)
            return
        assert self.server is not None
        if message.has_error():
            log(WARNING, "training: client %d failed and is left out: %s", errand.client, message.error.reason)
            self._later(errand.node)
            return
        content = message.content
        self.traffic.came(errand.client, content)
        metrics = content.metric_records[METRICS]
        steps = int(metrics.get(STEPS, 0))  # pyright: ignore[reportArgumentType] - a number
        reply, delay = read_reply(content, errand.client), self.server.round - errand.version
        if steps and good_replies(self.algorithm, self.server, in_time(self.algorithm, [reply], [delay])):
            self._last_good = time.monotonic()
            self._buffer.append(Arrived(reply, Return(errand.client, errand.version, steps, errand.visit), metrics))
        else:
            self.left_out[errand.client] += bool(steps)
            self._later(errand.node)

    def _meet(self, node: int, reply: Message) -> None:
        """A new node says who it is; one whose model is another is left alone, and the run goes on."""
        try:
            self._hear(node, reply)
        except ValueError as error:
            log(WARNING, "node %d is left out: %s", node, error)
            self._refused.add(node)
        if node in self._silent:
            log(WARNING, "node %d does not say who it is (%s); it is asked again", node, self._silent[node])
            self._later(node)

    def _step(self) -> MetricRecord:
        """The server's update with what is in the buffer; the mean of its clients' metrics."""
        assert self.server is not None
        came, self._buffer = self._buffer, []
        version = self.server.round
        self.server = aggregated(self.algorithm, self.server, [each.reply for each in came])
        self.updates.append(Update(time.monotonic() - self._started, [each.back for each in came]))
        back = [each.back for each in came]
        log(INFO, "update %d: clients %s, steps %s, delays %s, visits %s", version + 1, [each.worker for each in back],
            [each.steps for each in back], [version - each.version for each in back], [each.visit for each in back])  # fmt: skip
        self._save()
        return aggregate_metricrecords([RecordDict({METRICS: each.metrics}) for each in came], "num-examples")

    def _remembered(self) -> dict[str, Tensor]:
        """The clients' visits, so that none draws the same batches twice."""
        return {"visits": torch.tensor(sorted(self._visits.items()), dtype=torch.int64).view(-1, 2)}

    def _recall(self, kept: dict[str, Tensor]) -> None:
        self._visits.update(dict(kept["visits"].tolist()))


def anarchic_client_app(
    model_fn: Callable[[], nn.Module],
    load_data: LoadData,
    loss_fn: Loss,
    config: AnarchicConfig,
    choose_steps: ChooseSteps,
    **keywords: Any,
) -> ClientApp:
    """The clients as a Flower ClientApp, each of which decides how much it does.

    Args:
        model_fn: makes the model.
        load_data: `load_data(context)`: the client's examples (x [n, ...], y [n, ...]).
        loss_fn: `loss_fn(output, y)`: the losses of the examples [B], or their mean.
        config: the settings, the same as the strategy's.
        choose_steps: `choose_steps(context, visit)`: how many local steps to make at the n-th visit (from 1); 0: not now, and the node is
            asked again a little later with the then current model.
        keywords: `load_test`, `buffers` (see `flower_client_app`).

    Examples:
        >>> import torch
        >>> from fewer.federated import cross_entropy
        >>> def load_data(context):
        ...     return torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])
        >>> def choose_steps(context, visit):
        ...     return 0 if context.node_config.get("battery", 1.0) < 0.2 else 10
        >>> app = anarchic_client_app(lambda: nn.Linear(2, 2), load_data, cross_entropy, AnarchicConfig(variant="cd"), choose_steps)
    """
    return flower_client_app(AnarchicAlgorithm(config), model_fn, load_data, loss_fn, choose_steps=choose_steps, **keywords)
