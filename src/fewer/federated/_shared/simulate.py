"""The in-process engine: an algorithm run over many clients in this process, one after the other, in threads, or all of a round at once."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fewer import meters
from fewer.checks import check_whole
from fewer.federated._shared.algorithm import (
    BUFFERS,
    Algorithm,
    Message,
    Reply,
    ServerState,
    Vectors,
    lengths_of,
    run_aggregate,
    run_configure,
    run_local,
    stacked,
)
from fewer.federated._shared.black_box import BlackBoxes, Point
from fewer.federated._shared.checkpoint import load_checkpoint, save_checkpoint
from fewer.federated._shared.client_states import ClientStates
from fewer.federated._shared.clients import Shards, StackedShard, client_rng
from fewer.federated._shared.flat_model import FlatModel, Loss, cross_entropy
from fewer.federated._shared.sampling import Sampler, choose
from fewer.files import check_new_file


@dataclass(frozen=True)
class Round:
    """What happened in a round.

    Attributes:
        round: from 1.
        clients: who took part.
        drift: the mean of |y_i - x| over them, replies with NaN or infinite numbers left out.
        gradients: gradients of batches that were computed.
        numbers_down, numbers_up: numbers sent to and by all clients (4 bytes each at float32; see `traffic` for the wire).
        seconds, cpu_seconds: of the round, evaluation left out; processor seconds are of this process, all its threads.
        evaluation: what `evaluate` returned, or None.
        counts: all that was counted in it ("gradients", "queries", ...; see `meters.count`).
        metrics: the means of what else the same replies told, such as "value" or "epsilon".
    """

    round: int
    clients: list[int]
    drift: float
    gradients: int
    numbers_down: int
    numbers_up: int
    seconds: float
    cpu_seconds: float
    evaluation: Any = None
    counts: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class History:
    """A run: its rounds, and the state of server and clients after the last one."""

    flat: FlatModel
    server: ServerState
    client_states: ClientStates
    rounds: list[Round] = field(default_factory=list)

    def state_dict(self) -> dict[str, Tensor]:
        """The global model's parameters by name, tied ones by each, for `model.load_state_dict(..., strict=False)`."""
        return self.flat.state_dict(self.server.x)


def simulate(
    algorithm: Algorithm,
    model_fn: Callable[[], nn.Module] | FlatModel | Point,
    shards: Shards | BlackBoxes,
    rounds: int,
    *,
    sampler: Sampler,
    seed: int = 0,
    executor: Executor | Literal["vmap"] | None = None,
    loss_fn: Loss = cross_entropy,
    buffers: Literal["average"] | None = None,
    evaluate: Callable[[Tensor], Any] | None = None,
    checkpoint: Path | None = None,
    tell: Callable[[Round], None] | None = None,
) -> History:
    """Run a federated algorithm in this process.

    Args:
        algorithm: its three functions, such as `FedSpeedAlgorithm(config)`.
        model_fn: makes the model whose parameters are the start (or a `FlatModel`, or the `Point` where black boxes are searched from).
        shards: the examples and who holds which; or the clients' black boxes.
        rounds: how many in all.
        sampler: who takes part, such as `Independent(0.1)`.
        seed: of sampling and of every client's batches.
        executor: None trains the clients of a round one after the other; a `concurrent.futures` pool of threads some at a time (Dropout
            then draws from one stream for all, so that no two runs are alike); "vmap" all at once, equal within rounding (quick on small
            models; Dropout draws other numbers then).
        loss_fn: the losses of the examples [B] (see `FlatModel`).
        buffers: "average" for models with BatchNorm.
        evaluate: called with the global parameters [d] after each round.
        checkpoint: a file that the state is written into after each round, and taken up from where it exists.
        tell: called with each round when it is done.

    Raises:
        ValueError: the model has statistics and `buffers` is unset, no reply of a round is good, the sampler chose nobody, the executor
            is none, or the checkpoint is of another number of clients, seed or algorithm.
        OSError: the checkpoint cannot be written where it is asked for.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from fewer.federated import FedSpeedAlgorithm, FedSpeedConfig, Independent, Shards
        >>> shards = Shards(torch.randn(40, 3), torch.arange(40) % 2, torch.arange(40).split(10))
        >>> algorithm = FedSpeedAlgorithm(FedSpeedConfig(local_epochs=1, batch_size=5))
        >>> history = simulate(algorithm, lambda: nn.Linear(3, 2), shards, rounds=2, sampler=Independent(0.5))
        >>> [each.round for each in history.rounds]
        [1, 2]
    """
    check_whole(rounds=rounds)
    check_whole(least=0, seed=seed)
    if not (executor is None or executor == "vmap" or hasattr(executor, "submit")):
        raise ValueError(f"executor is {executor!r}; expected None, 'vmap' or a concurrent.futures pool such as ThreadPoolExecutor(4)")
    if executor == "vmap" and isinstance(model_fn, Point):
        raise ValueError("executor is 'vmap' with black boxes, which nobody can differentiate or stack; expected None or a pool of threads")
    about = {"seed": seed, "algorithm": repr(algorithm)}
    history, _ = begin(algorithm, model_fn, shards, loss_fn, buffers, checkpoint, about)
    flat, states = history.flat, history.client_states
    for number in range(history.server.round + 1, rounds + 1):
        started, used = time.perf_counter(), time.process_time()
        chosen = choose(sampler, range(len(shards)), number, seed)
        messages = run_configure(algorithm, history.server, chosen)
        with meters.counting() as counts:
            replies = train(algorithm, messages, shards, flat, states, seed, executor)
        history.server = run_aggregate(algorithm, history.server, replies)
        line = told(number, messages, replies, counts, started, used)
        if evaluate is not None:
            line = replace(line, evaluation=evaluate(history.server.x))
        history.rounds.append(line)
        if checkpoint is not None:
            save_checkpoint(checkpoint, history.server, states.tables, **about)
        if tell is not None:
            tell(line)
    return history


