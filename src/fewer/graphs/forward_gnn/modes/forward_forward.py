"""Forward-Forward baselines: layers trained one after the other to give right labels a high goodness and wrong ones a low one.

"ff_labels": the label stands beside the features (training nodes: right or wrong, others: uniform), norm over both.
"ff_virtual": a training node is joined to the virtual node of its class, or of a wrong one.
Training: BCE of (sum of squares - theta) at the training nodes. Prediction: for every class, give it to all nodes that do not train;
the class's score is (mean of squares - theta), summed over the layers: C passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.graphs._shared.layers import EPSILON, Graph, GraphLayer, Matrix, compact, normalize_rows
from fewer.graphs._shared.links import accuracy
from fewer.graphs._shared.training import evaluating, train
from fewer.graphs.forward_gnn.class_nodes import class_edges, label_features
from fewer.graphs.forward_gnn.losses import forward_forward_loss, mean_goodness, sum_goodness
from fewer.graphs.forward_gnn.modes.mode import Embedding, Mode, Training, update
from fewer.graphs.forward_gnn.network import GraphNetwork, Shape
from fewer.graphs.forward_gnn.node_task import NodeTask


@dataclass(frozen=True, eq=False)
class Labelling:
    """The graph with one choice of labels: who is joined to which class, or what stands beside the features.

    Attributes:
        label: the label's part of layer 1's input, normalised with the features [N, C]; None where labels are edges.
        scale: what normalises the features' part [N, 1].
    """

    graph: Graph
    label: Tensor | None = None
    scale: Tensor | None = None

    def first(self, layer: GraphLayer, features: Tensor) -> Tensor:
        """Layer 1's output; `features` is what the features alone add before propagation."""
        if self.label is None or self.scale is None:
            return layer.combine([features], self.graph)
        return layer.combine([self.scale * features, layer.project(1, self.label)], self.graph)


class Runner:
    """A network on a graph: makes labellings and runs layers on them."""

    def __init__(self, model: GraphNetwork, problem: NodeTask, by_label: bool) -> None:
        self.model, self.problem, self.by_label = model, problem, by_label
        x = problem.x[: problem.real]
        if self.by_label:  # norm(cat(x, label)) differs from one labelling to the next by a factor for each row
            self.features: Matrix = compact(x, model.layers[0])
            self.squares = x.square().sum(dim=1, keepdim=True)
        else:
            self.features = compact(normalize_rows(torch.cat([x, model.class_features])), model.layers[0])

    def labelling(self, nodes: Int[Tensor, "labelled"], labels: Int[Tensor, "labelled"]) -> Labelling:
        """These nodes with these labels, the others without."""
        model, problem = self.model, self.problem
        if self.by_label:
            beside = label_features(problem.real, nodes, labels, model.shape.classes, model.config.unlabelled, like=problem.x)
            scale = 1 / ((self.squares + beside.square().sum(dim=1, keepdim=True)).sqrt() + EPSILON)
            return Labelling(problem.plain, scale * beside, scale)
        ends, _ = class_edges(nodes, labels, model.shape.classes, problem.real, problem.direction)
        edges = torch.cat([problem.plain.edge_index, ends], dim=1)
        return Labelling(Graph(edges, problem.real + model.shape.classes, problem.x.dtype))

    def true(self) -> Labelling:
        """The training nodes with their labels."""
        return self.labelling(self.problem.train, self.problem.y)

    def wrong(self, generator: torch.Generator | None) -> Labelling:
        """The training nodes with labels drawn from the wrong ones."""
        y, classes = self.problem.y, self.model.shape.classes
        shift = torch.randint(1, classes, y.shape, generator=generator, device=generator.device if generator else "cpu").to(y.device)
        return self.labelling(self.problem.train, (y + shift) % classes)

    def candidate(self, label: int) -> Labelling:
        """The training nodes with their labels, all others with this one."""
        problem = self.problem
        others = torch.ones(problem.real, dtype=torch.bool, device=problem.x.device)
        others[problem.train] = False
        rest = others.nonzero()[:, 0]
        return self.labelling(torch.cat([problem.train, rest]), torch.cat([problem.y, torch.full_like(rest, label)]))

    def first_features(self) -> Tensor:
        """What the features add to layer 1 before propagation: the same in every labelling."""
        return self.model.layers[0].project(0, self.features)

    def layer_output(self, i: int, labelling: Labelling, below: Tensor | None, features: Tensor | None) -> Tensor:
        """Layer i's output (from 0); layer 0 reads `features`, the others the output below."""
        layer = self.model.layers[i]
        if i == 0:
            assert features is not None
            return labelling.first(layer, features)
        assert below is not None
        return layer([normalize_rows(below)], labelling.graph)

    @torch.no_grad()
    def below(self, i: int, labelling: Labelling, features: Tensor | None) -> Tensor | None:
        """The output of layer i - 1."""
        h = None
        for j in range(i):
            h = self.layer_output(j, labelling, h, features)
        return h

    def goodness(self, h: Tensor) -> Tensor:
        """The score that a layer's output gives the labels, at the real nodes."""
        return mean_goodness(h[: self.problem.real], self.model.config.theta)

    def loss(self, i: int, true: Labelling, below_true: Tensor | None, wrong: Sequence[Labelling], frozen: Tensor | None) -> Tensor:
        """Layer i's loss; `frozen` is what the features add to a layer 1 that has been trained, `below_true` layer i's input."""
        features = self.first_features() if i == 0 else frozen
        inputs = [(true, below_true), *((labelling, self.below(i, labelling, frozen)) for labelling in wrong)]
        goodness = [sum_goodness(self.layer_output(i, labelling, below, features)[self.problem.train]) for labelling, below in inputs]
        return forward_forward_loss(goodness[0], torch.cat(goodness[1:]), self.model.config.theta)


