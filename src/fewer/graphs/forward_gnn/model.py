"""`ForwardGNN`: a graph network for node classification whose layers learn each from a loss of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fewer.graphs.forward_gnn import forward_forward, single_forward, top_to_input, top_to_loss
from fewer.graphs.forward_gnn.checks import check_choice, check_positive, check_whole
from fewer.graphs.forward_gnn.class_nodes import DIRECTIONS, Direction, Unlabelled
from fewer.graphs.forward_gnn.convolution import Convolution, GraphLayer
from fewer.graphs.forward_gnn.losses import THETA, class_logits
from fewer.graphs.forward_gnn.node_problem import Embedding, NodeProblem, prepare
from fewer.graphs.forward_gnn.training import Callback, History, Schedule

Mode = Literal["single", "top_to_input", "top_to_loss", "ff_labels", "ff_virtual"]
MODES = ("single", "top_to_input", "top_to_loss", "ff_labels", "ff_virtual")
ALGORITHMS: dict[str, Any] = {
    "single": single_forward,
    "top_to_input": top_to_input,
    "top_to_loss": top_to_loss,
    "ff_labels": forward_forward,
    "ff_virtual": forward_forward,
}


@dataclass(frozen=True)
class ForwardGNNConfig:
    """What only some modes read.

    Args:
        unlabelled: label features of nodes without a label: "uniform" (1/C everywhere) or "zero".
        alternating_update: "top_to_input" updates even-numbered layers first, then odd ones, which see what is updated already;
            otherwise all layers see the time step before.
        test_time_steps: state updates of a prediction of "top_to_input".
        first_counted_step: the time step from which on its class probabilities are summed (not in the paper: the released code
            stores a set that its settings name).
        num_negs: wrong labellings a step of the Forward-Forward modes.
        theta: the goodness that right labels shall exceed there.

    Raises:
        ValueError: a value that cannot be used.
    """

    unlabelled: Unlabelled = "uniform"
    alternating_update: bool = False
    test_time_steps: int = 10
    first_counted_step: int = 3
    num_negs: int = 2
    theta: float = THETA

    def __post_init__(self) -> None:
        check_choice("unlabelled", self.unlabelled, ("uniform", "zero"))
        check_whole(test_time_steps=self.test_time_steps, first_counted_step=self.first_counted_step, num_negs=self.num_negs)
        check_positive(theta=self.theta)
        if self.first_counted_step > self.test_time_steps:
            raise ValueError(
                f"first_counted_step is {self.first_counted_step}; expected at most test_time_steps={self.test_time_steps}: lower it"
            )


class ForwardGNN(nn.Module):
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
        mode: Mode = "single",
        temperature: float = 1.0,
        append_label: Literal["input", "all"] | None = None,
        aug_edge_direction: Direction = "bidirection",
        config: ForwardGNNConfig | None = None,
    ) -> None:
        super().__init__()
        check_whole(in_channels=in_channels, num_layers=num_layers)
        check_whole(least=2, num_classes=num_classes)
        check_choice("mode", mode, MODES)
        check_choice("append_label", append_label, (None, "input", "all"))
        check_choice("aug_edge_direction", aug_edge_direction, DIRECTIONS)
        check_positive(temperature=temperature)
        self.in_channels, self.num_classes, self.temperature = in_channels, num_classes, temperature
        self.conv: Convolution = conv
        self.mode: Mode = mode
        self.widths = layer_widths(hidden_channels, num_layers)
        self.append_label, self.config = append_label, config or ForwardGNNConfig()
        self.aug_edge_direction: Direction = aug_edge_direction
        if mode == "top_to_loss" and len(set(self.widths)) > 1:
            raise ValueError(f"hidden_channels are {self.widths}; top_to_loss takes means over layers: expected equal widths")
        if mode.startswith("ff") and append_label is not None:
            raise ValueError(f"append_label is {append_label!r}; {mode} gives labels in its own way: expected None")
        self._algorithm = ALGORITHMS[mode]
        inputs = (top_to_input if mode == "top_to_input" else forward_forward if mode.startswith("ff") else single_forward).input_widths(
            self
        )
        made = [GraphLayer(parts, width, conv) for parts, width in zip(inputs, self.widths, strict=True)]
        self.layers = cast("Sequence[GraphLayer]", nn.ModuleList(made))
        self.register_buffer("class_features", torch.randn(num_classes, in_channels))
        self.class_features: Tensor
        if self.has_class_embeddings:
            steps = self.config.test_time_steps - self.config.first_counted_step + 1 if mode == "top_to_input" else 1
            for number, width in enumerate(self.widths, start=1):  # NaN until a fit has filled them
                self.register_buffer(f"class_embeddings_{number}", torch.full((steps, num_classes, width), torch.nan))

    @property
    def has_class_embeddings(self) -> bool:
        """Whether classes are read from the embeddings of virtual nodes."""
        return not self.mode.startswith("ff")

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
        schedule = Schedule(epochs, patience, lr, validate_every, tuple(callbacks))
        problem, history = self.prepare(data, watch=True), History()
        self._algorithm.fit(self, problem, schedule, history, cache=cache, generator=generator)
        if self.has_class_embeddings:
            self._keep_class_embeddings(problem)
        return history.stop_clock()

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
        return scores / scores.sum(dim=1, keepdim=True) if self.has_class_embeddings else scores.softmax(dim=1)

    @torch.no_grad()
    def embed(self, data: Any) -> list[Float[Tensor, "nodes width"]]:
        """What each layer's classes are read from, at the graph's own nodes: its output (in "top_to_loss" its mean with those above)."""
        problem = self.prepare(data)
        if self.has_class_embeddings:
            last = {each.layer: each.h for each in self._algorithm.embeddings(self, problem)}
            found = [last[number] for number in sorted(last)]
        else:
            found = forward_forward.outputs(self, problem)
        return [h[: problem.real] for h in found]

    def local_losses(self, data: Any, generator: torch.Generator | None = None) -> list[Float[Tensor, ""]]:
        """Each layer's own loss on the training nodes, for optimisers of your own: no loss's graph reaches another layer.

        Examples:
            >>> from torch_geometric.datasets import KarateClub
            >>> data = KarateClub()[0]
            >>> losses = ForwardGNN(data.num_features, 16, num_layers=2, num_classes=4).local_losses(data)
            >>> len(losses)
            2
        """
        problem = self.prepare(data)
        more = {} if self.has_class_embeddings else {"generator": generator}
        return list(self._algorithm.local_losses(self, problem, **more))

    def summed_probabilities(self, embeddings: Iterable[Embedding], problem: NodeProblem) -> Float[Tensor, "nodes C"]:
        """Class probabilities of the real nodes, summed over layers and time steps."""
        total = problem.x.new_zeros(problem.real, self.num_classes)
        for step, number, h in embeddings:
            virtual = self._kept(number)[step] if problem.classes_kept else h[problem.real :]
            total += class_logits(h[: problem.real], virtual, self.temperature).softmax(dim=1)
        return total

    @torch.no_grad()
    def _scores(self, data: Any, mask: Tensor | None, keep_virtual: bool) -> Tensor:
        problem = self.prepare(data, keep_virtual=keep_virtual)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (problem.real,)):
            raise ValueError(f"mask is {tuple(mask.shape)} {mask.dtype}; expected booleans [{problem.real}], true at the nodes asked for")
        if not self.has_class_embeddings:
            scores = forward_forward.class_scores(self, problem)
        elif keep_virtual and bool(self._kept(1).isnan().any()):
            raise ValueError("keep_virtual=True on a model that was not fitted; expected a fit before: call fit, or load its state_dict")
        else:
            scores = self.summed_probabilities(self._algorithm.embeddings(self, problem), problem)
        return scores if mask is None else scores[mask.to(scores.device)]

    def prepare(self, data: Any, *, watch: bool = False, keep_virtual: bool = False) -> NodeProblem:
        """The graph as the model works on it; ValueError where it cannot be used."""
        return prepare(
            data,
            classes=self.num_classes,
            class_features=self.class_features,
            direction=self.aug_edge_direction,
            unlabelled=self.config.unlabelled,
            label_inputs=self.append_label is not None,
            watch=watch,
            keep_virtual=keep_virtual,
        )

    def _kept(self, number: int) -> Float[Tensor, "steps C width"]:
        return self.get_buffer(f"class_embeddings_{number}")

    @torch.no_grad()
    def _keep_class_embeddings(self, problem: NodeProblem) -> None:
        for step, number, h in self._algorithm.embeddings(self, problem):
            self._kept(number)[step] = h[problem.real :]


def layer_widths(hidden_channels: int | Sequence[int], num_layers: int) -> list[int]:
    """One width a layer; ValueError where they are not as many as the layers or no whole numbers.

    >>> layer_widths(16, 3), layer_widths([8, 4], 2)
    ([16, 16, 16], [8, 4])
    """
    widths = [hidden_channels] * num_layers if isinstance(hidden_channels, int) else list(hidden_channels)
    if len(widths) != num_layers:
        raise ValueError(f"hidden_channels has {len(widths)} widths for {num_layers} layers; expected one number, or one a layer")
    for width in widths:
        check_whole(hidden_channels=width)
    return widths
