"""Federated training without a server: every client trains its own model and averages it with its neighbours'. Two engines.

`simulate_decentralized` runs all clients in this process; `run_peer` is one client in a process of its own, which talks to its neighbours by
`torch.distributed`. Flower is not used here: there a server stands in the middle of every message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer import meters
from fewer.checks import check_whole
from fewer.federated._shared.algorithm import Message, Reply, ServerState, Vectors, run_local
from fewer.federated._shared.checkpoint import load_checkpoint, save_checkpoint
from fewer.federated._shared.client_states import LARGE, ClientStates
from fewer.federated._shared.clients import Shards, StackedShard, client_rng
from fewer.federated._shared.flat_model import FlatModel
from fewer.federated._shared.topology import Neighbors, Topology, Weights, check_weights, metropolis, without
from fewer.files import check_new_file

DENSE = 256  # clients up to which W^Q is one dense matrix; beyond, W is sparse and applied Q times
COLUMNS = 2**24  # numbers of a block of columns that is mixed at once

ModelOf = Callable[[], nn.Module] | FlatModel


class DecentralizedAlgorithm(Protocol):
    """What a client does on its own, and how often it averages after that.

    `local(x, shard, rng, round)` gives what the client sends, and numbers ("drift" = |z - x| among them); x is [d], or [S, d] for S clients
    at once, and stays as it is.
    """

    @property
    def gossip_steps(self) -> int: ...
    def local(self, x: Tensor, shard: Any, rng: Any, round: int) -> tuple[Tensor, dict[str, Any]]: ...


@dataclass(frozen=True)
class _Alone:
    """A client's own training as `run_local` calls it, so that its chance (batches, Dropout) is what it is in `simulate`."""

    algorithm: DecentralizedAlgorithm

    def local(self, client_state: Vectors, message: Message, shard: Any, rng: Any) -> tuple[Vectors, Reply]:
        z, metrics = self.algorithm.local(message.vectors["x"], shard, rng, message.round)
        return {}, Reply(message.client, {"z": z}, metrics)


def train(algorithm: DecentralizedAlgorithm, x: Tensor, shard: Any, rng: Any, client: int, round: int) -> tuple[Tensor, dict[str, Any]]:
    """What a client (or many, stacked) makes of its model in a round: (z, numbers)."""
    alone: Any = _Alone(algorithm)
    _, reply = run_local(alone, {}, Message(client, round, {"x": x}), shard, rng)
    return reply.vectors["z"], reply.metrics


@dataclass(frozen=True)
class GossipRound:
    """What happened in a round.

    Attributes:
        round: from 1.
        clients: who was there.
        drift: the mean of |z_i - x_i| over them.
        consensus: the consensus distance after it, (1/m) sum |x_i - mean|^2 over all clients.
        gradients: gradients of batches that were computed.
        numbers_sent: by each client (4 bytes each at float32); every gossip step costs one model to every neighbour.
        seconds, cpu_seconds: of the round, `consensus` and evaluation left out; processor seconds are of this process, all its threads.
        evaluation: what `evaluate` returned, or None.
    """

    round: int
    clients: list[int]
    drift: float
    consensus: float
    gradients: int
    numbers_sent: list[int]
    seconds: float
    cpu_seconds: float
    evaluation: Any = None


@dataclass
class DecentralizedHistory:
    """A run: its rounds, and every client's model after the last one.

    Attributes:
        x: the models [m, d].
    """

    flat: FlatModel
    x: Float[Tensor, "m d"]
    rounds: list[GossipRound] = field(default_factory=list)

    def mean(self) -> Float[Tensor, "d"]:
        """The mean of all models, which no client holds: an all-reduce, or enough gossip (`consensus_steps`), would give it to them."""
        return self.x.mean(dim=0)

    def state_dict(self, client: int | None = None) -> dict[str, Tensor]:
        """The parameters of a client's model (None: of the mean) by name, for `model.load_state_dict(..., strict=False)`."""
        return self.flat.state_dict(self.mean() if client is None else self.x[client])


