"""SF-Top-to-Input: layer l reads cat(norm(x_below), norm(x_above)); above the last layer stand the labels, one-hot.

Both are states of the time step before (or of this one, where it updates layers in turn) and constants for the layer that reads them:
no gradient leaves a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewer.graphs.forward_gnn.convolution import GraphLayer, normalize_rows
from fewer.graphs.forward_gnn.losses import single_forward_loss
from fewer.graphs.forward_gnn.node_problem import Embedding, NodeProblem
from fewer.graphs.forward_gnn.side_by_side import layer_optimizers, train_network, update
from fewer.graphs.forward_gnn.single_forward import first_input
from fewer.graphs.forward_gnn.single_forward import input_widths as widths_below
from fewer.graphs.forward_gnn.training import History, Schedule

if TYPE_CHECKING:
    from fewer.graphs.forward_gnn.model import ForwardGNN

Visit = Callable[[int, Tensor], Tensor]  # (layer from 0, output) -> what is kept of it


def update_order(layers: int, alternating: bool) -> list[int]:
    """The order in which layers (from 0) are updated: bottom up, or the even-numbered ones (counted from 1) before the odd.

    >>> update_order(5, alternating=True)
    [1, 3, 0, 2, 4]
    """
    return [*range(1, layers, 2), *range(0, layers, 2)] if alternating else list(range(layers))


def input_widths(model: ForwardGNN) -> list[tuple[int, ...]]:
    """What SF's layers read, and beside it the state of the layer above or the labels."""
    above = [*model.widths[1:], model.num_classes]
    return [(*below, width) for below, width in zip(widths_below(model), above, strict=True)]


def time_step(
    layers: Sequence[GraphLayer],
    run: Callable[[int, Tensor | None, Tensor], Tensor],
    states: list[Tensor],
    above_last: Tensor,
    alternating: bool,
    visit: Visit,
) -> list[Tensor]:
    """One update of every layer's state.

    Args:
        run: gives a layer's output from the states below (None: the features) and above.
        states: those of the time step before; normalised.
        above_last: what stands above the last layer.
        alternating: read this step's states where they are there already.
        visit: gets each output as it comes.
    """
    new = list(states)
    seen = new if alternating else states
    for i in update_order(len(layers), alternating):
        above = seen[i + 1] if i + 1 < len(layers) else above_last
        new[i] = normalize_rows(visit(i, run(i, seen[i - 1] if i else None, above)))
    return new


class TopToInput:
    """The states of a model on a graph, and how they move."""

    def __init__(self, model: ForwardGNN, problem: NodeProblem) -> None:
        self.model, self.problem = model, problem
        self.features = first_input(model, problem)
        self.above_last = normalize_rows(problem.labels)
        self.bottom: Tensor | None = None  # what the features add to layer 1, while its weights stay as they are

    def run(self, i: int, below: Tensor | None, above: Tensor) -> Tensor:
        """Layer i's output."""
        layer = self.model.layers[i]
        if below is None:
            first = layer.project(0, self.features) if self.bottom is None else self.bottom
        else:
            if self.model.append_label == "all":
                below = torch.cat([below, self.problem.labels], dim=1)
            first = layer.project(0, below)
        return layer.combine([first, layer.project(1, above)], self.problem.graph)

    @torch.no_grad()
    def bottom_up(self) -> list[Tensor]:
        """The states that a pass from below with zeros above gives."""
        states: list[Tensor] = []
        for i, layer in enumerate(self.model.layers):
            zeros = self.above_last.new_zeros(len(self.above_last), layer.widths[-1])
            states.append(normalize_rows(self.run(i, states[-1] if states else None, zeros)))
        return states

    def move(self, states: list[Tensor], visit: Visit) -> list[Tensor]:
        alternating = self.model.config.alternating_update
        return time_step(list(self.model.layers), self.run, states, self.above_last, alternating, visit)

    @torch.no_grad()
    def embeddings(self) -> Iterator[Embedding]:
        """The layers' outputs at every time step that counts, from the bottom-up start, without a change of the weights."""
        config = self.model.config
        self.bottom = self.model.layers[0].project(0, self.features)
        states = self.bottom_up()
        for step in range(1, config.test_time_steps + 1):
            outputs: list[Tensor] = [*states]

            def keep(i: int, h: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
                outputs[i] = h
                return h

            states = self.move(states, keep)
            if step >= config.first_counted_step:
                for number, h in enumerate(outputs, start=1):
                    yield Embedding(step - config.first_counted_step, number, h)
        self.bottom = None


def embeddings(model: ForwardGNN, problem: NodeProblem) -> Iterator[Embedding]:
    yield from TopToInput(model, problem).embeddings()


def local_losses(model: ForwardGNN, problem: NodeProblem) -> Iterator[Tensor]:
    """Each layer's own loss on the states of the bottom-up start."""
    run = TopToInput(model, problem)
    losses: list[Tensor] = [problem.x.new_zeros(())] * len(model.layers)

    def visit(i: int, h: Tensor) -> Tensor:
        losses[i] = single_forward_loss(h[problem.train], h[problem.virtual], problem.y, model.temperature)
        return h.detach()

    run.move(run.bottom_up(), visit)
    yield from losses


def fit(
    model: ForwardGNN, problem: NodeProblem, schedule: Schedule, history: History, *, cache: bool | None, generator: torch.Generator | None
) -> None:
    """All layers take a step of their own at every time step."""
    run = TopToInput(model, problem)
    states = run.bottom_up()
    optimizers = layer_optimizers(model, schedule)

    def step() -> float:
        nonlocal states
        losses = [0.0] * len(model.layers)

        def visit(i: int, h: Tensor) -> Tensor:
            loss = single_forward_loss(h[problem.train], h[problem.virtual], problem.y, model.temperature)
            losses[i] = update(optimizers[i], loss)
            return h.detach()

        states = run.move(states, visit)
        return sum(losses) / len(losses)

    train_network(model, problem, step, lambda: run.embeddings(), schedule, history)
