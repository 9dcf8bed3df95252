"""What `local` sees of its client: its examples in batches, and the gradient of its loss; one client, or many of them stacked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fewer import meters
from fewer.federated._shared.flat_model import FlatModel

SAMPLING, TRAINING, PACE = 0, 1, 2  # what a random stream is for


def sampling_rng(seed: int, round: int) -> np.random.Generator:
    """The random numbers that choose a round's clients."""
    return np.random.default_rng([seed, SAMPLING, round])


def client_rng(seed: int, round: int, client: int) -> np.random.Generator:
    """A client's random numbers in a round; they depend on nothing else, so not on who finishes first."""
    return np.random.default_rng([seed, TRAINING, round, client])


def pace_rng(seed: int, visit: int, client: int) -> np.random.Generator:
    """The random numbers that say how many local steps a client makes at a visit."""
    return np.random.default_rng([seed, PACE, visit, client])


class Shards:
    """Labelled examples and who holds which.

    Args:
        x: examples [N, ...].
        y: labels [N, ...].
        parts: an index array a client (see `partition`); client ids are 0, 1, ...

    Raises:
        ValueError: a part is empty, reaches beyond the examples, or shares an example with another (the message names the client).

    Examples:
        >>> shards = Shards(torch.zeros(4, 2), torch.zeros(4), [[0, 1], [2, 3]])
        >>> len(shards), shards.parts[1]
        (2, tensor([2, 3]))
    """

    def __init__(self, x: Tensor, y: Tensor, parts: Sequence[Any]) -> None:
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} rows and y {len(y)}; expected a label an example")
        if not len(parts):
            raise ValueError("no shards were given; expected an index array a client")
        holder = torch.full((len(x),), -1)
        self.x, self.y, self.parts = x, y, [torch.as_tensor(np.asarray(part, dtype=np.int64)) for part in parts]
        for client, part in enumerate(self.parts):
            if not len(part):
                raise ValueError(f"the shard of client {client} is empty; expected at least one example: leave the client out")
            if part.min() < 0 or part.max() >= len(x):
                raise ValueError(f"the shard of client {client} has indices {part.min()} to {part.max()}; expected 0 to {len(x) - 1}")
            if (taken := part[holder[part] >= 0]).numel() or part.unique().numel() < len(part):
                other = f"is also in that of client {holder[taken[0]]}" if taken.numel() else "is in it twice"
                example = int(taken[0]) if taken.numel() else int(part[0])
                raise ValueError(f"the shard of client {client} overlaps: example {example} {other}; expected each example in one shard")
            holder[part] = client

    def __len__(self) -> int:
        return len(self.parts)

    def shard(self, client: int, flat: FlatModel, steps: int | None = None) -> Shard:
        """What `local` sees of a client; `steps` is how many it makes, whatever the algorithm's settings say."""
        return Shard(client, flat, self.x, self.y, self.parts[client], steps)


class Batch(NamedTuple):
    """Rows of the examples [B], or [S, B] for S clients; then the weights [S, B] and who still trains [S, 1], where clients differ."""

    rows: Tensor
    weights: Tensor | None = None
    active: Tensor | None = None