def simulate_decentralized(
    algorithm: DecentralizedAlgorithm,
    model_fn: ModelOf,
    shards: Shards,
    rounds: int,
    *,
    topology: Topology,
    seed: int = 0,
    executor: Literal["vmap"] | None = None,
    away: Callable[[int], Collection[int]] | None = None,
    evaluate: Callable[[Tensor, int], Any] | None = None,
    checkpoint: Path | None = None,
    tell: Callable[[GossipRound], None] | None = None,
) -> DecentralizedHistory:
    """Run all clients in this process: each trains its own model, then all average with their neighbours.

    Args:
        algorithm: a method's, such as `DecentralizedSGD` below.
        model_fn: makes the model that all start from (or a `FlatModel`, which has a loss of its own).
        shards: the examples and who holds which.
        rounds: how many in all.
        topology: who is linked to whom, such as `ring(16)`.
        seed: of every client's batches; those of round t are the same as in `simulate`.
        executor: None trains the clients one after the other, "vmap" all at once, equal within rounding (quick on small models).
        away: `away(round)`: ids of clients that are not there. They keep their models; their links are gone for that round, on both ends,
            and the others average by the Metropolis weights of what is left, even if it falls apart.
        evaluate: called with all models [m, d], which it must not change, and the round, after each.
        checkpoint: a file that the state is written into after each round, and taken up from where it exists.
        tell: called with each round when it is done.

    Memory: the m models and, while they train, what that takes; from 1 GiB of models on they lie in a mapped file, and clients are trained
    in blocks. A client whose model has NaN or infinite numbers ends the run before it is averaged into its neighbours'.

    Raises:
        ValueError: the topology has another number of clients than the shards, its weights are no gossip matrix, the model keeps
            statistics, `away` names nobody there is or everybody, or the checkpoint is of another run.
        RuntimeError: a client's training gave NaN or infinite numbers (the message names client and round).
        OSError: the checkpoint cannot be written where it is asked for.

    Examples:
        >>> from fewer.federated import LocalConfig, ring
        >>> from fewer.federated._shared.local_training import descend, metrics_of
        >>> class DecentralizedSGD:
        ...     gossip_steps = 1
        ...
        ...     def local(self, x, shard, rng, round):
        ...         z = descend(shard.start(x), shard, rng, LocalConfig(local_steps=1, batch_size=5), round)
        ...         return z, metrics_of(z, x, shard)
        >>> shards = Shards(torch.randn(40, 3), torch.arange(40) % 2, torch.arange(40).split(10))
        >>> history = simulate_decentralized(DecentralizedSGD(), lambda: nn.Linear(3, 2), shards, rounds=2, topology=ring(4))
        >>> history.x.shape, history.mean().shape, history.rounds[-1].numbers_sent
        (torch.Size([4, 8]), torch.Size([8]), [16, 16, 16, 16])
    """
    check_whole(rounds=rounds)
    check_whole(least=0, seed=seed)
    if executor not in (None, "vmap"):
        raise ValueError(f"executor is {executor!r}; expected None or 'vmap'")
    if checkpoint is not None:
        check_new_file(checkpoint, overwrite=True, option="checkpoint")
    flat, m = flat_model(model_fn), len(shards)
    if topology.clients != m:
        raise ValueError(f"{topology!r} has {topology.clients} clients and there are {m} shards; expected one each")
    start = flat.initial()
    history = DecentralizedHistory(flat, models_from(start, m))
    about = {"seed": seed, "algorithm": repr(algorithm), "topology": repr(topology)}
    done = 0
    if checkpoint is not None and Path(checkpoint).exists():
        server, kept = load_checkpoint(checkpoint, m, flat.size, **about)
        history.x.copy_(kept["x"])
        done = server.round
    step = Averaging.of(topology, 1, (), algorithm.gossip_steps, start) if topology.fixed else None
    for number in range(done + 1, rounds + 1):
        started, used = time.perf_counter(), time.process_time()
        gone = check_away(away(number), m, number) if away else []
        present = [client for client in range(m) if client not in gone]
        with meters.counting() as counts:
            drift = _train(algorithm, history.x, shards, flat, seed, number, present, executor)
        averaging = step if step and not gone else Averaging.of(topology, number, gone, algorithm.gossip_steps, start)
        averaging.apply(history.x)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
        sent = [algorithm.gossip_steps * len(beside) * flat.size for beside in averaging.neighbors]
        judged = evaluate(history.x, number) if evaluate else None
        distance = consensus_distance(history.x)
        line = GossipRound(number, present, drift, distance, int(counts["gradients"]), sent, seconds, cpu_seconds, judged)
        history.rounds.append(line)
        if checkpoint is not None:
            save_checkpoint(checkpoint, ServerState(history.mean(), m, number), {"x": history.x}, **about)
        if tell is not None:
            tell(line)
    return history


def flat_model(model_fn: ModelOf) -> FlatModel:
    """The model as one vector; ValueError where it keeps statistics, which would have to be averaged as well."""
    flat = model_fn if isinstance(model_fn, FlatModel) else FlatModel(model_fn())
    if flat.averages_buffers:
        raise ValueError("the model keeps statistics (buffers='average'), and no server averages them; expected a model without: GroupNorm")
    return flat


