"""SF-Top-to-Loss: the loss of layer l sees e_l = mean(h_l, s_{l+1}, ..., s_L), s the stored, normalised outputs of the layers above.

h_l = GNN(s_{l-1}), s_0 the features as they are. States are those of the time step before and constants for who reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fewer.graphs._shared.layers import compact, normalize_rows
from fewer.graphs._shared.training import evaluating, train
from fewer.graphs.forward_gnn.modes.mode import (
    Embedding,
    Inputs,
    Training,
    WithClassNodes,
    inputs_of,
    layer_optimizers,
    local_task,
    mean,
    summed,
    update,
    watch,
)
from fewer.graphs.forward_gnn.modes.single_forward import input_widths, with_labels
from fewer.graphs.forward_gnn.network import GraphNetwork, Shape
from fewer.graphs.forward_gnn.node_task import NodeTask

CLIP = 1.0  # the norm that a layer's gradient is clipped to


def mean_with_above(h: Tensor, above: Sequence[Tensor]) -> Tensor:
    """e_l = mean(h_l, s_{l+1}, ..., s_L).

    >>> mean_with_above(torch.tensor([[1.0]]), [torch.tensor([[2.0]]), torch.tensor([[6.0]])])
    tensor([[3.]])
    """
    return torch.stack([h, *above]).mean(dim=0) if above else h


class States:
    """The outputs and states of a network on a graph."""

    def __init__(self, network: GraphNetwork, inputs: Inputs) -> None:
        self.network, self.inputs = network, inputs
        self.features = compact(inputs.x, network.layers[0])

    def output(self, i: int, below: Tensor | None) -> Tensor:
        """h of layer i (from 0), given the state below it (None: the features)."""
        read = self.features if below is None else with_labels(self.network, self.inputs, below)
        return self.network.layers[i]([read], self.inputs.graph)

    @torch.no_grad()
    def bottom_up(self) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and states of one pass."""
        outputs: list[Tensor] = []
        states: list[Tensor] = []
        for i in range(len(self.network.layers)):
            outputs.append(self.output(i, states[-1] if states else None))
            states.append(normalize_rows(outputs[-1]))
        return outputs, states

    def embeddings(self) -> Iterator[Embedding]:
        """e_1, ..., e_L of one pass."""
        outputs, states = self.bottom_up()
        for i, h in enumerate(outputs):
            yield Embedding(0, i + 1, mean_with_above(h, states[i + 1 :]))

    def read(self, i: int, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(e_i, h_i) of layer i (from 0), given the states of the time step before."""
        h = self.output(i, states[i - 1] if i else None)
        return mean_with_above(h, states[i + 1 :]), h


class TopToLoss(WithClassNodes):
    """SF-Top-to-Loss."""

    def input_widths(self, shape: Shape) -> list[tuple[int, ...]]:
        """As SF's; all layers must be of one width, as means are taken over them."""
        if len(set(shape.widths)) > 1:
            raise ValueError(f"hidden_channels are {list(shape.widths)}; top_to_loss takes means over layers: expected equal widths")
        return input_widths(shape)

    def run(self, network: GraphNetwork, inputs: Inputs) -> Iterator[Embedding]:
        return States(network, inputs).embeddings()

    def fit(self, network: GraphNetwork, task: NodeTask, training: Training) -> None:
        """All layers take a step of their own at every time step, their gradients clipped."""
        moving, local, watched = States(network, inputs_of(task)), local_task(task), watch(task)
        with evaluating(network):
            _, states = moving.bottom_up()
        optimizers = layer_optimizers(network, training.schedule)

        def step() -> float:
            nonlocal states
            new, losses, loss = [], [], local.draw()
            for i, optimizer in enumerate(optimizers):
                e, h = moving.read(i, states)
                new.append(normalize_rows(h.detach()))
                losses.append(update(optimizer, loss(e[local.rows]), clip=CLIP))
            states = new
            return mean(losses)

        def validate() -> float:
            assert watched is not None
            return watched.score(summed(watched, moving.embeddings()))

        train("network", [network], step, validate if watched else None, training.schedule, training.history)

    def local_losses(self, network: GraphNetwork, task: NodeTask, generator: torch.Generator | None) -> Iterator[Tensor]:
        """On the states of one bottom-up pass."""
        moving, local = States(network, inputs_of(task)), local_task(task)
        _, states = moving.bottom_up()
        for i in range(len(network.layers)):
            yield local.draw()(moving.read(i, states)[0][local.rows])