def begin(
    algorithm: Algorithm,
    model_fn: Callable[[], nn.Module] | FlatModel | Point,
    shards: Shards | BlackBoxes,
    loss_fn: Loss,
    buffers: Literal["average"] | None,
    checkpoint: Path | None,
    about: dict[str, Any],
) -> tuple[History, Vectors]:
    """A run before its next round: new, or as the checkpoint holds it, with all the tensors that were kept there."""
    if checkpoint is not None:
        check_new_file(checkpoint, overwrite=True, option="checkpoint")
    flat: Any = model_fn if isinstance(model_fn, FlatModel | Point) else FlatModel(model_fn(), loss_fn, buffers)
    server, kept = algorithm.initial(flat.initial(), len(shards)), {}
    if flat.averages_buffers:
        server.vectors[BUFFERS] = flat.initial_buffers()
    states = ClientStates(
        len(shards),
        algorithm.keeps,
        flat.size,
        flat.dtype,
        device=server.x.device,
        lengths=lengths_of(algorithm, algorithm.keeps, flat.size),
    )
    if checkpoint is not None and Path(checkpoint).exists():
        server, kept = load_checkpoint(checkpoint, len(shards), flat.size, **about)
        states.put(list(range(len(shards))), kept)
    return History(flat, server, states), kept


def told(number: int, messages: Sequence[Message], replies: Sequence[Reply], counts: Counter[str], started: float, used: float) -> Round:
    """What happened in a round that began at these readings of the clock and of the processor's clock."""
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    good = [reply for reply in replies if all(vector.isfinite().all() for vector in reply.vectors.values())] or replies
    drift = sum(float(reply.metrics["drift"]) for reply in good) / len(good)
    numbers_down, numbers_up = (sum(v.numel() for each in all_ for v in each.vectors.values()) for all_ in (messages, replies))
    clients, gradients = [each.client for each in messages], int(counts["gradients"])
    further = {name for reply in good for name in reply.metrics} - {"examples", "drift"}
    metrics = {name: float(np.mean([float(reply.metrics[name]) for reply in good if name in reply.metrics])) for name in sorted(further)}
    return Round(number, clients, drift, gradients, numbers_down, numbers_up, seconds, cpu_seconds, None, dict(counts), metrics)


def train(
    algorithm: Algorithm,
    messages: Sequence[Message],
    shards: Shards | BlackBoxes,
    flat: FlatModel,
    states: ClientStates,
    seed: int,
    executor: Executor | Literal["vmap"] | None,
) -> list[Reply]:
    """The replies of a round; clients' states are kept."""

    def one(message: Message) -> tuple[Vectors, Reply]:
        rng = client_rng(seed, message.draw, message.client)
        return run_local(algorithm, states.get(message.client), message, shards.shard(message.client, flat, message.steps), rng)

    if executor == "vmap":
        return _train_at_once(algorithm, messages, shards, flat, states, seed)
    if executor is None:
        done = [one(message) for message in messages]
    else:
        done = []
        with torch.random.fork_rng(devices=[]):  # each client forks as well, but threads do not take turns at it
            for future in as_completed([executor.submit(_counted, one, message) for message in messages]):
                pair, counts = future.result()
                for name, count in counts.items():
                    meters.count(name, count)  # a pool's threads do not see the counters that are open here
                done.append(pair)
    for state, reply in done:
        states.put(reply.client, state)
    return [reply for _, reply in done]


def _counted(train: Callable[[Message], Any], message: Message) -> tuple[Any, Counter[str]]:
    """What `train` returns, and what was counted meanwhile."""
    with meters.counting() as counts:
        return train(message), counts


def _train_at_once(
    algorithm: Algorithm, messages: Sequence[Message], shards: Any, flat: FlatModel, states: ClientStates, seed: int
) -> list[Reply]:
    """The same, all clients' vectors stacked [S, d]."""
    clients = [message.client for message in messages]
    stack = StackedShard([shards.shard(message.client, flat, message.steps) for message in messages])
    rngs = [client_rng(seed, message.draw, message.client) for message in messages]
    state, reply = run_local(algorithm, states.get(clients), stacked(messages), stack, rngs)
    states.put(clients, state)
    return [
        Reply(client, {name: rows[row] for name, rows in reply.vectors.items()}, {name: rows[row] for name, rows in reply.metrics.items()})
        for row, client in enumerate(clients)
    ]
