"""What FZooS is held against: federated descent by finite differences, which asks anew for each gradient and forgets the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float64
from torch import Tensor

from fewer.checks import check_choice, check_positive, check_whole
from fewer.federated._shared.algorithm import Message, Reply, ServerState, Vectors, mean_of
from fewer.federated._shared.black_box import BlackBox
from fewer.federated.fzoos.algorithm import Adam, check_bounds, check_inside
from fewer.federated.fzoos.trajectory import Bounds, clipped

Mode = Literal["plain", "prox", "scaffold"]


@dataclass(frozen=True)
class FedZOConfig:
    """FedZO's settings.

    Args:
        local_steps: T, steps a round.
        lr: of Adam, which begins anew each round.
        directions: q, orthonormal directions a gradient; q + 1 queries.
        smoothing: mu, how far along each direction is asked.
        mode: "plain"; "prox" adds z - x to the gradient; "scaffold" adds c - c_i, c_i the mean of the client's last round of gradients.
        bounds: of each number of a point that is asked; None: none.

    Raises:
        ValueError: a number is out of its range.
    """

    local_steps: int = 10
    lr: float = 0.01
    directions: int = 20
    smoothing: float = 0.01
    mode: Mode = "plain"
    bounds: Bounds = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_whole(local_steps=self.local_steps, directions=self.directions)
        check_positive(lr=self.lr, smoothing=self.smoothing)
        check_choice(get_args(Mode), mode=self.mode)
        check_bounds(self.bounds)


@dataclass(frozen=True)
class FedZO:
    """FedZO as the house's three pure functions; with `mode="prox"` or "scaffold" its forms for unlike clients."""

    config: FedZOConfig = field(default_factory=FedZOConfig)
    exchanges = 1

    @property
    def keeps(self) -> tuple[str, ...]:
        return ("control",) if self.config.mode == "scaffold" else ()

    @property
    def receives(self) -> tuple[str, ...]:
        return ("x", *self.keeps)

    @property
    def sends(self) -> tuple[str, ...]:
        return ("model", "control_change") if self.config.mode == "scaffold" else ("model",)

    def initial(self, x: Tensor, clients: int) -> ServerState:
        check_inside(x, self.config.bounds)
        x = x.double()
        return ServerState(x, clients, vectors={name: torch.zeros_like(x) for name in self.keeps})

    def configure(self, server: ServerState, client_ids: Sequence[int], round: int) -> list[Message]:
        return [Message(client, round, {"x": server.x, **server.vectors}) for client in client_ids]

    def local(self, client_state: Vectors, message: Message, shard: BlackBox, rng: Any) -> tuple[Vectors, Reply]:
        config, x = self.config, message.vectors["x"]
        z, adam, total, first, queries = x.clone(), Adam(config.lr), torch.zeros_like(x), 0.0, 0
        for t in range(config.local_steps):
            value = shard.ask(z)
            first = first if t else value
            g = finite_differences(shard, z, value, config, rng)
            queries += 1 + config.directions
            total += g
            z = clipped(z - adam.step(g + self._force(z, message.vectors, client_state)), config.bounds)
        kept, sent = {}, {"model": z}
        if config.mode == "scaffold":
            kept["control"] = total / config.local_steps
            sent["control_change"] = kept["control"] - client_state["control"]
        metrics = {"examples": 1, "drift": float((z - x).norm()), "value": first, "queries": queries}
        return kept, Reply(message.client, sent, metrics)

    def _force(self, z: Tensor, vectors: Vectors, kept: Vectors) -> Tensor:
        """What a step feels beside the gradient."""
        if self.config.mode == "prox":
            return z - vectors["x"]
        return vectors["control"] - kept["control"] if self.config.mode == "scaffold" else torch.zeros(())

    def aggregate(self, server: ServerState, replies: Sequence[Reply]) -> ServerState:
        x = mean_of(replies, "model")
        if self.config.mode != "scaffold":
            return replace(server, x=x)
        control = server.vectors["control"] + mean_of(replies, "control_change") * (len(replies) / server.clients)
        return replace(server, x=x, vectors=server.vectors | {"control": control})


def finite_differences(shard: BlackBox, z: Tensor, value: float, config: FedZOConfig, rng: Any) -> Float64[Tensor, "d"]:
    """g = (1/q) sum_j (f(z + mu u_j) - f(z)) / mu u_j."""
    directions = orthonormal(config.directions, len(z), rng)
    ahead = clipped(z + config.smoothing * directions, config.bounds)
    slopes = torch.tensor([shard.ask(point) - value for point in ahead], dtype=torch.float64) / config.smoothing
    return slopes @ directions / config.directions


def orthonormal(count: int, d: int, rng: Any) -> Float64[Tensor, "count d"]:
    """Gaussian directions made orthonormal, in blocks of at most d."""
    blocks = [torch.linalg.qr(torch.from_numpy(rng.standard_normal((d, min(d, count - start)))))[0].T for start in range(0, count, d)]
    return torch.cat(blocks)