def models_from(start: Float[Tensor, "d"], clients: int) -> Float[Tensor, "m d"]:
    """The same model for every client; in a mapped file where they take more than 1 GiB."""
    if clients * start.nbytes <= LARGE:
        return start.expand(clients, -1).clone()
    table = ClientStates(clients, ["x"], start.numel(), start.dtype).tables["x"]
    return table.copy_(start.expand(clients, -1))


def _train(
    algorithm: DecentralizedAlgorithm, x: Tensor, shards: Shards, flat: FlatModel, seed: int, round: int, present: list[int], executor: Any
) -> float:
    """Those that are there train: their models x_i become z_i, in place. The mean drift."""
    device, drifts = next(flat.model.parameters()).device, list[float]()
    at_once = 1 if executor is None else max(1, LARGE // (4 * flat.size * flat.dtype.itemsize))
    for start in range(0, len(present), at_once):
        clients = present[start : start + at_once]
        rngs, parts = [client_rng(seed, round, client) for client in clients], [shards.shard(client, flat) for client in clients]
        who, rng, shard = (clients[0], rngs[0], parts[0]) if executor is None else (clients, rngs, StackedShard(parts))
        z, metrics = train(algorithm, x[who].to(device), shard, rng, clients[0], round)
        check_finite(z, clients, round)
        x[who] = z.to(x.device)
        drifts += metrics["drift"].reshape(-1).tolist()
    return sum(drifts) / len(drifts)


# Averaging with the neighbours


@dataclass(frozen=True)
class Averaging:
    """Q gossip steps of a round: the links, and what does X <- W^Q X on a block of columns [m, c]."""

    neighbors: Neighbors
    product: Callable[[Tensor], Tensor]
    device: torch.device

    @classmethod
    def of(cls, topology: Topology, round: int, away: Collection[int], steps: int, like: Tensor) -> Averaging:
        neighbors, weights = graph_of(topology, round, away)
        return cls(neighbors, power(weights, steps, like), like.device)

    def apply(self, models: Float[Tensor, "m d"]) -> None:
        """Every client's new model is made of the old ones alone: a block of columns is computed whole before it is written."""
        for block in models.split(max(1, COLUMNS // len(models)), dim=1):
            block.copy_(self.product(block.to(self.device)))


def graph_of(topology: Topology, round: int, away: Collection[int] = ()) -> tuple[Neighbors, Weights]:
    """The links and the gossip matrix of a round, clients that are away left out."""
    neighbors = topology.neighbors(round)
    if away:
        left = without(neighbors, away)
        return left, metropolis(left)
    weights = topology.weights(round)
    check_weights(weights, neighbors)
    return neighbors, weights


def power(weights: Weights, steps: int, like: Tensor) -> Callable[[Tensor], Tensor]:
    """X -> W^Q X, in the dtype and on the device of `like`: one dense product for few clients, Q sparse ones for many."""
    if len(weights) <= DENSE:
        w = torch.from_numpy(np.linalg.matrix_power(weights, steps)).to(like)
        return lambda block: w @ block
    sparse = torch.from_numpy(weights).to(like).to_sparse()

    def repeated(block: Tensor) -> Tensor:
        for _ in range(steps):
            block = torch.sparse.mm(sparse, block)
        return block

    return repeated


def consensus_distance(models: Float[Tensor, "m d"]) -> float:
    """(1/m) sum over clients of |x_i - mean|^2.

    Examples:
        >>> consensus_distance(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        1.0
    """
    blocks = models.split(max(1, COLUMNS // len(models)), dim=1)
    return sum(float((block - block.mean(dim=0)).square_().sum(dtype=torch.float64)) for block in blocks) / len(models)


# What is refused


def check_finite(z: Tensor, clients: Sequence[int], round: int) -> None:
    """RuntimeError where a model has NaN or infinite numbers: one gossip step would poison the neighbours'."""
    bad = (~z.isfinite().reshape(len(clients), -1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise RuntimeError(
            f"client {clients[bad[0]]} came out of round {round} with NaN or infinite numbers, before it was averaged into its neighbours'; "
            "expected finite ones: a smaller lr, or data without NaN"
        )


def check_away(away: Collection[int], clients: int, round: int) -> list[int]:
    """Who is away in a round, each once; ValueError where somebody is not there at all, or nobody is left."""
    gone = sorted({int(client) for client in away})
    if gone and (gone[0] < 0 or gone[-1] >= clients):
        odd = gone[0] if gone[0] < 0 else gone[-1]
        raise ValueError(f"away({round}) names client {odd}; expected some of 0 to {clients - 1}")
    if len(gone) == clients:
        raise ValueError(f"away({round}) names all {clients} clients; expected at least one that stays")
    return gone
