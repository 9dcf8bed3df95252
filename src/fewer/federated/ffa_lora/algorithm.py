"""Federated LoRA with DP-SGD in the clients: FFA-LoRA where A is frozen, plain federated LoRA where it is not; the code is the same.

A client starts at the server's B, makes K steps of SGD on it, and the server averages: exactly the mean of the products, as A is shared.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewer import meters
from fewer.checks import check_whole
from fewer.federated._shared.algorithm import Message, Reply, ServerState, Vectors, mean_of
from fewer.federated._shared.clients import Batch, Shard, StackedShard
from fewer.federated._shared.local_training import LocalConfig, descend, metrics_of
from fewer.federated.ffa_lora.accounting import PrivacyConfig, epsilon_spent
from fewer.federated.ffa_lora.per_example import private_gradient

TAKEN = "rounds_taken"  # how many rounds a client has taken part in


@dataclass(frozen=True, kw_only=True)
class LoRARoundsConfig(LocalConfig):
    """How a client trains its adapters. Nothing decays, pulls or clips unless it is asked for.

    Args:
        local_steps: K, steps a round; None: `local_epochs` passes.
        batch_size: examples a step; with privacy the mean of a Poisson draw.
        lr: eta.
        lr_decay, weight_decay, max_grad_norm: see `LocalConfig`; off.
        privacy: the budget; None: no privacy.
        rounds: the most rounds that a client takes part in, for which the noise is computed: all, unless clients are sampled.
        local_epochs, weighted: see `LocalConfig`.

    Raises:
        ValueError: a number is out of its range, or privacy is asked for without saying for how many rounds.

    Examples:
        >>> LoRARoundsConfig(privacy=PrivacyConfig(epsilon=6.0), rounds=100).local_steps
        10
    """

    local_steps: int | None = 10
    batch_size: int = 200
    lr: float = 0.5
    lr_decay: float = 1.0
    weight_decay: float = 0.0
    max_grad_norm: float = math.inf
    privacy: PrivacyConfig | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(optional=["rounds"], rounds=self.rounds)
        if self.privacy is not None and self.rounds is None:
            raise ValueError("privacy is given and rounds is None; expected the number of rounds that the budget is to last: rounds=100")


@dataclass(frozen=True)
class FedLoRA:
    """FedAvg over adapters as three pure functions on flat vectors, DP-SGD inside where the settings ask for privacy.

    What leaves a client is private already; the guarantee of a client concerns its own examples, and averaging cannot weaken it. A client
    counts the rounds it takes part in (`rounds_taken`, kept between rounds) and the server counts beside it, so that the budget goes on where
    it was after a resume, and when a client comes back without what it kept; the larger count is believed. A client that is asked more
    often than the noise was computed for refuses. A reply with NaN is left out; the client has spent that round all the same. A client that dies
    in a round or never answers is left out of it, and nothing has left it; only where it had answered, too late for the round or with NaN, and
    then lost what it kept, is that round not counted. A federation that begins anew, without a checkpoint, begins a new count: the budgets of
    all runs over the same examples add up, and to see to that is for who holds them. A client must hold as many examples in every round.

    Raises:
        ValueError: (when it trains) with privacy, a client has fewer examples than the batch, its rounds are used up, it chooses its steps
            itself, the model mixes examples by BatchNorm, or clients are trained at once by executor="vmap".

    Examples:
        >>> FedLoRA(LoRARoundsConfig()).initial(torch.zeros(3), clients=10).clients
        10
    """

    config: LoRARoundsConfig = field(default_factory=LoRARoundsConfig)
    sends: tuple[str, ...] = ("model",)

    @property
    def lengths(self) -> dict[str, int]:
        return {TAKEN: 1}

    @property
    def receives(self) -> tuple[str, ...]:
        return ("x", TAKEN) if self.config.privacy else ("x",)

    @property
    def keeps(self) -> tuple[str, ...]:
        return (TAKEN,) if self.config.privacy else ()

    def initial(self, x: Tensor, clients: int) -> ServerState:
        """The server before round 1; with privacy it counts each client's rounds: rows (client, rounds)."""
        return ServerState(x, clients, vectors={TAKEN: torch.zeros(0, 2, dtype=torch.int64)} if self.config.privacy else {})

    def configure(self, server: ServerState, client_ids: Sequence[int], round: int) -> list[Message]:
        messages = [Message(client, round, {"x": server.x}) for client in client_ids]
        if self.config.privacy is None:
            return messages
        taken = dict(server.vectors[TAKEN].tolist())
        return [replace(each, vectors=each.vectors | {TAKEN: torch.tensor([taken.get(each.client, 0)])}) for each in messages]

    def local(self, client_state: Vectors, message: Message, shard: Any, rng: Any) -> tuple[Vectors, Reply]:
        """K steps B <- B - eta (step gradient); with privacy the reply also tells "epsilon", what the client has spent with this round."""
        x, privacy = message.vectors["x"], self.config.privacy
        if privacy is None:
            y = descend(shard.start(x), shard, rng, self.config, message.round)
            return {}, Reply(message.client, {"model": y}, metrics_of(y, x, shard))
        if isinstance(shard, StackedShard):
            raise ValueError("privacy with executor='vmap'; expected clients trained one by one, each with noise of its own: executor=None")
        taken = 1 + max(int(client_state[TAKEN][0]), int(message.vectors[TAKEN]))
        private = PrivateShard(shard, self.config, taken, rng)
        y = descend(shard.start(x), private, private.rng, self.config, message.round)
        metrics = metrics_of(y, x, shard) | {"epsilon": private.epsilon}
        return {TAKEN: x.new_full((1,), taken)}, Reply(message.client, {"model": y}, metrics)

    def aggregate(self, server: ServerState, replies: Sequence[Reply]) -> ServerState:
        """B <- mean_i B_i."""
        after = replace(server, x=mean_of(replies, "model", self.config.weighted))
        if self.config.privacy is None:
            return after
        taken = dict(server.vectors[TAKEN].tolist())
        taken |= {reply.client: taken.get(reply.client, 0) + 1 for reply in replies}
        return replace(after, vectors=after.vectors | {TAKEN: torch.tensor(sorted(taken.items()))})


