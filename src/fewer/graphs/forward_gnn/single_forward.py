"""SF, single forward: layers trained one after the other, each from the class logits of its own output.

Layer l: h = GNN(norm(x)), x the frozen output of the layer below; loss = cross-entropy of h_train h_virtual^T / temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fewer.graphs.forward_gnn.convolution import GraphLayer, Matrix, compact, normalize_rows
from fewer.graphs.forward_gnn.losses import accuracy, class_logits, single_forward_loss
from fewer.graphs.forward_gnn.node_problem import Embedding, NodeProblem
from fewer.graphs.forward_gnn.sparse import SparseMatrix
from fewer.graphs.forward_gnn.training import History, Schedule, train
from fewer.meters import memory_for

if TYPE_CHECKING:
    from fewer.graphs.forward_gnn.model import ForwardGNN


def input_widths(model: ForwardGNN) -> list[tuple[int, ...]]:
    """Each layer reads the features or the layer below, with label features where the model appends them to all."""
    labels = model.num_classes
    first = model.in_channels + labels * (model.append_label is not None)
    return [(first,), *((width + labels * (model.append_label == "all"),) for width in model.widths[:-1])]


def first_input(model: ForwardGNN, problem: NodeProblem) -> Matrix:
    """norm(x) of the features."""
    return compact(normalize_rows(problem.x), model.layers[0])


def next_input(model: ForwardGNN, problem: NodeProblem, h: Tensor) -> Tensor:
    """norm(x) of a layer's output."""
    return normalize_rows(torch.cat([h, problem.labels], dim=1) if model.append_label == "all" else h)


def fit(
    model: ForwardGNN, problem: NodeProblem, schedule: Schedule, history: History, *, cache: bool | None, generator: torch.Generator | None
) -> None:
    """Train layer 1 until its validation accuracy stops rising, freeze it, go on with layer 2 on its output, ..."""
    x: Matrix = first_input(model, problem)
    so_far = problem.x.new_zeros(len(problem.validation), model.num_classes) if problem.validation is not None else None
    for number, layer in enumerate(model.layers, start=1):
        so_far = _fit_layer(model, f"layer {number}", layer, x, so_far, problem, schedule, history, cache)
        if number < len(model.layers):
            with torch.no_grad():
                x = next_input(model, problem, layer([x], problem.graph))


@torch.no_grad()
def constant_inputs(model: ForwardGNN, data: Any) -> tuple[NodeProblem, list[Matrix]]:
    """A graph made ready, and what each layer of the model reads there."""
    problem = model.prepare(data)
    inputs: list[Matrix] = [first_input(model, problem)]
    for layer in model.layers[:-1]:
        inputs.append(next_input(model, problem, layer([inputs[-1]], problem.graph)))
    return problem, inputs


def keeps_propagation(layer: GraphLayer, x: Matrix, cache: bool | None) -> bool:
    """Whether A x is kept while the layer trains: by default where x is dense, as A x then costs no more to multiply than x."""
    return layer.kind is not None and (not isinstance(x, SparseMatrix) if cache is None else cache)


def layer_step(
    model: ForwardGNN, layer: GraphLayer, x: Matrix, problem: NodeProblem, lr: float, cache: bool | None = None
) -> Callable[[], float]:
    """A function that takes one step of Adam on the layer's own loss, for a constant input, and returns the loss before it."""
    rows, labelled = torch.cat([problem.train, problem.virtual]), len(problem.train)
    outputs = layer.outputs_of(x, problem.graph, rows, keeps_propagation(layer, x, cache))
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        h = outputs()
        loss = single_forward_loss(h[:labelled], h[labelled:], problem.y, model.temperature)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def _fit_layer(
    model: ForwardGNN,
    stage: str,
    layer: GraphLayer,
    x: Matrix,
    so_far: Tensor | None,
    problem: NodeProblem,
    schedule: Schedule,
    history: History,
    cache: bool | None,
) -> Tensor | None:
    """Train one layer on a constant input; returns the validation nodes' class probabilities summed up to it."""
    with memory_for("kept propagation"):
        step = layer_step(model, layer, x, problem, schedule.lr, cache)
        watched = None
        if problem.validation is not None:
            rows = torch.cat([problem.validation, problem.virtual])
            watched = layer.outputs_of(x, problem.graph, rows, keeps_propagation(layer, x, cache))

    @torch.no_grad()
    def summed() -> Tensor:
        assert watched is not None
        assert so_far is not None
        h = watched()
        seen = len(so_far)
        return so_far + class_logits(h[:seen], h[seen:], model.temperature).softmax(dim=1)

    def validate() -> float:
        assert problem.validation_y is not None
        return accuracy(summed(), problem.validation_y)

    train(stage, [layer], step, validate if watched else None, schedule, history)
    layer.zero_grad()
    return summed() if watched else None


def embeddings(model: ForwardGNN, problem: NodeProblem) -> Iterator[Embedding]:
    """The layers' outputs, from one pass; one is held at a time."""
    x: Matrix = first_input(model, problem)
    for number, layer in enumerate(model.layers, start=1):
        h = layer([x], problem.graph)
        yield Embedding(0, number, h)
        x = next_input(model, problem, h)


def local_losses(model: ForwardGNN, problem: NodeProblem) -> Iterator[Tensor]:
    """Each layer's own loss; its graph reaches no other layer."""
    x: Matrix = first_input(model, problem)
    for layer in model.layers:
        h = layer([x], problem.graph)
        yield single_forward_loss(h[problem.train], h[problem.virtual], problem.y, model.temperature)
        x = next_input(model, problem, h.detach())
