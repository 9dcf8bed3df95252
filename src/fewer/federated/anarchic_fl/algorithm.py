"""Anarchic federated learning: workers send the mean gradient of their local steps, and the server steps with what came (AFA-CD) or with
the last update of every worker (AFA-CS); beside them FedBuff, which adds up raw updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.checks import check_choice, check_positive, check_whole
from fewer.federated._shared.algorithm import Message, Reply, ServerState, Vectors, mean_of
from fewer.federated._shared.client_states import ClientStates
from fewer.federated._shared.local_training import LocalConfig, descend, metrics_of

Variant = Literal["cd", "cs"]
Unseen = Literal["zero", "skip"]
MEMORY, MEAN, HEARD = "memory", "memory_mean", "heard"  # what AFA-CS keeps on the server
REFRESH = 1000  # updates after which the running mean of the memory is computed anew, against drift


@dataclass(frozen=True, kw_only=True)
class AnarchicConfig(LocalConfig):
    """The settings of anarchic federated learning. The paper gives its rates in theory only; the defaults are ours.

    Args:
        variant: "cd" (AFA-CD, cross-device): the server steps with the mean of the returns in the buffer and keeps nothing about workers;
            an error of the order of the workers' unlikeness stays. "cs" (AFA-CS, cross-silo): it remembers each worker's last update and
            steps with the mean over all workers, so that those who come often do not pull harder. As AFA-CS applies *every* stored
            update at *every* step, old ones too, it needs the smaller rate: with half of the workers ten times slower than the others
            (delays to about 25) and server_lr * lr = 0.6 it ended at 33 to 44 % where AFA-CD had 66 to 75 %.
        server_lr: eta, in units of local steps: with as many local steps as eta and no delay, AFA-CD is FedAvg. The mean number of
            local steps is a good choice. Only eta * lr acts on the server; delays matter through eta * lr * L * (largest delay). The
            theory's choice is lr = 1 / sqrt(T) and eta of the order of sqrt(m K).
        buffer: m, the returns that make an update in Flower (a simulation's `schedule` says it itself).
        unseen: what workers that were not heard of yet count in "cs": "zero" (an update of zero, the mean is over all workers) or "skip"
            (the mean is over those heard of).
        max_delay: returns that are older, in updates, are left out; None: none is.
        lr: eta_L of version 0; a worker uses that of the version it fetched, the server that of its own.
        lr_decay: what eta_L is multiplied by each *update*; 0.998, which other methods here have for a round, leaves 3e-4 after 4,000.
        local_epochs, local_steps, weight_decay, max_grad_norm, batch_size, weighted: see `LocalConfig`; local steps are the default of a
            message that says none, and workers count alike (weighted is refused).

    Raises:
        ValueError: a number is out of its range, or the variant is unknown.

    Examples:
        >>> AnarchicConfig(variant="cs").server_lr
        5.0
    """

    variant: Variant
    server_lr: float = 5.0
    buffer: int = 5
    unseen: Unseen = "zero"
    max_delay: int | None = None
    lr: float = 0.02
    lr_decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(get_args(Variant), variant=self.variant)
        check_choice(get_args(Unseen), unseen=self.unseen)
        check_positive(server_lr=self.server_lr)
        check_whole(buffer=self.buffer)
        check_whole(least=0, optional=["max_delay"], max_delay=self.max_delay)
        if self.weighted:
            raise ValueError("weighted is True; expected False: workers count alike, however many examples they have")


def normalised_update(x: Tensor, y: Tensor, steps: Any, lr: Any) -> Tensor:
    """G = (x - y_K) / (eta_L K), the mean of the steps' gradients: a worker of 20 steps does not pull 20 times as hard as one of 1."""
    return (x - y).div_(steps * lr)


@dataclass(frozen=True)
class AnarchicAlgorithm:
    """AFA-CD or AFA-CS as three pure functions on flat vectors, for `simulate_anarchic` and for Flower alike.

    The memory of AFA-CS, a table [clients, d], lies on the server and is changed in place, so that an update costs as much as its returns
    and not as all workers: a state that was handed to `aggregate` must not be used again. Beyond 1 GiB it lies in a mapped file.

    Examples:
        >>> server = AnarchicAlgorithm(AnarchicConfig(variant="cs")).initial(torch.zeros(3), clients=10)
        >>> server.vectors["memory"].shape
        torch.Size([10, 3])
    """

    config: AnarchicConfig
    keeps: tuple[str, ...] = ()
    receives: tuple[str, ...] = ("x",)
    sends: tuple[str, ...] = ("update",)

    @property
    def max_delay(self) -> int | None:
        """Older returns are left out."""
        return self.config.max_delay

    def initial(self, x: Tensor, clients: int) -> ServerState:
        """The server before the first update; for AFA-CS with a table of zeros, its mean, and who was heard of (nobody)."""
        if self.config.variant == "cd":
            return ServerState(x, clients)
        table = ClientStates(clients, (MEMORY,), x.numel(), x.dtype).tables[MEMORY]
        return ServerState(x, clients, vectors={MEMORY: table, MEAN: torch.zeros_like(x), HEARD: torch.zeros(clients, dtype=torch.bool)})

    def configure(self, server: ServerState, client_ids: Sequence[int], round: int) -> list[Message]:
        return [Message(client, round, {"x": server.x}) for client in client_ids]

    def local(self, client_state: Vectors, message: Message, shard: Any, rng: Any) -> tuple[Vectors, Reply]:
        """K local steps at the rate of the fetched version, and their normalised update."""
        config, x = self.config, message.vectors["x"]
        y = descend(shard.start(x), shard, rng, config, message.round)
        steps = shard.steps(config.batch_size, config.local_epochs, config.local_steps)
        return {}, Reply(message.client, {"update": normalised_update(x, y, steps, config.lr_at(message.round))}, metrics_of(y, x, shard))

    def aggregate(self, server: ServerState, replies: Sequence[Reply]) -> ServerState:
        """x_{t+1} = x_t - eta eta_L G_t, where G_t is the mean of what came (cd) or of every worker's last update (cs)."""
        config = self.config
        direction = mean_of(replies, "update") if config.variant == "cd" else self._recalled(server, replies)
        return replace(server, x=torch.sub(server.x, direction, alpha=config.server_lr * config.lr_at(server.round + 1)))

    def _recalled(self, server: ServerState, replies: Sequence[Reply]) -> Float[Tensor, "d"]:
        """The mean of the memory after these replies took their places in it, in order of arrival, so that of two the later stays."""
        table, mean, heard = (server.vectors[name] for name in (MEMORY, MEAN, HEARD))
        for reply in replies:
            update, row = reply.vectors["update"], table[reply.client]
            mean.add_(update - row.to(mean.device), alpha=1 / server.clients)
            row.copy_(update)
            heard[reply.client] = True
        if (server.round + 1) % REFRESH == 0:
            mean.copy_(table.mean(dim=0))
        return mean * (server.clients / int(heard.sum())) if self.config.unseen == "skip" else mean


@dataclass(frozen=True)
class FedBuff:
    """FedBuff without staleness weights: x <- x - the mean of the raw x_mu - y_K that came (Nguyen et al. 2022), so that a worker of many
    steps pulls harder. What anarchic federated learning is held against.

    Examples:
        >>> FedBuff(LocalConfig(lr=0.02)).sends
        ('change',)
    """

    config: LocalConfig = field(default_factory=LocalConfig)
    keeps: tuple[str, ...] = ()
    receives: tuple[str, ...] = ("x",)
    sends: tuple[str, ...] = ("change",)

    def initial(self, x: Tensor, clients: int) -> ServerState:
        return ServerState(x, clients)

    def configure(self, server: ServerState, client_ids: Sequence[int], round: int) -> list[Message]:
        return [Message(client, round, {"x": server.x}) for client in client_ids]

    def local(self, client_state: Vectors, message: Message, shard: Any, rng: Any) -> tuple[Vectors, Reply]:
        x = message.vectors["x"]
        y = descend(shard.start(x), shard, rng, self.config, message.round)
        return {}, Reply(message.client, {"change": x - y}, metrics_of(y, x, shard))

    def aggregate(self, server: ServerState, replies: Sequence[Reply]) -> ServerState:
        return replace(server, x=server.x - mean_of(replies, "change", self.config.weighted))
