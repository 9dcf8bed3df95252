"""What generative models are trained with: a moving average of the weights, and a learning rate that rises and falls in lines."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn


class MovingAverage:
    """The exponential moving average of a model's weights, which follows quickly at first.

    Args:
        model: whose weights are averaged; any module.
        decay: what stays of the average at an update, in [0, 1); the n-th update keeps at most n / (9 + n).

    Attributes:
        model: the average, a copy of the model in eval mode without gradients. Buffers are those of the last update.

    Examples:
        >>> layer = nn.Linear(1, 1)
        >>> average = MovingAverage(layer, 0.99)
        >>> average.update(layer)
        >>> bool(torch.equal(average.model.weight, layer.weight))
        True
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model: nn.Module = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the model's weights in; after a step of the optimizer."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for mean, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            mean.lerp_(weight, 1 - decay)
        for kept, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(buffer)
        self.updates += 1


def up_and_down(steps: int, warm_up: int) -> Callable[[int], float]:
    """The factor on a learning rate at a step (from 0), for `fit_steps`: up in a line for `warm_up` steps, then down in a line to zero.

    Examples:
        >>> [round(up_and_down(10, 2)(step), 3) for step in (0, 1, 5, 9)]
        [0.5, 1.0, 0.625, 0.125]
    """
    return lambda step: min((step + 1) / max(1, warm_up), (steps - step) / max(1, steps - warm_up))
