"""`ForwardGNN`: a graph network for node classification whose layers learn each from a loss of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.checks import check_choice, check_positive, check_whole
from fewer.graphs._shared.layers import Convolution, layer_widths
from fewer.graphs._shared.training import Callback, History, Schedule, evaluating
from fewer.graphs.forward_gnn.class_nodes import DIRECTIONS, Direction
from fewer.graphs.forward_gnn.modes import MODES
from fewer.graphs.forward_gnn.modes.mode import Training
from fewer.graphs.forward_gnn.network import ForwardGNNConfig, GraphNetwork, Shape
from fewer.graphs.forward_gnn.node_task import NodeTask

ModeName = Literal["single", "top_to_input", "top_to_loss", "ff_labels", "ff_virtual"]


class ForwardGNN(GraphNetwork):
    """A graph neural network trained without end-to-end backpropagation: no gradient crosses a layer.

    Each layer is a PyG convolution and ReLU. In the first three modes the classes are virtual nodes, and a node's class is read from
    the inner products of its embedding with theirs.

    Args:
        in_channels: F, features of a node.
        hidden_channels: width of every layer, or one width a layer.
        num_layers: L.
        num_classes: C, at least 2.
        conv: "gcn", "sage" (mean), "gat" (4 heads, concatenated), or a function (in, out) -> MessagePassing.
        mode: "single" (layers one after the other), "top_to_input" and "top_to_loss" (all layers at every step, with signals from
            above), "ff_labels" and "ff_virtual" (Forward-Forward, with negative examples).
        temperature: of the class probabilities.
        append_label: append label features to the "input" of layer 1, or to the inputs of "all" layers.
        aug_edge_direction: "bidirection", or "unidirection" for edges from training nodes to class nodes alone.
        config: default `ForwardGNNConfig()`.

    Attributes:
        layers: the `GraphLayer`s; `.conv` is PyG's convolution.
        class_features: [C, F], the virtual nodes' features, random normal (from torch's global generator, as the weights are).

    Raises:
        ValueError: a value that cannot be used.

    Examples:
        >>> from torch_geometric.datasets import KarateClub
        >>> data = KarateClub()[0]  # four nodes have a label
        >>> model = ForwardGNN(data.num_features, 16, num_layers=2, num_classes=4)
        >>> history = model.fit(data, epochs=5)
        >>> model.predict(data, ~data.train_mask).shape
        torch.Size([30])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        num_layers: int,
        num_classes: int,
        conv: Convolution = "gcn",
        mode: ModeName = "single",
        temperature: float = 1.0,
        append_label: Literal["input", "all"] | None = None,
        aug_edge_direction: Direction = "bidirection",
        config: ForwardGNNConfig | None = None,
    ) -> None:
        check_whole(in_channels=in_channels)
        check_whole(least=2, num_classes=num_classes)
        check_choice(MODES, mode=mode)
        check_choice((None, "input", "all"), append_label=append_label)
        check_choice(DIRECTIONS, aug_edge_direction=aug_edge_direction)
        check_positive(temperature=temperature)
        if mode.startswith("ff") and append_label is not None:
            raise ValueError(f"append_label is {append_label!r}; {mode} gives labels in its own way: expected None")
        config, algorithm = config or ForwardGNNConfig(), MODES[mode]
        shape = Shape(in_channels, tuple(layer_widths(hidden_channels, num_layers)), num_classes, append_label)
        kept_steps = (config.counted_steps if mode == "top_to_input" else 1) if algorithm.has_class_nodes else 0
        super().__init__(shape, algorithm.input_widths(shape), conv, config, kept_steps)
        self.num_classes, self.temperature = num_classes, temperature
        self.mode: ModeName = mode
        self.aug_edge_direction: Direction = aug_edge_direction
        self._algorithm = algorithm

    def fit(
        self,
        data: Any,
        *,
        epochs: int = 1000,
        patience: int | None = 100,
        lr: float = 1e-3,
        callbacks: Iterable[Callback] = (),
        generator: torch.Generator | None = None,
        validate_every: int = 2,
        cache: bool | None = None,
    ) -> History:
        """Train on the nodes of `train_mask`, stopped early by those of `val_mask` where the graph has one.

        Args:
            data: a PyG `Data` with x [N, F] float, edge_index [2, E], y [N] integers, train_mask [N]. Only labels of training and
                validation nodes are read, the latter for early stopping alone. Edge weights are not read.
            epochs: at most, for each layer in turn, or for all side by side in the top-down modes.
            patience: epochs without a better validation accuracy before stopping; the best state is kept. None never stops and
                keeps the last state.
            lr: learning rate of Adam, one a layer.
            callbacks: each is called with every `Epoch` as it ends.
            generator: draws the wrong labels of the Forward-Forward modes.
            validate_every: epochs from one look at the validation nodes to the next.
            cache: in mode "single" with GCN or SAGE, keep the propagated input of the layer in training (a matrix as large as its
                input): a step is then one dense product. By default where the input is dense; features that are mostly zero are
                multiplied quicker as they are.

        Returns:
            The history: stages "layer 1", "layer 2", ..., or "network" in the top-down modes.

        Raises:
            ValueError: a graph that cannot be used.
            FloatingPointError: a loss is not finite; the best state so far is kept.
        """
        training = Training(Schedule(epochs, patience, lr, validate_every, tuple(callbacks)), History(), generator, cache)
        task = self.prepare(data, watch=True)
        self._algorithm.fit(self, task, training)
        if self._algorithm.has_class_nodes:
            with torch.no_grad(), evaluating(self):
                for step, number, h in self._algorithm.embeddings(self, task):
                    self.kept(number)[step] = h[task.real :]
        return training.history.stop_clock()

    def predict(self, data: Any, mask: Bool[Tensor, "nodes"] | None = None, *, keep_virtual: bool = False) -> Int[Tensor, "asked"]:
        """The classes of the nodes.

        Args:
            data: the graph of the fit, or another one with training nodes of its own, whose labels are part of the input.
            mask: the nodes asked for; by default all. Training nodes' classes are an input: theirs are no predictions.
            keep_virtual: read the classes from the class nodes' embeddings at the end of the fit; the graph's own labels are not
                used then, and a graph without any will do.

        Raises:
            ValueError: a graph that cannot be used: another feature width, no training nodes, ...
        """
        return self._scores(data, mask, keep_virtual).argmax(dim=1)

    def predict_proba(
        self, data: Any, mask: Bool[Tensor, "nodes"] | None = None, *, keep_virtual: bool = False
    ) -> Float[Tensor, "asked C"]:
        """The mean class probabilities over the layers (and time steps), or the softmax of the summed goodness; as `predict`."""
        scores = self._scores(data, mask, keep_virtual)
        return scores / scores.sum(dim=1, keepdim=True) if self._algorithm.has_class_nodes else scores.softmax(dim=1)

    @torch.no_grad()
    def embed(self, data: Any) -> list[Float[Tensor, "nodes width"]]:
        """What each layer's classes are read from, at the graph's own nodes: its output (in "top_to_loss" its mean with those above)."""
        task = self.prepare(data)
        with evaluating(self):
            last = {each.layer: each.h for each in self._algorithm.embeddings(self, task)}
        return [last[number][: task.real] for number in sorted(last)]

    def local_losses(self, data: Any, generator: torch.Generator | None = None) -> list[Float[Tensor, ""]]:
        """Each layer's own loss on the training nodes, for optimisers of your own: no loss's graph reaches another layer.

        Examples:
            >>> from torch_geometric.datasets import KarateClub
            >>> data = KarateClub()[0]
            >>> losses = ForwardGNN(data.num_features, 16, num_layers=2, num_classes=4).local_losses(data)
            >>> len(losses)
            2
        """
        return list(self._algorithm.local_losses(self, self.prepare(data), generator))

    @torch.no_grad()
    def _scores(self, data: Any, mask: Tensor | None, keep_virtual: bool) -> Tensor:
        task = self.prepare(data, keep_virtual=keep_virtual)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (task.real,)):
            raise ValueError(f"mask is {tuple(mask.shape)} {mask.dtype}; expected booleans [{task.real}], true at the nodes asked for")
        if keep_virtual and self._algorithm.has_class_nodes and bool(self.kept(1).isnan().any()):
            raise ValueError("keep_virtual=True on a model that was not fitted; expected a fit before: call fit, or load its state_dict")
        with evaluating(self):
            scores = self._algorithm.class_scores(self, task)
        return scores if mask is None else scores[mask.to(scores.device)]

    def prepare(self, data: Any, *, watch: bool = False, keep_virtual: bool = False) -> NodeTask:
        """The graph as the model works on it; ValueError where it cannot be used."""
        return self.node_task(data, self.temperature, self.aug_edge_direction, watch=watch, keep_virtual=keep_virtual)
