"""DFedSAM: what a client does between two averages with its neighbours, and how many gossip steps it makes then."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fewer.checks import check_not_negative, check_whole
from fewer.federated._shared.local_training import LocalConfig, descend, metrics_of


@dataclass(frozen=True, kw_only=True)
class DFedSAMConfig(LocalConfig):
    """DFedSAM's settings. The paper's text could not be had; the defaults are this library's.

    Args:
        rho: the ascent step's length (0: none, and one gradient a step: DFedAvg; with local_steps = 1, D-PSGD).
        gossip_steps: Q, how often a round's exchange with the neighbours is made; above 1 it is DFedSAM-MGS, whose bytes grow Q-fold. With
            graphs that change each round, the same one serves all Q.
        local_epochs, local_steps, lr, lr_decay, weight_decay, max_grad_norm, batch_size: see `LocalConfig`.
        weighted: must be False: the weights are the topology's, and clients weighed by their examples would move the mean.

    Raises:
        ValueError: a number is out of its range, or `weighted` is True.

    Examples:
        >>> DFedSAMConfig(gossip_steps=4).rho
        0.05
    """

    rho: float = 0.05
    gossip_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(rho=self.rho)
        check_whole(gossip_steps=self.gossip_steps)
        if self.weighted:
            raise ValueError("weighted is True; expected False: there is no server, clients are weighed by the links of the topology")


@dataclass(frozen=True)
class DFedSAMAlgorithm:
    """DFedSAM for `simulate_decentralized` and `run_peer`.

    Examples:
        >>> DFedSAMAlgorithm(DFedSAMConfig(gossip_steps=4)).gossip_steps
        4
    """

    config: DFedSAMConfig = field(default_factory=DFedSAMConfig)

    @property
    def gossip_steps(self) -> int:
        """Q: how often a round's exchange is made."""
        return self.config.gossip_steps

    def local(self, x: Tensor, shard: Any, rng: Any, round: int) -> tuple[Tensor, dict[str, Any]]:
        """K steps y <- y - eta grad F_i(y + rho g/|g|; B), g = grad F_i(y; B), from y = x.

        Args:
            x: the client's model [d], or those of S clients [S, d].
            shard: its examples.
            rng: of its batches.
            round: from 1.

        Returns:
            (z, {"examples", "drift" = |z - x|}).
        """
        z = descend(shard.start(x), shard, rng, self.config, round, rho=self.config.rho)
        return z, metrics_of(z, x, shard)
