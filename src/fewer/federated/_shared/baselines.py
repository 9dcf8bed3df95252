"""What federated methods are held against: FedAvg, FedProx, SCAFFOLD, FedDyn and FedSAM, each a few lines over the same local loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fewer.checks import check_not_negative, check_positive
from fewer.federated._shared.algorithm import Message, Reply, ServerState, Vectors, mean_of
from fewer.federated._shared.local_training import LocalConfig, descend, metrics_of


@dataclass(frozen=True)
class FedAvg:
    """Local SGD, and the mean of what comes back (McMahan et al. 2017)."""

    config: LocalConfig = field(default_factory=LocalConfig)
    keeps: tuple[str, ...] = ()
    receives: tuple[str, ...] = ("x",)
    sends: tuple[str, ...] = ("model",)

    def initial(self, x: Tensor, clients: int) -> ServerState:
        return ServerState(x, clients)

    def configure(self, server: ServerState, client_ids: Sequence[int], round: int) -> list[Message]:
        return [Message(client, round, {"x": server.x}) for client in client_ids]

    def local(self, client_state: Vectors, message: Message, shard: Any, rng: Any) -> tuple[Vectors, Reply]:
        x = message.vectors["x"]
        y = descend(shard.start(x), shard, rng, self.config, message.round, **self.force(x))
        return {}, Reply(message.client, {"model": y}, metrics_of(y, x, shard))

    def force(self, x: Tensor) -> dict[str, Any]:
        """What the local steps feel beside the gradient."""
        return {}

    def aggregate(self, server: ServerState, replies: Sequence[Reply]) -> ServerState:
        return replace(server, x=mean_of(replies, "model", self.config.weighted))


@dataclass(frozen=True)
class FedProx(FedAvg):
    """FedAvg with a proximal term of weight mu (Li et al. 2020)."""

    mu: float = 0.1

    def __post_init__(self) -> None:
        check_not_negative(mu=self.mu)

    def force(self, x: Tensor) -> dict[str, Any]:
        return {"prox": self.mu, "pull": self.mu * x} if self.mu else {}


@dataclass(frozen=True)
class FedSAM(FedAvg):
    """FedAvg with the gradient at the ascent point (Qu et al. 2022)."""

    rho: float = 0.1
    normalize: bool = True

    def __post_init__(self) -> None:
        check_not_negative(rho=self.rho)

    def force(self, x: Tensor) -> dict[str, Any]:
        return {"rho": self.rho, "normalize": self.normalize}


@dataclass(frozen=True)
class Scaffold(FedAvg):
    """SCAFFOLD, option II: control variates c and c_i correct each step; two model-sized vectors each way (Karimireddy et al. 2020)."""

    keeps: tuple[str, ...] = ("control",)
    receives: tuple[str, ...] = ("x", "control")
    sends: tuple[str, ...] = ("model", "control_change")

    def initial(self, x: Tensor, clients: int) -> ServerState:
        return ServerState(x, clients, vectors={"control": x.new_zeros(x.shape)})

    def configure(self, server: ServerState, client_ids: Sequence[int], round: int) -> list[Message]:
        return [Message(client, round, {"x": server.x, "control": server.vectors["control"]}) for client in client_ids]

    def local(self, client_state: Vectors, message: Message, shard: Any, rng: Any) -> tuple[Vectors, Reply]:
        config, x, c, c_i = self.config, message.vectors["x"], message.vectors["control"], client_state["control"]
        y = descend(shard.start(x), shard, rng, config, message.round, pull=c_i - c)
        steps = shard.steps(config.batch_size, config.local_epochs, config.local_steps)
        change = (x - y) / (steps * config.lr_at(message.round)) - c
        return {"control": c_i + change}, Reply(message.client, {"model": y, "control_change": change}, metrics_of(y, x, shard))

    def aggregate(self, server: ServerState, replies: Sequence[Reply]) -> ServerState:
        c = server.vectors["control"] + mean_of(replies, "control_change") * (len(replies) / server.clients)
        return replace(server, x=mean_of(replies, "model", self.config.weighted), vectors=server.vectors | {"control": c})


@dataclass(frozen=True)
class FedDyn(FedAvg):
    """FedDyn: a dynamic regulariser on the clients, and its running mean on the server (Acar et al. 2021)."""

    mu: float = 0.1
    keeps: tuple[str, ...] = ("h",)

    def __post_init__(self) -> None:
        check_positive(mu=self.mu)  # the server divides by it

    def initial(self, x: Tensor, clients: int) -> ServerState:
        return ServerState(x, clients, vectors={"h": x.new_zeros(x.shape)})

    def local(self, client_state: Vectors, message: Message, shard: Any, rng: Any) -> tuple[Vectors, Reply]:
        x, h_i = message.vectors["x"], client_state["h"]
        y = descend(shard.start(x), shard, rng, self.config, message.round, prox=self.mu, pull=h_i + self.mu * x)
        return {"h": h_i - self.mu * (y - x)}, Reply(message.client, {"model": y}, metrics_of(y, x, shard))

    def aggregate(self, server: ServerState, replies: Sequence[Reply]) -> ServerState:
        drift = mean_of(replies, "model") - server.x
        h = server.vectors["h"] - self.mu * len(replies) / server.clients * drift
        return replace(server, x=mean_of(replies, "model", self.config.weighted) - h / self.mu, vectors=server.vectors | {"h": h})
