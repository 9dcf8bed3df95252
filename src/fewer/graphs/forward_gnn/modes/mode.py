"""What a mode does, and what the modes share: layers that learn from a loss of their own output, watched by what they add to a prediction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.graphs._shared.layers import Graph
from fewer.graphs._shared.links import accuracy
from fewer.graphs._shared.training import History, Schedule
from fewer.graphs.forward_gnn.losses import class_logits, single_forward_loss
from fewer.graphs.forward_gnn.network import GraphNetwork, Shape
from fewer.graphs.forward_gnn.node_task import NodeTask

Loss = Callable[[Tensor], Tensor]  # of a layer's output at some rows


class Embedding(NamedTuple):
    """What a prediction is read from: a layer's output at a time step that counts, class nodes included."""

    step: int  # from 0
    layer: int  # from 1
    h: Float[Tensor, "nodes width"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the layers run on.

    Attributes:
        x: the nodes' features, not normalised.
        labels: what stands above the last layer, and beside the inputs where label features are appended to all; None: nothing.
    """

    graph: Graph
    x: Float[Tensor, "nodes features"]
    labels: Float[Tensor, "nodes classes"] | None = None


@dataclass(frozen=True, eq=False)
class LocalTask:
    """What every layer learns from.

    Attributes:
        rows: the nodes whose output the loss reads.
        draw: gives the loss of one training step.
    """

    inputs: Inputs
    rows: Int[Tensor, "rows"]
    draw: Callable[[], Loss]


@dataclass(frozen=True, eq=False)
class Watch:
    """What training is stopped by.

    Attributes:
        rows: the nodes whose output is read.
        evidence: what a layer's output there adds to the prediction.
        score: how good the summed evidence is, higher is better.
    """

    inputs: Inputs
    rows: Int[Tensor, "rows"]
    evidence: Callable[[Tensor], Tensor]
    score: Callable[[Tensor], float]


@dataclass(frozen=True)
class Training:
    """How a fit goes, and where it is noted.

    Attributes:
        cache: whether propagated inputs are kept; None: where that is quicker.
        generator: draws what is wrong: labels, or pairs without an edge.
    """

    schedule: Schedule
    history: History
    generator: torch.Generator | None = None
    cache: bool | None = None


class Mode(Protocol):
    """A way to train a network for node classes, and to read them.

    Attributes:
        has_class_nodes: whether classes are read from the embeddings of virtual nodes.
    """

    has_class_nodes: ClassVar[bool]

    def input_widths(self, shape: Shape) -> list[tuple[int, ...]]:
        """The widths of the parts of each layer's input."""
        ...

    def fit(self, network: GraphNetwork, task: NodeTask, training: Training) -> None: ...

    def embeddings(self, network: GraphNetwork, task: NodeTask) -> Iterator[Embedding]:
        """The layers' outputs at every time step that counts."""
        ...

    def class_scores(self, network: GraphNetwork, task: NodeTask) -> Float[Tensor, "nodes C"]:
        """The classes' scores at the real nodes, summed over what counts."""
        ...

    def local_losses(self, network: GraphNetwork, task: NodeTask, generator: torch.Generator | None) -> Iterator[Tensor]:
        """Each layer's own loss on the training nodes."""
        ...


class WithClassNodes(Mode):
    """What the modes have in common whose classes are nodes of the graph."""

    has_class_nodes: ClassVar[bool] = True

    @abstractmethod
    def run(self, network: GraphNetwork, inputs: Inputs) -> Iterator[Embedding]:
        """The layers' outputs on any graph."""

    def embeddings(self, network: GraphNetwork, task: NodeTask) -> Iterator[Embedding]:
        return self.run(network, inputs_of(task))

    def class_scores(self, network: GraphNetwork, task: NodeTask) -> Float[Tensor, "nodes C"]:
        total = task.x.new_zeros(task.real, network.shape.classes)
        for step, number, h in self.embeddings(network, task):
            virtual = network.kept(number)[step] if task.classes_kept else h[task.real :]
            total += class_logits(h[: task.real], virtual, task.temperature).softmax(dim=1)
        return total


def inputs_of(task: NodeTask) -> Inputs:
    return Inputs(task.graph, task.x, task.labels)


def local_task(task: NodeTask) -> LocalTask:
    """Cross-entropy of the class logits at the training nodes."""
    labelled = len(task.train)

    def loss(h: Tensor) -> Tensor:
        return single_forward_loss(h[:labelled], h[labelled:], task.y, task.temperature)

    return LocalTask(inputs_of(task), torch.cat([task.train, task.virtual]), lambda: loss)


def watch(task: NodeTask) -> Watch | None:
    """The validation nodes' class probabilities; None where there are no such nodes."""
    validation, y = task.validation, task.validation_y
    if validation is None or y is None:
        return None
    seen = len(validation)

    def evidence(h: Tensor) -> Tensor:
        return class_logits(h[:seen], h[seen:], task.temperature).softmax(dim=1)

    return Watch(inputs_of(task), torch.cat([validation, task.virtual]), evidence, lambda total: accuracy(total, y))


def summed(watch: Watch, outputs: Iterable[Embedding]) -> Tensor:
    """The evidence of all layers and time steps."""
    parts = (watch.evidence(each.h[watch.rows]) for each in outputs)
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def layer_optimizers(network: GraphNetwork, schedule: Schedule) -> list[torch.optim.Adam]:
    """An Adam for each layer."""
    return [torch.optim.Adam(layer.parameters(), lr=schedule.lr, fused=True) for layer in network.layers]


def update(optimizer: torch.optim.Adam, loss: Tensor, clip: float | None = None) -> float:
    """One step of one layer; returns its loss."""
    loss.backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)
