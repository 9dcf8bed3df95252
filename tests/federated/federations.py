"""Small federations that the tests share: clients whose losses are quadratics, and a little classification."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fewer.federated import FlatModel, Shards

EXAMPLES, FEATURES = 12, 3


def square(output, y):
    """Half the squared error of each example, so that a client's loss is a quadratic of its parameters."""
    return 0.5 * (output.squeeze(-1) - y) ** 2


def quadratics(clients: int = 4, seed: int = 0) -> Shards:
    """Clients that each have a linear regression of their own, in float64."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(clients * EXAMPLES, FEATURES, generator=draw, dtype=torch.float64)
    true = torch.randn(clients, FEATURES, generator=draw, dtype=torch.float64)
    y = (x.view(clients, EXAMPLES, FEATURES) @ true[:, :, None]).flatten() + torch.randn(len(x), generator=draw, dtype=torch.float64)
    return Shards(x, y, np.arange(len(x)).reshape(clients, EXAMPLES))


def linear() -> FlatModel:
    model = nn.Linear(FEATURES, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.3)
    return FlatModel(model, square)


def gradient(shards: Shards, client: int, w: np.ndarray) -> np.ndarray:
    """The gradient of a client's quadratic, by NumPy."""
    x, y = (all_[shards.parts[client]].numpy() for all_ in (shards.x, shards.y))
    return x.T @ (x @ w - y) / len(y)


def net() -> nn.Module:
    """A small net with GroupNorm whose weights are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, 3))


def examples(count: int = 150, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of three classes."""
    draw = torch.Generator().manual_seed(seed)
    centres, y = torch.randn(3, 6, generator=draw) * 2, torch.arange(count) % 3
    return centres[y] + torch.randn(count, 6, generator=draw), y


def loss(output, y):
    return F.cross_entropy(output, y, reduction="none")
