"""SF, single forward: layers trained one after the other, each from a loss of its own output.

Layer l: h = GNN(norm(x)), x the frozen output of the layer below; for classes the loss is the cross-entropy of
h_train h_virtual^T / temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fewer.graphs._shared.layers import GraphLayer, Matrix, compact, normalize_rows
from fewer.graphs._shared.sparse import SparseMatrix
from fewer.graphs._shared.training import evaluating, train
from fewer.graphs.forward_gnn.modes.mode import Embedding, Inputs, LocalTask, Training, Watch, WithClassNodes, local_task, watch
from fewer.graphs.forward_gnn.network import GraphNetwork, Shape
from fewer.graphs.forward_gnn.node_task import NodeTask
from fewer.meters import memory_for


def input_widths(shape: Shape) -> list[tuple[int, ...]]:
    """Each layer reads the features or the layer below, with label features where they are appended to all."""
    first = shape.in_channels + shape.classes * (shape.append_label is not None)
    return [(first,), *((width + shape.classes * (shape.append_label == "all"),) for width in shape.widths[:-1])]


def first_input(network: GraphNetwork, inputs: Inputs) -> Matrix:
    """norm(x) of the features."""
    return compact(normalize_rows(inputs.x), network.layers[0])


def next_input(network: GraphNetwork, inputs: Inputs, h: Tensor) -> Tensor:
    """norm(x) of a layer's output."""
    return normalize_rows(with_labels(network, inputs, h))


def with_labels(network: GraphNetwork, inputs: Inputs, h: Tensor) -> Tensor:
    """The label features beside a layer's output, where they are appended to all."""
    return torch.cat([h, inputs.labels], dim=1) if network.shape.append_label == "all" and inputs.labels is not None else h


def run(network: GraphNetwork, inputs: Inputs) -> Iterator[Embedding]:
    """The layers' outputs, from one pass; one is held at a time."""
    x: Matrix = first_input(network, inputs)
    for number, layer in enumerate(network.layers, start=1):
        h = layer([x], inputs.graph)
        yield Embedding(0, number, h)
        x = next_input(network, inputs, h)


def layer_inputs(network: GraphNetwork, inputs: Inputs) -> list[Matrix]:
    """What each layer reads."""
    found: list[Matrix] = [first_input(network, inputs)]
    with torch.no_grad():
        for layer in network.layers[:-1]:
            found.append(next_input(network, inputs, layer([found[-1]], inputs.graph)))
    return found


def keeps_propagation(layer: GraphLayer, x: Matrix, cache: bool | None) -> bool:
    """Whether A x is kept while the layer trains: by default where x is dense, as A x then costs no more to multiply than x."""
    return layer.kind is not None and (not isinstance(x, SparseMatrix) if cache is None else cache)


def layer_step(layer: GraphLayer, x: Matrix, task: LocalTask, lr: float, cache: bool | None = None) -> Callable[[], float]:
    """A function that takes one step of Adam on the layer's own loss, for a constant input, and returns the loss before it."""
    outputs = layer.outputs_of(x, task.inputs.graph, task.rows, keeps_propagation(layer, x, cache))
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = task.draw()(outputs())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def fit_in_turn(network: GraphNetwork, task: LocalTask, watched: Watch | None, training: Training) -> None:
    """Train layer 1 until its validation score stops rising, freeze it, go on with layer 2 on its output, ..."""
    x: Matrix = first_input(network, task.inputs)
    shared = watched is not None and watched.inputs.x is task.inputs.x
    seen = x if shared or watched is None else first_input(network, watched.inputs)
    so_far: Tensor | float = 0.0
    for number, layer in enumerate(network.layers, start=1):
        with memory_for("kept propagation"):
            step = layer_step(layer, x, task, training.schedule.lr, training.cache)
        judged = judge(layer, seen, watched, so_far, training.cache) if watched else None
        score = (lambda judged=judged, watched=watched: watched.score(judged())) if watched and judged else None
        train(f"layer {number}", [layer], step, score, training.schedule, training.history)
        layer.zero_grad()
        with torch.no_grad(), evaluating(layer):
            so_far = judged() if judged else so_far
            if number < len(network.layers):
                moved = next_input(network, task.inputs, layer([x], task.inputs.graph))
                seen = moved if shared or not watched else next_input(network, watched.inputs, layer([seen], watched.inputs.graph))
                x = moved


def judge(layer: GraphLayer, x: Matrix, watched: Watch, so_far: Tensor | float, cache: bool | None) -> Callable[[], Tensor]:
    """A function that adds a layer's evidence, for its present weights and a constant input, to that of the layers below."""
    with memory_for("kept propagation"):
        outputs = layer.outputs_of(x, watched.inputs.graph, watched.rows, keeps_propagation(layer, x, cache))
    return lambda: so_far + watched.evidence(outputs())


class SingleForward(WithClassNodes):
    """SF."""

    def input_widths(self, shape: Shape) -> list[tuple[int, ...]]:
        return input_widths(shape)

    def run(self, network: GraphNetwork, inputs: Inputs) -> Iterator[Embedding]:
        return run(network, inputs)

    def fit(self, network: GraphNetwork, task: NodeTask, training: Training) -> None:
        fit_in_turn(network, local_task(task), watch(task), training)

    def local_losses(self, network: GraphNetwork, task: NodeTask, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Their graphs reach no other layer."""
        local = local_task(task)
        x: Matrix = first_input(network, local.inputs)
        for layer in network.layers:
            h = layer([x], task.graph)
            yield local.draw()(h[local.rows])
            x = next_input(network, local.inputs, h.detach())