def batch_rows(size: int, batch_size: int, epochs: int, steps: int | None, rng: np.random.Generator) -> list[np.ndarray]:
    """The examples of each local step: a fresh order an epoch, cut into batches, the last one shorter where it does not divide.

    Args:
        size: how many examples the client has.
        batch_size: of a batch.
        epochs: passes over the examples, unless `steps` says how many steps.
        steps: exactly so many steps, over as many passes as that takes.
        rng: the client's random numbers.

    Examples:
        >>> [len(rows) for rows in batch_rows(5, 2, epochs=2, steps=None, rng=client_rng(0, 1, 0))]
        [2, 2, 1, 2, 2, 1]
    """
    an_epoch = -(-size // batch_size)
    total = steps if steps is not None else epochs * an_epoch
    rows: list[np.ndarray] = []
    while len(rows) < total:
        order = rng.permutation(size)
        rows += [order[start : start + batch_size] for start in range(0, size, batch_size)]
    return rows[:total]


class Shard:
    """One client's examples.

    Attributes:
        client: its id.
        size: how many examples it has.
        own_steps: how many local steps it makes, where it has its own mind; None: as it is told.
    """

    def __init__(self, client: int, flat: FlatModel, x: Tensor, y: Tensor, rows: Tensor, own_steps: int | None = None) -> None:
        self.client, self.flat, self.x, self.y, self.rows, self.size, self.own_steps = client, flat, x, y, rows, len(rows), own_steps

    def start(self, vector: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
        """A copy of the global vector to train."""
        return vector.clone()

    def batches(self, rng: Any, batch_size: int, epochs: int, steps: int | None) -> Iterator[Batch]:
        for chosen in batch_rows(self.size, batch_size, epochs, self.steps(batch_size, epochs, steps), rng):
            yield Batch(self.rows[torch.from_numpy(chosen)].to(self.x.device))

    def steps(self, batch_size: int, epochs: int, steps: int | None) -> Any:
        """How many local steps the client makes."""
        told = steps if steps is not None else epochs * -(-self.size // batch_size)
        return told if self.own_steps is None else self.own_steps

    def gradient(self, vector: Float[Tensor, "d"], batch: Batch) -> Float[Tensor, "d"]:
        """The gradient of the mean loss of a batch."""
        meters.count("gradients")
        return self.flat.gradient(vector, self.x[batch.rows], self.y[batch.rows])


class StackedShard:
    """Many clients' examples, trained at once: the same words as `Shard`, each vector with a client axis before it [S, d]."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        first = shards[0]
        self.shards, self.flat, self.x, self.y = shards, first.flat, first.x, first.y
        self.size = torch.tensor([shard.size for shard in shards])

    def start(self, vector: Tensor) -> Float[Tensor, "S d"]:
        return vector.expand(len(self.shards), -1).clone()

    def batches(self, rng: Sequence[np.random.Generator], batch_size: int, epochs: int, steps: int | None) -> Iterator[Batch]:
        plans = [
            batch_rows(shard.size, batch_size, epochs, shard.steps(batch_size, epochs, steps), each)
            for shard, each in zip(self.shards, rng, strict=True)
        ]
        owned = [shard.rows.numpy() for shard in self.shards]
        for step in range(max(map(len, plans))):
            chosen = [rows[plan[step]] if step < len(plan) else None for rows, plan in zip(owned, plans, strict=True)]
            yield self._stacked(chosen, owned)

    def _stacked(self, chosen: list[np.ndarray | None], owned: list[np.ndarray]) -> Batch:
        """One step's rows; a client with fewer gets rows of weight zero, one that is done trains no more."""
        wide = max(len(rows) for rows in chosen if rows is not None)
        rows = np.stack([np.resize(each if each is not None else own[:1], wide) for each, own in zip(chosen, owned, strict=True)])
        counts = np.array([len(each) if each is not None else wide for each in chosen])
        active = np.array([each is not None for each in chosen])
        weights = None
        if (counts < wide).any():
            weights = torch.as_tensor((np.arange(wide) < counts[:, None]) / counts[:, None], dtype=self.flat.dtype)
        device = self.x.device
        return Batch(
            torch.from_numpy(rows).to(device),
            None if weights is None else weights.to(device),
            None if active.all() else torch.from_numpy(active)[:, None].to(device),
        )

    def steps(self, batch_size: int, epochs: int, steps: int | None) -> Float[Tensor, "S 1"]:
        return torch.tensor(
            [[float(shard.steps(batch_size, epochs, steps))] for shard in self.shards], dtype=self.flat.dtype, device=self.x.device
        )

    def gradient(self, vector: Float[Tensor, "S d"], batch: Batch) -> Float[Tensor, "S d"]:
        """The gradients of those that still train; zeros for the others."""
        rows, weights, training = batch.rows, batch.weights, None
        if batch.active is not None:
            training = batch.active.squeeze(1).nonzero().squeeze(1)
            rows, weights = rows[training], weights[training] if weights is not None else None
        meters.count("gradients", len(rows))
        at = vector if training is None else vector[training]
        grads = self.flat.stacked_gradient(at, self.x[rows], self.y[rows], weights)
        return grads if training is None else torch.zeros_like(vector).index_copy_(0, training, grads)
