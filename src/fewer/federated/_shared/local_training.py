"""The local loop that FedSpeed and its baselines share: SGD on a client's batches with a pull, and a gradient at a worse point nearby.

Vectors are [d], or [S, d] for S clients at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewer.checks import check_not_negative, check_positive, check_share, check_whole

NORM_FLOOR = 1e-7  # section of the ascent step: |g1| + 1e-7
CLIP_FLOOR = 1e-6  # of torch.nn.utils.clip_grad_norm_


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """How a client trains, whatever the algorithm; the defaults are those of the released code.

    Args:
        local_epochs: passes over the client's examples a round.
        local_steps: exactly so many steps a round instead.
        lr: the learning rate eta of round 1.
        lr_decay: what it is multiplied by each round (of the server, not of the client's participations); at most 1.
        weight_decay: added after clipping, as inside torch.optim.SGD.
        max_grad_norm: the norm over all parameters that the step's bracket is clipped to; infinity: none.
        batch_size: examples a step.
        weighted: the server weighs clients by their examples; False: all alike.

    Raises:
        ValueError: a number is out of its range.
    """

    local_epochs: int = 5
    local_steps: int | None = None
    lr: float = 0.1
    lr_decay: float = 0.998
    weight_decay: float = 1e-3
    max_grad_norm: float = 10.0
    batch_size: int = 50
    weighted: bool = False

    def __post_init__(self) -> None:
        check_whole(optional=["local_steps"], local_epochs=self.local_epochs, local_steps=self.local_steps, batch_size=self.batch_size)
        check_positive(lr=self.lr, lr_decay=self.lr_decay)
        check_share(lr_decay=self.lr_decay)
        if self.max_grad_norm != math.inf:
            check_positive(max_grad_norm=self.max_grad_norm)
        check_not_negative(weight_decay=self.weight_decay)

    def lr_at(self, round: Any) -> Any:
        """The learning rate of a round (from 1), or of each of stacked clients' rounds [S, 1]."""
        return self.lr * self.lr_decay ** (round - 1)


def norm(vector: Tensor) -> Tensor:
    """The norm over all parameters, a number a client [1] or [S, 1]."""
    return torch.linalg.vector_norm(vector, dim=-1, keepdim=True)


def ascent_point(y: Tensor, g1: Tensor, rho: float, normalize: bool = True) -> Tensor:
    """y' = y + rho g1 / (|g1| + 1e-7), or y + rho g1."""
    return torch.addcmul(y, g1, rho / (norm(g1) + NORM_FLOOR)) if normalize else torch.add(y, g1, alpha=rho)


def quasi_gradient(y: Tensor, shard: Any, batch: Any, rho: float, alpha: float, normalize: bool) -> Tensor:
    """q = (1 - alpha) g1 + alpha g2: the gradient at y mixed with that at the ascent point, both on the same batch.

    Where rho or alpha is 0, q is g1 and the second gradient is not made.
    """
    g1 = shard.gradient(y, batch)
    if rho == 0 or alpha == 0:
        return g1
    g2 = shard.gradient(ascent_point(y, g1, rho, normalize), batch)
    return g2 if alpha == 1 else g2.mul_(alpha).add_(g1, alpha=1 - alpha)


def descend(
    y: Tensor,
    shard: Any,
    rng: Any,
    config: LocalConfig,
    round: Any,
    *,
    prox: float = 0.0,
    pull: Tensor | None = None,
    rho: float = 0.0,
    alpha: float = 1.0,
    normalize: bool = True,
) -> Tensor:
    """K local steps y <- y - eta (clip(q + prox y - pull) + weight_decay y), in place.

    `pull` holds what does not change during the steps: g_i + prox x for q - g_i + prox (y - x), that is. `round` may be [S, 1].
    """
    eta = config.lr_at(round)
    for batch in shard.batches(rng, config.batch_size, config.local_epochs, config.local_steps):
        bracket = quasi_gradient(y, shard, batch, rho, alpha, normalize)
        if prox:
            bracket.add_(y, alpha=prox)
        if pull is not None:
            bracket.sub_(pull)
        clip = (config.max_grad_norm / (norm(bracket) + CLIP_FLOOR)).clamp_(max=1.0)
        if batch.active is not None:  # clients that have made all their steps stay where they are
            step = bracket.mul_(clip).add_(y, alpha=config.weight_decay)
            y.sub_(step.mul_(batch.active.to(y.dtype) * eta))
        else:
            y.mul_(1 - eta * config.weight_decay).addcmul_(bracket, clip.mul_(eta), value=-1)
    return y


def metrics_of(y: Tensor, x: Tensor, shard: Any) -> dict[str, Any]:
    """What every reply tells: the client's examples, and how far it drifted |y - x|."""
    return {"examples": shard.size, "drift": norm(y - x).squeeze(-1)}
