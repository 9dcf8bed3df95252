"""Training all layers at every time step, each with an optimiser of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewer.graphs.forward_gnn.losses import accuracy
from fewer.graphs.forward_gnn.node_problem import Embedding, NodeProblem
from fewer.graphs.forward_gnn.training import History, Schedule, train

if TYPE_CHECKING:
    from fewer.graphs.forward_gnn.model import ForwardGNN


def layer_optimizers(model: ForwardGNN, schedule: Schedule) -> list[torch.optim.Adam]:
    """An Adam for each layer."""
    return [torch.optim.Adam(layer.parameters(), lr=schedule.lr, fused=True) for layer in model.layers]


def update(optimizer: torch.optim.Adam, loss: Tensor, clip: float | None = None) -> float:
    """One step of one layer; returns its loss."""
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train_network(
    model: ForwardGNN,
    problem: NodeProblem,
    step: Callable[[], float],
    embeddings: Callable[[], Iterator[Embedding]],
    schedule: Schedule,
    history: History,
) -> None:
    """Train all layers together, watched by the accuracy of the class probabilities that the embeddings give."""
    validation, y = problem.validation, problem.validation_y

    def validate() -> float:
        assert validation is not None
        assert y is not None
        return accuracy(model.summed_probabilities(embeddings(), problem)[validation], y)

    train("network", [model], step, validate if validation is not None else None, schedule, history)