class Watched:
    """The validation nodes with every class in turn, as far as the trained layers reach."""

    def __init__(self, run: Runner) -> None:
        self.run = run
        self.candidates = [run.candidate(label) for label in range(run.model.shape.classes)]
        self.inputs: list[Tensor | None] = [None] * len(self.candidates)
        self.so_far = run.problem.x.new_zeros(len(self.candidates), run.problem.real)

    @torch.no_grad()
    def outputs(self, i: int) -> list[Tensor]:
        """Layer i's output for every class."""
        features = self.run.first_features() if i == 0 else None
        return [self.run.layer_output(i, each, below, features) for each, below in zip(self.candidates, self.inputs, strict=True)]

    def scores(self, outputs: list[Tensor]) -> Tensor:
        """The classes' scores summed up to these outputs [C, N]."""
        return self.so_far + torch.stack([self.run.goodness(h) for h in outputs])

    def validate(self, i: int) -> float:
        problem = self.run.problem
        assert problem.validation_y is not None
        return accuracy(self.scores(self.outputs(i)).T[problem.validation], problem.validation_y)

    def freeze(self, i: int) -> None:
        """Take in a layer that has been trained."""
        outputs = self.outputs(i)
        self.so_far = self.scores(outputs)
        self.inputs = list[Tensor | None](outputs)


@dataclass(frozen=True)
class ForwardForward(Mode):
    """Both baselines: the label stands beside the features, or is an edge to a virtual node."""

    by_label: bool
    has_class_nodes: ClassVar[bool] = False

    def input_widths(self, shape: Shape) -> list[tuple[int, ...]]:
        """Layer 1 reads the features, and the label beside them in "ff_labels"."""
        label = (shape.classes,) if self.by_label else ()
        return [(shape.in_channels, *label), *((width,) for width in shape.widths[:-1])]

    def fit(self, network: GraphNetwork, task: NodeTask, training: Training) -> None:
        """Train layer 1 until its validation accuracy stops rising, freeze it, go on with layer 2, ...; wrong labels are drawn at every step."""
        run = Runner(network, task, self.by_label)
        watched = Watched(run) if task.validation is not None else None
        frozen: Tensor | None = None
        for i, layer in enumerate(network.layers):
            with evaluating(network):
                self._fit_layer(run, i, watched, frozen, training)
                if watched:
                    watched.freeze(i)
                if i == 0:
                    with torch.no_grad():
                        frozen = run.first_features()
            layer.zero_grad()

    def _fit_layer(self, run: Runner, i: int, watched: Watched | None, frozen: Tensor | None, training: Training) -> None:
        layer, true = run.model.layers[i], run.true()
        below_true = run.below(i, true, frozen)
        optimizer = torch.optim.Adam(layer.parameters(), lr=training.schedule.lr, fused=True)

        def step() -> float:
            wrong = [run.wrong(training.generator) for _ in range(run.model.config.num_negs)]
            return update(optimizer, run.loss(i, true, below_true, wrong, frozen))

        validate = (lambda: watched.validate(i)) if watched else None
        train(f"layer {i + 1}", [layer], step, validate, training.schedule, training.history)

    def class_scores(self, network: GraphNetwork, task: NodeTask) -> Float[Tensor, "nodes C"]:
        """The goodness of every class at the real nodes, summed over the layers."""
        run = Runner(network, task, self.by_label)
        features, scores = run.first_features(), []
        for label in range(network.shape.classes):
            candidate, h = run.candidate(label), None
            total = task.x.new_zeros(task.real)
            for i in range(len(network.layers)):
                h = run.layer_output(i, candidate, h, features)
                total += run.goodness(h)
            scores.append(total)
        return torch.stack(scores, dim=1)

    def embeddings(self, network: GraphNetwork, task: NodeTask) -> Iterator[Embedding]:
        """The layers' outputs with the training nodes' labels alone."""
        run = Runner(network, task, self.by_label)
        labelling, features, h = run.true(), run.first_features(), None
        for i in range(len(network.layers)):
            h = run.layer_output(i, labelling, h, features)
            yield Embedding(0, i + 1, h)

    def local_losses(self, network: GraphNetwork, task: NodeTask, generator: torch.Generator | None) -> Iterator[Tensor]:
        run = Runner(network, task, self.by_label)
        true, wrong = run.true(), [run.wrong(generator) for _ in range(network.config.num_negs)]
        with torch.no_grad():
            frozen = run.first_features()
        for i in range(len(network.layers)):
            yield run.loss(i, true, run.below(i, true, frozen), wrong, frozen)
