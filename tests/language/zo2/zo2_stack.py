"""A module of nobody's library, for tests that need no transformers."""

from __future__ import annotations

import torch
from torch import nn


class Stack(nn.Module):
    """A module of nobody's library: linear maps one after the other."""

    def __init__(self, depth: int = 2, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.steps = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for step in self.steps:
            x = step(x)
        return self.last(x).square().mean()


def stack(depth: int = 2, width: int = 3) -> Stack:
    torch.manual_seed(0)
    return Stack(depth, width)
