"""SF-Top-to-Loss: the loss of layer l sees e_l = mean(h_l, s_{l+1}, ..., s_L), s the stored, normalised outputs of the layers above.

h_l = GNN(s_{l-1}), s_0 the features as they are. States are those of the time step before and constants for who reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewer.graphs.forward_gnn.convolution import compact, normalize_rows
from fewer.graphs.forward_gnn.losses import single_forward_loss
from fewer.graphs.forward_gnn.node_problem import Embedding, NodeProblem
from fewer.graphs.forward_gnn.side_by_side import layer_optimizers, train_network, update
from fewer.graphs.forward_gnn.training import History, Schedule

if TYPE_CHECKING:
    from fewer.graphs.forward_gnn.model import ForwardGNN

CLIP = 1.0  # the norm that a layer's gradient is clipped to


def mean_with_above(h: Tensor, above: Sequence[Tensor]) -> Tensor:
    """e_l = mean(h_l, s_{l+1}, ..., s_L).

    >>> mean_with_above(torch.tensor([[1.0]]), [torch.tensor([[2.0]]), torch.tensor([[6.0]])])
    tensor([[3.]])
    """
    return torch.stack([h, *above]).mean(dim=0) if above else h


class TopToLoss:
    """A model on a graph."""

    def __init__(self, model: ForwardGNN, problem: NodeProblem) -> None:
        self.model, self.problem = model, problem
        self.features = compact(problem.x, model.layers[0])

    def output(self, i: int, below: Tensor | None) -> Tensor:
        """h of layer i (from 0), given the state below it (None: the features)."""
        layer, graph = self.model.layers[i], self.problem.graph
        if below is None:
            return layer([self.features], graph)
        return layer([torch.cat([below, self.problem.labels], dim=1) if self.model.append_label == "all" else below], graph)

    @torch.no_grad()
    def bottom_up(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and states of one pass."""
        outputs: list[Tensor] = []
        states: list[Tensor] = []
        for i in range(len(self.model.layers)):
            outputs.append(self.output(i, states[-1] if states else None))
            states.append(normalize_rows(outputs[-1]))
        return outputs, states

    def embeddings(self) -> Iterator[Embedding]:
        """e_1, ..., e_L of one pass."""
        outputs, states = self.bottom_up()
        for i, h in enumerate(outputs):
            yield Embedding(0, i + 1, mean_with_above(h, states[i + 1 :]))

    def loss(self, i: int, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Layer i's own loss, and its output, given the states of the time step before."""
        h = self.output(i, states[i - 1] if i else None)
        e, problem = mean_with_above(h, states[i + 1 :]), self.problem
        return single_forward_loss(e[problem.train], e[problem.virtual], problem.y, self.model.temperature), h


def embeddings(model: ForwardGNN, problem: NodeProblem) -> Iterator[Embedding]:
    yield from TopToLoss(model, problem).embeddings()


def local_losses(model: ForwardGNN, problem: NodeProblem) -> Iterator[Tensor]:
    """Each layer's own loss on the states of one bottom-up pass."""
    run = TopToLoss(model, problem)
    _, states = run.bottom_up()
    for i in range(len(model.layers)):
        yield run.loss(i, states)[0]


def fit(
    model: ForwardGNN, problem: NodeProblem, schedule: Schedule, history: History, *, cache: bool | None, generator: torch.Generator | None
) -> None:
    """All layers take a step of their own at every time step, their gradients clipped."""
    run = TopToLoss(model, problem)
    _, states = run.bottom_up()
    optimizers = layer_optimizers(model, schedule)

    def step() -> float:
        nonlocal states
        new, losses = [], []
        for i, optimizer in enumerate(optimizers):
            loss, h = run.loss(i, states)
            new.append(normalize_rows(h.detach()))
            losses.append(update(optimizer, loss, clip=CLIP))
        states = new
        return sum(losses) / len(losses)

    train_network(model, problem, step, run.embeddings, schedule, history)
