"""A federated algorithm as three pure functions on flat vectors, and what travels between them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
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
    """What a client is sent.

    Attributes:
        client: its id.
        round: from 1; where updates come at any time, the version of the model that it fetches plus one. The learning rate follows it.
        vectors: by name, "x" the global parameters.
        steps: how many local steps it makes; None: as the algorithm's settings say.
        visit: its how manieth participation this is (from 1), where batches are drawn by visits; None: by rounds.
    """

    client: int
    round: int
    vectors: Vectors
    steps: int | None = None
    visit: int | None = None

    @property
    def draw(self) -> int:
        """What the client's batches depend on, beside seed and client."""
        return self.round if self.visit is None else self.visit


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

    Two more attributes may be there (see `lengths_of`, `optional_of`): `lengths`, name -> length of a vector that is not of the model's
    size, or a function of the model's size that gives such a mapping; `optional`, names of vectors that a reply may lack.
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


def lengths_of(algorithm: Algorithm, names: Sequence[str], size: int) -> dict[str, int]:
    """How long each vector is: as long as the model, unless the algorithm says otherwise."""
    given: Any = getattr(algorithm, "lengths", {})
    lengths = given if isinstance(given, Mapping) else given(size)
    return {name: lengths.get(name, size) for name in names}


def optional_of(algorithm: Algorithm) -> tuple[str, ...]:
    """Names of the vectors that a reply may lack."""
    return getattr(algorithm, "optional", ())


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
        seed_layers(drawn[0])
        if flat.averages_buffers:
            flat.load_buffers(None, message.vectors[BUFFERS])
        kept, reply = algorithm.local(state, message, shard, rng)
        if flat.averages_buffers:
            reply = replace(reply, vectors=reply.vectors | {BUFFERS: flat.buffers()})
    return finite_or_before(kept, state), reply


def seed_layers(seed: int) -> None:
    """Seed what a layer such as Dropout draws. (`torch.manual_seed` also notes it for devices that were not used yet, which takes longer
    than a small model's gradient.)"""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


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


def stacked(messages: Sequence[Message]) -> Message:
    """Messages to many clients as one: vectors [S, d] where the clients are sent unlike ones, the round [S, 1] where they fetched unlike
    versions. (How many steps each makes, its shard says.)"""
    first, rounds = messages[0], [each.round for each in messages]
    vectors = {
        name: vector if all(each.vectors[name] is vector for each in messages) else torch.stack([each.vectors[name] for each in messages])
        for name, vector in first.vectors.items()
    }
    x = first.vectors["x"]
    round: Any = rounds[0] if len(set(rounds)) == 1 else torch.tensor(rounds, dtype=x.dtype, device=x.device)[:, None]
    return replace(first, round=round, vectors=vectors)


def run_aggregate(algorithm: Algorithm, server: ServerState, replies: Sequence[Reply]) -> ServerState:
    """The server's next state from the replies that are good.

    Raises:
        ValueError: none is.
    """
    good = good_replies(algorithm, server, replies)
    if not good:
        raise ValueError(
            f"round {server.round + 1}: no good reply of {len(replies)} (see the warnings); expected one at least: a smaller lr, or data without NaN"
        )
    return aggregated(algorithm, server, good)


def aggregated(algorithm: Algorithm, server: ServerState, good: Sequence[Reply]) -> ServerState:
    """The server's next state from replies that were looked at, statistics averaged where it holds some."""
    after = replace(algorithm.aggregate(server, good), round=server.round + 1)
    if BUFFERS in server.vectors:
        after = replace(after, vectors=after.vectors | {BUFFERS: mean_of(good, BUFFERS)})
    return after


def good_replies(algorithm: Algorithm, server: ServerState, replies: Sequence[Reply]) -> list[Reply]:
    """The replies that nothing is wrong with; of each other one a warning tells what."""
    return [reply for reply in replies if not (fault := fault_of(algorithm, server, reply)) or _told(reply, fault)]


def fault_of(algorithm: Algorithm, server: ServerState, reply: Reply) -> str:
    """What is wrong with a reply, in words; empty where nothing is."""
    lengths = lengths_of(algorithm, algorithm.sends, server.x.numel())
    if BUFFERS in server.vectors:
        lengths[BUFFERS] = server.vectors[BUFFERS].numel()
    optional = optional_of(algorithm)
    for name, length in lengths.items():
        vector = reply.vectors.get(name)
        if vector is None:
            if name in optional:
                continue
            return f"no vector {name!r} (it has {', '.join(reply.vectors) or 'none'})"
        if vector.shape != (length,):
            return f"{name!r} of shape {tuple(vector.shape)}; expected {(length,)}"
        if not torch.isfinite(vector).all():
            return f"{name!r} with NaN or infinite numbers"
    return ""


def _told(reply: Reply, fault: str) -> bool:
    """Warn of a bad reply; false, so that it is left out."""
    warnings.warn(f"client {reply.client} sent {fault}; its reply is left out of this round", stacklevel=5)
    return False
