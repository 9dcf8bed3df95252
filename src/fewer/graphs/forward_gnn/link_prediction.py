"""Link prediction with layers that learn each from the pairs' scores on its own output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.checks import check_choice, check_whole
from fewer.graphs._shared.graph_input import check_graph, check_precision
from fewer.graphs._shared.layers import Convolution, layer_widths
from fewer.graphs._shared.links import LinkProblem, area_under_curve, binary_loss, check_pairs, pair_products, plain_graph, prepare_links
from fewer.graphs._shared.training import Callback, History, Schedule, evaluating
from fewer.graphs.forward_gnn.losses import pair_score
from fewer.graphs.forward_gnn.modes import single_forward, top_to_input
from fewer.graphs.forward_gnn.modes.mode import Embedding, Inputs, LocalTask, Loss, Training, Watch
from fewer.graphs.forward_gnn.network import ForwardGNNConfig, GraphNetwork, Shape


class ForwardLinkPredictor(GraphNetwork):
    """A graph network for link prediction trained without end-to-end backpropagation.

    Each layer is a PyG convolution and ReLU; a pair's score is the sum of the elementwise product of its two embeddings.

    Args:
        in_channels, hidden_channels, num_layers, conv: as in `ForwardGNN`.
        mode: "single" trains layers one after the other; "top_to_input" all at every step, each reading the states of the layers
            below and above (nothing stands above the last one).
        loss: "FL", BCE of the pair's score; "FF", BCE of the goodness of the elementwise product minus theta.
        config: `test_time_steps`, `first_counted_step`, `alternating_update` and `theta` are read.

    Raises:
        ValueError: a value that cannot be used.

    Examples:
        >>> from torch_geometric.datasets import KarateClub
        >>> from torch_geometric.transforms import RandomLinkSplit
        >>> _ = torch.manual_seed(0)
        >>> split = RandomLinkSplit(is_undirected=True, add_negative_train_samples=False)
        >>> train_data, val_data, test_data = split(KarateClub()[0])
        >>> model = ForwardLinkPredictor(34, 16, num_layers=2)
        >>> history = model.fit(train_data, val_data, epochs=20)
        >>> model.predict(test_data, test_data.edge_label_index).shape == test_data.edge_label.shape
        True
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int | Sequence[int],
        num_layers: int,
        conv: Convolution = "gcn",
        mode: Literal["single", "top_to_input"] = "single",
        loss: Literal["FL", "FF"] = "FL",
        config: ForwardGNNConfig | None = None,
    ) -> None:
        check_whole(in_channels=in_channels)
        check_choice(("single", "top_to_input"), mode=mode)
        check_choice(("FL", "FF"), loss=loss)
        shape = Shape(in_channels, tuple(layer_widths(hidden_channels, num_layers)))
        super().__init__(shape, (single_forward if mode == "single" else top_to_input).input_widths(shape), conv, config)
        self.mode, self.loss = mode, loss

    def fit(
        self,
        train_data: Any,
        val_data: Any = None,
        *,
        epochs: int = 1000,
        patience: int | None = 100,
        lr: float = 1e-3,
        callbacks: Iterable[Callback] = (),
        generator: torch.Generator | None = None,
        validate_every: int = 2,
        cache: bool | None = None,
    ) -> History:
        """Train on the positive pairs and, at every step, as many sampled ones without an edge.

        Args:
            train_data, val_data: as PyG's `RandomLinkSplit` gives them (edge_label, edge_label_index); without val_data nothing
                stops early.
            epochs, patience, lr, callbacks, validate_every, cache: as in `ForwardGNN.fit`; the validation score is the AUC.
            generator: draws the pairs without an edge.

        Returns:
            The history: stages "layer 1", "layer 2", ..., or "network".

        Raises:
            ValueError: a graph that cannot be used.
            FloatingPointError: a loss is not finite; the best state so far is kept.
        """
        training = Training(Schedule(epochs, patience, lr, validate_every, tuple(callbacks)), History(), generator, cache)
        like = next(self.parameters())
        problem = prepare_links(train_data, like=like, in_channels=self.in_channels)
        watched = prepare_links(val_data, like=like, in_channels=self.in_channels) if val_data is not None else None
        fit = single_forward.fit_in_turn if self.mode == "single" else top_to_input.fit_side_by_side
        fit(self, self._task(problem, generator), self._watch(watched) if watched else None, training)
        return training.history.stop_clock()

    @torch.no_grad()
    def predict(self, data: Any, edge_label_index: Int[Tensor, "2 pairs"]) -> Float[Tensor, "pairs"]:
        """The mean over the layers (and time steps) of the sigmoid of the pairs' scores, in 0..1.

        Args:
            data: a graph with x [N, F] and the edges that messages take.
            edge_label_index: the pairs.

        Raises:
            ValueError: a graph or pairs that cannot be used.
        """
        check_pairs(edge_label_index, len(data.x))
        pairs = edge_label_index.to(next(self.parameters()).device)
        with evaluating(self):
            found = [self.scores(each.h, pairs).sigmoid() for each in self._run(self._inputs(data))]
        return torch.stack(found).mean(dim=0)

    @torch.no_grad()
    def embed(self, data: Any) -> list[Float[Tensor, "nodes width"]]:
        """Each layer's output."""
        with evaluating(self):
            last = {each.layer: each.h for each in self._run(self._inputs(data))}
        return [last[number] for number in sorted(last)]

    def scores(self, h: Float[Tensor, "nodes width"], pairs: Int[Tensor, "2 pairs"]) -> Float[Tensor, "pairs"]:
        """The pairs' logits at one layer's output."""
        return pair_score(pair_products(h, pairs), self.loss, self.config.theta)

    def layer_loss(self, problem: LinkProblem, negatives: Int[Tensor, "2 pairs"]) -> Loss:
        """BCE of a layer's scores of the positive pairs and of these."""
        return lambda h: binary_loss(self.scores(h, problem.positives), self.scores(h, negatives))

    def _inputs(self, data: Any) -> Inputs:
        check_graph(data, self.in_channels)
        like = next(self.parameters())
        check_precision(like)
        return Inputs(plain_graph(data, like), data.x.to(like))

    def _run(self, inputs: Inputs) -> Iterator[Embedding]:
        """The layers' outputs, once or at every time step that counts."""
        return (single_forward if self.mode == "single" else top_to_input).run(self, inputs)

    def _task(self, problem: LinkProblem, generator: torch.Generator | None) -> LocalTask:
        every = torch.arange(problem.graph.num_nodes, device=problem.x.device)
        return LocalTask(Inputs(problem.graph, problem.x), every, lambda: self.layer_loss(problem, problem.negatives(generator)))

    def _watch(self, problem: LinkProblem) -> Watch:
        every = torch.arange(problem.graph.num_nodes, device=problem.x.device)
        return Watch(
            Inputs(problem.graph, problem.x),
            every,
            lambda h: self.scores(h, problem.pairs).sigmoid(),
            lambda total: area_under_curve(total, problem.truth),
        )
