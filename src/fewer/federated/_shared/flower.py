"""The same algorithms as Flower apps: here the strategy of the ServerApp, for simulation and for SuperLink and SuperNodes.

The server asks each new node for its client's name (see `flower_clients`), so that sampling and batches are those of `simulate` with the
same seed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor

from fewer.checks import check_positive, check_whole
from fewer.federated._shared.algorithm import (
    BUFFERS,
    Algorithm,
    ServerState,
    fault_of,
    run_aggregate,
    run_configure,
)
from fewer.federated._shared.checkpoint import load_checkpoint, save_checkpoint
from fewer.federated._shared.flower_clients import AGREE
from fewer.federated._shared.flower_records import (
    ARRAYS,
    CONFIG,
    METRICS,
    Layout,
    message_record,
    read_reply,
)
from fewer.federated._shared.sampling import Independent, Sampler, check_fraction, choose
from fewer.federated._shared.traffic import Traffic
from fewer.files import check_new_file

log = getLogger("flwr").log
ASK = "query.who"
POLL = 0.2  # seconds between looks at who is there
PATIENCE = 120.0  # seconds that a new node has to say who it is: it may be starting, and imports torch first
ASKED = 3  # times that nodes are asked in one round while too few are known


class FlowerStrategy(Strategy):
    """A federated algorithm as a Flower strategy.

    Args:
        algorithm: its three functions, such as `FedSpeedAlgorithm(config)`.
        fraction_train: each client takes part in a round with this probability (redrawn if none does).
        fraction_evaluate: the same for evaluation; 0 leaves evaluation out.
        min_available_nodes: the strategy waits until so many nodes are there.
        seed: of sampling and of every client's batches.
        sampler: who takes part, in place of `fraction_train`.
        clients: how many clients there are in all; those that are there in the first round by default.
        checkpoint: a file that the server's state is written into after each round, and taken up from where it exists.
        patience: seconds that a new node has to say who it is, whatever the rounds' own `timeout`.

    Attributes:
        traffic: bytes of every round and client.
        server: the server's state, from the first round on.

    Raises:
        ValueError: a fraction is out of its range, or (when started) the clients' models differ.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        fraction_train: float = 0.1,
        fraction_evaluate: float = 1.0,
        min_available_nodes: int = 2,
        *,
        seed: int = 0,
        sampler: Sampler | None = None,
        clients: int | None = None,
        checkpoint: Path | None = None,
        patience: float = PATIENCE,
    ) -> None:
        check_positive(patience=patience)
        check_whole(min_available_nodes=min_available_nodes, optional=["clients"], clients=clients)
        check_whole(least=0, seed=seed)
        if fraction_evaluate:
            check_fraction(fraction_evaluate)
        self.algorithm, self.seed, self.clients, self.checkpoint = algorithm, seed, clients, checkpoint
        self.fraction_train, self.fraction_evaluate, self.min_available_nodes = fraction_train, fraction_evaluate, min_available_nodes
        self.sampler: Sampler = sampler or Independent(fraction_train)
        self.traffic = Traffic()
        self.server: ServerState | None = None
        self._key = uuid.uuid4().hex  # which federation a client's kept state belongs to
        self._names: dict[int, int] = {}  # node -> client
        self._patience = patience
        self._silent: dict[int, str] = {}  # node -> why it has not said who it is
        self._layout: Layout | None = None
        self._words: dict[str, str] | None = None  # what the clients' apps say that must agree
        self._told: set[tuple[int, int]] = set()
        self._asked: list[int] = []  # who was sent this round's messages
        self._arrays = ArrayRecord()
        self._timeout = 3600.0

    def summary(self) -> None:
        """Log what the strategy is set to."""
        log(INFO, "\t├──> %s", self.algorithm)
        log(INFO, "\t├──> Fraction: train (%.2f) | evaluate (%.2f)", self.fraction_train, self.fraction_evaluate)
        log(INFO, "\t└──> Seed: %d, minimum available nodes: %d", self.seed, self.min_available_nodes)

    def start(self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, timeout: float = 3600, **keywords: Any) -> Result:
        """Run `num_rounds` rounds from `ArrayRecord(model.state_dict())`; see Flower's own `Strategy.start` for the other arguments.

        A node that does not answer a round's message within `timeout` seconds is left out of the round.
        """
        self._timeout = timeout
        if self.checkpoint is not None:
            check_new_file(self.checkpoint, overwrite=True, option="checkpoint")
        result = super().start(grid, initial_arrays, num_rounds, timeout, **keywords)
        log(INFO, "Bytes on the wire: %d down, %d up", *self.traffic.total())
        return result

    # Who is there

    def _wait(self, grid: Grid) -> list[int]:
        """The nodes that are there, at least `min_available_nodes` of them."""
        while len(nodes := sorted(grid.get_node_ids())) < self.min_available_nodes:
            log(INFO, "Waiting for nodes to connect: %d connected (minimum required: %d).", len(nodes), self.min_available_nodes)
            time.sleep(POLL)
        return nodes

    def _clients(self, grid: Grid) -> dict[int, int]:
        """client -> node of those that are there; nodes that have not said who they are are asked, again where too few have."""
        nodes, known = self._wait(grid), []
        for _ in range(ASKED):
            if unknown := [node for node in nodes if node not in self._names]:
                enough = len(nodes) - len(unknown) >= self.min_available_nodes
                self._ask(grid, unknown, self._timeout if enough and self._silent.keys() >= set(unknown) else self._patience)
            known = [node for node in nodes if node in self._names]
            if len(known) >= self.min_available_nodes:
                break
            nodes = self._wait(grid)
        else:
            reasons = "; ".join(f"node {node}: {reason}" for node, reason in self._silent.items() if node in nodes)
            raise RuntimeError(
                f"{len(known)} of {len(nodes)} nodes say who they are; expected at least {self.min_available_nodes} "
                f"(min_available_nodes), each running a ClientApp made by flower_client_app or one that answers {ASK!r} so. {reasons}"
            )
        return self._by_client(known)

    def _by_client(self, known: Iterable[int]) -> dict[int, int]:
        """client -> node of nodes that have said who they are; of two that say the same the later one."""
        found: dict[int, int] = {}
        for node in sorted(known, key=list(self._names).index):  # in the order in which they came
            client = self._names[node]
            if client in found and (client, node) not in self._told:
                self._told.add((client, node))
                log(WARNING, "nodes %d and %d both say that they are client %d; the later one is taken (a SuperNode that was started "
                    "again; if not, give each a partition-id of its own: --node-config 'partition-id=...')", found[client], node, client)  # fmt: skip
            found[client] = node
        return found

    def _ask(self, grid: Grid, nodes: list[int], patience: float) -> None:
        """Ask nodes who they are and wait so many seconds: new ones get patience, silent ones do not hold up every round of the others."""
        self._silent.update(dict.fromkeys(nodes, f"no answer in {patience:g} s"))
        for reply in grid.send_and_receive([self._question(node) for node in nodes], timeout=patience):
            self._hear(reply.metadata.src_node_id, reply)
        for node in nodes:
            if node in self._silent:
                log(WARNING, "node %d does not say who it is (%s); it is asked again", node, self._silent[node])

    def _question(self, node: int, ttl: float | None = None) -> Message:
        """Who are you?"""
        return Message(RecordDict({CONFIG: ConfigRecord({"key": self._key})}), dst_node_id=node, message_type=ASK, ttl=ttl)

    def _hear(self, node: int, reply: Message) -> None:
        """Take a node's answer who it is, or why it gives none.

        Raises:
            ValueError: its model is another than the others'.
        """
        if reply.has_error():
            self._silent[node] = str(reply.error.reason)
            return
        self._silent.pop(node, None)
        who = reply.content.config_records[CONFIG]
        layout = Layout.read(who)
        if self._layout is not None and layout != self._layout:
            raise ValueError(
                f"client {who['client']} trains {len(layout.parameters)} parameters ({', '.join(layout.parameters)}), others "
                f"{len(self._layout.parameters)} ({', '.join(self._layout.parameters)}); expected the same model_fn for all"
            )
        words = read_words(who)
        if self._words is not None and words != self._words:
            raise ValueError(f"client {who['client']} {unlike(words, self._words)}; expected the same of all clients")
        self._layout, self._words = layout, words
        self._names[node] = int(who["client"])  # pyright: ignore[reportArgumentType] - an int

    # Training

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Messages to the clients of the next round."""
        found = self._clients(grid)
        assert self._layout is not None
        self._take(arrays, len(found))
        assert self.server is not None
        number = self.server.round + 1
        chosen = choose(self.sampler, found, number, self.seed)
        log(INFO, "configure_train: round %d, clients %s (out of %d)", number, chosen, len(found))
        self._asked = chosen
        settings = dict(config) | {
            "server-round": server_round, "round": number, "seed": self.seed, "key": self._key, "algorithm": repr(self.algorithm),
        }  # fmt: skip
        named = self._named()
        messages = []
        for message in run_configure(self.algorithm, self.server, chosen):
            record = message_record(message, named, settings)
            self.traffic.sent(number, message.client, record)
            messages.append(Message(record, dst_node_id=found[message.client], message_type="train"))
        return messages

    def _take(self, arrays: ArrayRecord, there: int) -> None:
        """Take the arrays as the global model; in the first round make the server's state, or read it from the checkpoint."""
        assert self._layout is not None
        vectors = self._layout.vectors(arrays)
        self._arrays = arrays
        if self.server is not None:
            self.server = replace(self.server, x=vectors["x"])
        elif self.checkpoint is not None and Path(self.checkpoint).exists():
            state, kept = load_checkpoint(
                self.checkpoint, self.clients or there, vectors["x"].numel(), seed=self.seed, algorithm=repr(self.algorithm)
            )
            self.server, self._key = state, bytes(kept["key"].tolist()).decode()
            self._recall(kept)
        else:
            self.server = self.algorithm.initial(vectors["x"], self.clients or there)
            self.server.vectors.update({BUFFERS: vectors[BUFFERS]} if BUFFERS in vectors else {})

    def _named(self) -> ArrayRecord:
        """The global model by name."""
        assert self.server is not None
        assert self._layout is not None
        return self._layout.arrays(self.server.x, self.server.vectors.get(BUFFERS), self._arrays)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next global model; where no reply is good, with a warning, the one that there was (Flower itself would go on with what it was
        started with, which after a resume is older), and no metrics."""
        assert self.server is not None
        good = self._answered(replies, "training")
        if late := [client for client in self._asked if client not in good]:
            log(WARNING, "round %d: no good answer from %s in %g s; it goes on with %d of %d clients",
                self.server.round + 1, late, self._timeout, len(good), len(self._asked))  # fmt: skip
        read = [read_reply(content, client) for client, content in good.items()]
        for client, content in good.items():
            self.traffic.came(client, content)
        counted = [reply.client for reply in read if not fault_of(self.algorithm, self.server, reply)]
        try:
            self.server = run_aggregate(self.algorithm, self.server, read)
        except ValueError as error:
            log(WARNING, "%s; the model stays as it is", error)
            self.server = replace(self.server, round=self.server.round + 1)
            return self._named(), None
        finally:
            self._save()
        return self._named(), aggregate_metricrecords(
            [RecordDict({METRICS: good[client].metric_records[METRICS]}) for client in counted], "num-examples"
        )

    def _answered(self, replies: Iterable[Message], what: str) -> dict[int, RecordDict]:
        """client -> content of the replies that came without an error, the others told."""
        good = {}
        for reply in replies:
            client = self._names.get(reply.metadata.src_node_id, reply.metadata.src_node_id)
            if reply.has_error():
                log(WARNING, "%s: client %s failed and is left out: %s", what, client, reply.error.reason)
            else:
                good[client] = reply.content
        return dict(sorted(good.items()))

    def _save(self) -> None:
        if self.checkpoint is not None and self.server is not None:
            key = torch.tensor(list(self._key.encode()), dtype=torch.uint8)
            kept = {"key": key} | self._remembered()
            save_checkpoint(self.checkpoint, self.server, kept, seed=self.seed, algorithm=repr(self.algorithm))

    def _remembered(self) -> dict[str, Tensor]:
        """What a strategy has in its checkpoint beside the server's state."""
        return {}

    def _recall(self, kept: dict[str, Tensor]) -> None:
        """Take it up again."""

    # Evaluation

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Messages to the clients that evaluate the global model."""
        if not self.fraction_evaluate:
            return []
        found = self._clients(grid)
        record = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord(dict(config) | {"server-round": server_round})})
        chosen = Independent(self.fraction_evaluate)(list(found), server_round, self.seed)
        return [Message(record, dst_node_id=found[client], message_type="evaluate") for client in chosen]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The clients' metrics, weighed by their examples; None where none of them has any."""
        good = self._answered(replies, "evaluation").values()
        some = [each for each in good if next(iter(each.metric_records.values()))["num-examples"]]
        return aggregate_metricrecords(some, "num-examples") if some else None


def read_words(who: Mapping[str, Any]) -> dict[str, str]:
    """What a client says that must agree, in its order."""
    lines = filter(None, str(who.get(AGREE, "")).split("\n"))
    return {name: said for name, _, said in (line.partition("\t") for line in lines)}


def unlike(words: Mapping[str, str], others: Mapping[str, str]) -> str:
    """The first two words that differ, in words: a summary comes first, then what it is of."""
    names = [name for name in {**words, **others} if words.get(name) != others.get(name)]
    return " and ".join(f"says {name} {words.get(name, 'nothing')!r}, others {others.get(name, 'nothing')!r}" for name in names[:2])
