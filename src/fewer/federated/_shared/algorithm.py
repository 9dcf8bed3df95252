"""A federated algorithm as three pure functions on flat vectors, and what travels between them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.federated._shared.flat_model import FlatModel

Vectors = dict[str, Tensor]
BUFFERS = "buffers"  # statistics that the server averages, beside what the algorithm sends


@dataclass(frozen=True)
class ServerState:
    """What the server holds.

    Attributes:
        x: the global parameters [d].
        clients: how many clients there are in all.
        round: rounds done.
        vectors: what the algorithm keeps beside x, by name.
    """

    x: Float[Tensor, "d"]
    clients: int
    round: int = 0
    vectors: Vectors = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """What a client is sent: the round (from 1) and vectors by name, "x" the global parameters."""

    client: int
    round: int
    vectors: Vectors


@dataclass(frozen=True)
class Reply:
    """What a client sends back: vectors and numbers by name ("examples", and "drift" = |y - x|)."""

    client: int
    vectors: Vectors
    metrics: dict[str, Any]


class Algorithm(Protocol):
    """Three pure functions. `local` must work on vectors [d] and on stacked ones [S, d] alike; see `local_training`.

    Attributes:
        keeps: names of the vectors that a client keeps between rounds, each of the model's size, zeros at first.
        receives: names of the vectors in a message.
        sends: names of the vectors in a reply.
    """

    @property
    def keeps(self) -> tuple[str, ...]: ...
    @property
    def receives(self) -> tuple[str, ...]: ...
    @property
    def sends(self) -> tuple[str, ...]: ...

    def initial(self, x: Tensor, clients: int) -> ServerState: ...
    def configure(self, server: ServerState, client_ids: Sequence[int], round: int) -> list[Message]: ...
    def local(self, client_state: Vectors, message: Message, shard: Any, rng: Any) -> tuple[Vectors, Reply]: ...
    def aggregate(self, server: ServerState, replies: Sequence[Reply]) -> ServerState: ...


def mean_of(replies: Sequence[Reply], name: str, weighted: bool = False) -> Tensor:
    """The mean of a vector over replies, each alike or by its number of examples; summed in the order of client ids, so that it does not
    depend on who answered first."""
    weights = [float(reply.metrics["examples"]) if weighted else 1.0 for reply in replies]
    total = torch.zeros_like(replies[0].vectors[name])
    for _, reply, weight in sorted(zip(range(len(replies)), replies, weights, strict=True), key=lambda each: each[1].client):
        total.add_(reply.vectors[name], alpha=weight)
    return total.div_(sum(weights))


def run_local(algorithm: Algorithm, state: Vectors, message: Message, shard: Any, rng: Any) -> tuple[Vectors, Reply]:
    """One client's round, whatever the engine: the algorithm's `local`, statistics carried along where the model has some."""
    flat: FlatModel = shard.flat
    drawn = [int(each.integers(2**62)) for each in (rng if isinstance(rng, Sequence) else [rng])]  # one of each client's, in either engine
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(drawn[0])  # what a layer such as Dropout draws
        if flat.averages_buffers:
            flat.load_buffers(None, message.vectors[BUFFERS])
        kept, reply = algorithm.local(state, message, shard, rng)
        if flat.averages_buffers:
            reply = replace(reply, vectors=reply.vectors | {BUFFERS: flat.buffers()})
    return finite_or_before(kept, state), reply


def finite_or_before(kept: Vectors, before: Vectors) -> Vectors:
    """What a client keeps, or what it kept before where a number is not finite: the server leaves such a reply out, and the client must
    not carry it into every round to come. Clients that are stacked are told apart."""
    if not kept:
        return kept
    good = torch.stack([vector.isfinite().all(dim=-1, keepdim=True) for vector in kept.values()]).all(dim=0)
    return {name: torch.where(good, vector, before[name]) for name, vector in kept.items()}


def run_configure(algorithm: Algorithm, server: ServerState, clients: Sequence[int]) -> list[Message]:
    """The messages of the next round, statistics added where the server holds some."""
    messages = algorithm.configure(server, clients, server.round + 1)
    if BUFFERS not in server.vectors:
        return messages
    return [replace(message, vectors=message.vectors | {BUFFERS: server.vectors[BUFFERS]}) for message in messages]


def run_aggregate(algorithm: Algorithm, server: ServerState, replies: Sequence[Reply]) -> ServerState:
    """The server's next state from the replies that are good.

    Raises:
        ValueError: none is.
    """
    good = [reply for reply in replies if not (fault := fault_of(algorithm, server, reply)) or _told(reply, fault)]
    if not good:
        raise ValueError(
            f"round {server.round + 1}: no good reply of {len(replies)} (see the warnings); expected one at least: a smaller lr, or data without NaN"
        )
    after = replace(algorithm.aggregate(server, good), round=server.round + 1)
    if BUFFERS in server.vectors:
        after = replace(after, vectors=after.vectors | {BUFFERS: mean_of(good, BUFFERS)})
    return after


def fault_of(algorithm: Algorithm, server: ServerState, reply: Reply) -> str:
    """What is wrong with a reply, in words; empty where nothing is."""
    names = [*algorithm.sends, *([BUFFERS] if BUFFERS in server.vectors else [])]
    for name in names:
        vector, like = reply.vectors.get(name), server.vectors[BUFFERS] if name == BUFFERS else server.x
        if vector is None:
            return f"no vector {name!r} (it has {', '.join(reply.vectors) or 'none'})"
        if vector.shape != like.shape:
            return f"{name!r} of shape {tuple(vector.shape)}; expected {tuple(like.shape)}"
        if not torch.isfinite(vector).all():
            return f"{name!r} with NaN or infinite numbers"
    return ""


def _told(reply: Reply, fault: str) -> bool:
    """Warn of a bad reply; false, so that it is left out."""
    warnings.warn(f"client {reply.client} sent {fault}; its reply is left out of this round", stacklevel=4)
    return False
