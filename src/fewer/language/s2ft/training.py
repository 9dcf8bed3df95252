"""The training recipe: AdamW without weight decay, a warm-up, and a linear decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP = 100  # steps, of the released scripts


def learning_rate(step: int, steps: int, warm_up: int) -> float:
    """The share of the learning rate at a step (from 0): up over the warm-up, then down to 0.

    >>> [learning_rate(step, 10, 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    return (step + 1) / warm_up if step < warm_up else (steps - step) / max(1, steps - warm_up)


def fit(
    model: nn.Module,
    batches: Iterable[Any],
    loss_of: Callable[[Any, Any], Tensor],
    *,
    lr: float,
    steps: int,
    warm_up: int = WARM_UP,
    tell: Callable[[int, int, float], None] | None = None,
) -> tuple[torch.optim.AdamW, list[float]]:
    """Train what requires a gradient.

    Args:
        batches: one for each step.
        loss_of: (model, batch) -> the loss.
        lr: the highest learning rate; the release takes 2e-4 (commonsense) or 1e-3 (arithmetic) for S2FT.
        steps: how many; the warm-up is at most a fifth of them.
        tell: called with (step, steps, loss).

    Returns:
        the optimizer, and the loss of each step.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    warm = max(1, min(warm_up, steps // 5))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps, warm))
    losses = []
    model.train()
    for _, batch in zip(range(steps), batches, strict=False):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if tell:
            tell(len(losses), steps, losses[-1])
    model.eval()
    return optimizer, losses
