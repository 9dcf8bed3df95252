"""SF-Top-to-Input: layer l reads cat(norm(x_below), norm(x_above)); above the last layer stand the labels, one-hot, or nothing (links).

Both are states of the time step before (or of this one, where it updates layers in turn) and constants for the layer that reads them:
no gradient leaves a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fewer.graphs._shared.layers import normalize_rows
from fewer.graphs._shared.training import evaluating, train
from fewer.graphs.forward_gnn.modes.mode import (
    Embedding,
    Inputs,
    LocalTask,
    Training,
    Watch,
    WithClassNodes,
    inputs_of,
    layer_optimizers,
    local_task,
    mean,
    summed,
    update,
    watch,
)
from fewer.graphs.forward_gnn.modes.single_forward import first_input, with_labels
from fewer.graphs.forward_gnn.modes.single_forward import input_widths as widths_below
from fewer.graphs.forward_gnn.network import GraphNetwork, Shape
from fewer.graphs.forward_gnn.node_task import NodeTask

Visit = Callable[[int, Tensor], Tensor]  # (layer from 0, output) -> what is kept of it
Run = Callable[[int, Tensor | None, Tensor | None], Tensor]  # (layer from 0, state below or None, state above or None) -> output


def update_order(layers: int, alternating: bool) -> list[int]:
    """The order in which layers (from 0) are updated: bottom up, or the even-numbered ones (counted from 1) before the odd.

    >>> update_order(5, alternating=True)
    [1, 3, 0, 2, 4]
    """
    return [*range(1, layers, 2), *range(0, layers, 2)] if alternating else list(range(layers))


def input_widths(shape: Shape) -> list[tuple[int, ...]]:
    """What SF's layers read, and beside it the state of the layer above or the labels."""
    above = [*((width,) for width in shape.widths[1:]), (shape.classes,) if shape.classes else ()]
    return [(*below, *up) for below, up in zip(widths_below(shape), above, strict=True)]


def time_step(run: Run, states: list[Tensor], above_last: Tensor | None, alternating: bool, visit: Visit) -> list[Tensor]:
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
    for i in update_order(len(states), alternating):
        above = seen[i + 1] if i + 1 < len(states) else above_last
        new[i] = normalize_rows(visit(i, run(i, seen[i - 1] if i else None, above)))
    return new


class States:
    """The states of a network on a graph, and how they move."""

    def __init__(self, network: GraphNetwork, inputs: Inputs) -> None:
        self.network, self.inputs = network, inputs
        self.features = first_input(network, inputs)
        self.above_last = None if inputs.labels is None else normalize_rows(inputs.labels)
        self.bottom: Tensor | None = None  # what the features add to layer 1, while its weights stay as they are

    def run(self, i: int, below: Tensor | None, above: Tensor | None) -> Tensor:
        """Layer i's output."""
        layer = self.network.layers[i]
        if below is None:
            first = layer.project(0, self.features) if self.bottom is None else self.bottom
        else:
            first = layer.project(0, with_labels(self.network, self.inputs, below))
        return layer.combine([first] if above is None else [first, layer.project(1, above)], self.inputs.graph)

    @torch.no_grad()
    def bottom_up(self) -> list[Tensor]:
        """The states that a pass from below with zeros above gives."""
        states: list[Tensor] = []
        for i, layer in enumerate(self.network.layers):
            nothing = self.inputs.x.new_zeros(len(self.inputs.x), layer.widths[-1]) if len(layer.widths) > 1 else None
            states.append(normalize_rows(self.run(i, states[-1] if states else None, nothing)))
        return states

    def move(self, states: list[Tensor], visit: Visit) -> list[Tensor]:
        return time_step(self.run, states, self.above_last, self.network.config.alternating_update, visit)

    @torch.no_grad()
    def embeddings(self) -> Iterator[Embedding]:
        """The layers' outputs at every time step that counts, from the bottom-up start, without a change of the weights."""
        config = self.network.config
        self.bottom = self.network.layers[0].project(0, self.features)
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


def run(network: GraphNetwork, inputs: Inputs) -> Iterator[Embedding]:
    return States(network, inputs).embeddings()


def fit_side_by_side(network: GraphNetwork, task: LocalTask, watched: Watch | None, training: Training) -> None:
    """All layers take a step of their own at every time step."""
    moving = States(network, task.inputs)
    with evaluating(network):
        states = moving.bottom_up()
    optimizers = layer_optimizers(network, training.schedule)

    def step() -> float:
        nonlocal states
        loss, losses = task.draw(), [0.0] * len(optimizers)

        def visit(i: int, h: Tensor) -> Tensor:
            losses[i] = update(optimizers[i], loss(h[task.rows]))
            return h.detach()

        states = moving.move(states, visit)
        return mean(losses)

    def validate() -> float:
        assert watched is not None
        return watched.score(summed(watched, run(network, watched.inputs)))

    train("network", [network], step, validate if watched else None, training.schedule, training.history)


class TopToInput(WithClassNodes):
    """SF-Top-to-Input."""

    def input_widths(self, shape: Shape) -> list[tuple[int, ...]]:
        return input_widths(shape)

    def run(self, network: GraphNetwork, inputs: Inputs) -> Iterator[Embedding]:
        return run(network, inputs)

    def fit(self, network: GraphNetwork, task: NodeTask, training: Training) -> None:
        fit_side_by_side(network, local_task(task), watch(task), training)

    def local_losses(self, network: GraphNetwork, task: NodeTask, generator: torch.Generator | None) -> Iterator[Tensor]:
        """On the states of the bottom-up start."""
        moving, local = States(network, inputs_of(task)), local_task(task)
        losses: list[Tensor] = [task.x.new_zeros(())] * len(network.layers)

        def visit(i: int, h: Tensor) -> Tensor:
            losses[i] = local.draw()(h[local.rows])
            return h.detach()

        moving.move(moving.bottom_up(), visit)
        yield from losses