class PrivateShard:
    """A client's examples as DP-SGD sees them, in the words of `Shard`: Poisson batches, and gradients with every example clipped and noise.

    Args:
        shard: the client's examples.
        config: with privacy.
        taken: rounds that the client takes part in, this one counted.
        rng: the client's random numbers of this round; the noise and the batches are drawn from them unless privacy is secure.

    Attributes:
        rng: what batches are drawn from.
        sigma: the noise multiplier.
        epsilon: what has been spent when this round is over.
    """

    def __init__(self, shard: Shard, config: LoRARoundsConfig, taken: int, rng: np.random.Generator) -> None:
        privacy, rounds = config.privacy, config.rounds
        assert privacy is not None
        assert rounds is not None
        _check_private(shard, config, taken)
        self.shard, self.privacy, self.expected = shard, privacy, config.batch_size
        self.rate = config.batch_size / shard.size
        steps = shard.steps(config.batch_size, config.local_epochs, config.local_steps)
        self.sigma = privacy.noise_for(self.rate, rounds * steps)
        self.epsilon = epsilon_spent(self.sigma, privacy.delta, self.rate, taken * steps, privacy.accountant)
        self.rng = np.random.default_rng() if privacy.secure else rng
        seed = secrets.randbits(63) if privacy.secure else int(rng.integers(2**62))
        self.noise = torch.Generator(shard.x.device).manual_seed(seed)

    def batches(self, rng: np.random.Generator, batch_size: int, epochs: int, steps: int | None) -> Iterator[Batch]:
        """Each example enters each step by itself, with the same probability; a batch may have none."""
        for _ in range(self.shard.steps(batch_size, epochs, steps)):
            drawn = torch.from_numpy(rng.random(self.shard.size) < self.rate)
            yield Batch(self.shard.rows[drawn].to(self.shard.x.device))

    def gradient(self, vector: Tensor, batch: Batch) -> Tensor:
        meters.count("gradients")
        x, y = self.shard.x[batch.rows], self.shard.y[batch.rows]
        return private_gradient(self.shard.flat, vector, x, y, self.privacy.clip, self.sigma, self.expected, self.noise)


def _check_private(shard: Shard, config: LoRARoundsConfig, taken: int) -> None:
    """What must hold of a client before it trains with privacy."""
    assert config.privacy is not None
    assert config.rounds is not None
    if config.batch_size > shard.size:
        raise ValueError(
            f"batch_size is {config.batch_size} and client {shard.client} has {shard.size} examples; expected at most that many with privacy: "
            "a smaller batch_size"
        )
    if shard.own_steps is not None:
        raise ValueError(
            f"client {shard.client} chooses its own steps ({shard.own_steps}) with privacy, whose noise and epsilon are for as many in every round; "
            "expected none: leave choose_steps out"
        )
    if taken > config.rounds:
        raise ValueError(
            f"client {shard.client} is asked for round {taken} of its own and its noise was computed for rounds={config.rounds}; expected no more: "
            "its privacy budget is spent, so end here, or start anew with more rounds (and more noise)"
        )
    for name, module in shard.flat.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) mixes the examples of a batch, and privacy bounds what each alone does; expected "
                "none with privacy: GroupNorm or LayerNorm"
            )
    if config.privacy.delta >= 1 / shard.size:
        warnings.warn(
            f"delta is {config.privacy.delta:g} and client {shard.client} has {shard.size} examples; expected less than {1 / shard.size:.2g}, "
            "else the guarantee allows one example to be told outright: a smaller delta",
            stacklevel=2,
        )
