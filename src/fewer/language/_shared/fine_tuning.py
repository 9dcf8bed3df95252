"""Fine-tuning's usual recipe: AdamW without weight decay, a warm-up, and a linear decay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fewer.checks import check_positive, check_whole
from fewer.fitting import fit_steps

WARM_UP = 100  # steps, of the released scripts of S2FT


def learning_rate(step: int, steps: int, warm_up: int) -> float:
    """The share of the learning rate at a step (from 0): up over the warm-up, then down to 0.

    >>> [learning_rate(step, 10, 2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    return (step + 1) / warm_up if step < warm_up else (steps - step) / max(1, steps - warm_up)


def fine_tune(
    model: nn.Module,
    batches: Iterable[Any],
    loss_of: Callable[[Any, Any], Tensor],
    *,
    lr: float,
    steps: int,
    warm_up: int = WARM_UP,
    tell: Callable[[int, float], None] | None = None,
) -> tuple[torch.optim.AdamW, list[float]]:
    """Train what requires a gradient; the model is given back in the mode that it was in.

    Args:
        batches: one for each step.
        loss_of: (model, batch) -> the loss.
        lr: the highest learning rate.
        steps: how many; the warm-up is at most a fifth of them.
        tell: called with the step (from 1) and its loss.

    Returns:
        the optimizer, and the loss of each step.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    check_whole(steps=steps)
    check_positive(lr=lr)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    schedule = functools.partial(learning_rate, steps=steps, warm_up=max(1, min(warm_up, steps // 5)))
    was_training = model.training
    model.train()
    try:
        return optimizer, fit_steps(optimizer, functools.partial(loss_of, model), batches, steps, schedule=schedule, tell=tell)
    finally:
        model.train(was_training)
