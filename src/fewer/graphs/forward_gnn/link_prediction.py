"""Link prediction with layers that learn each from the pairs' scores on its own output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewer.graphs.forward_gnn.checks import check_choice, check_graph, check_positive, check_whole
from fewer.graphs.forward_gnn.convolution import Convolution, Graph, GraphLayer, Matrix, compact, normalize_rows
from fewer.graphs.forward_gnn.link_problem import LinkProblem, area_under_curve, check_pairs, plain_graph, prepare_links
from fewer.graphs.forward_gnn.losses import binary_loss, pair_products, pair_score
from fewer.graphs.forward_gnn.model import ForwardGNNConfig, layer_widths
from fewer.graphs.forward_gnn.single_forward import keeps_propagation
from fewer.graphs.forward_gnn.top_to_input import Visit, time_step
from fewer.graphs.forward_gnn.training import Callback, History, Schedule, train


class ForwardLinkPredictor(nn.Module):
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
        super().__init__()
        check_whole(in_channels=in_channels, num_layers=num_layers)
        check_choice("mode", mode, ("single", "top_to_input"))
        check_choice("loss", loss, ("FL", "FF"))
        self.in_channels, self.mode, self.loss, self.config = in_channels, mode, loss, config or ForwardGNNConfig()
        check_positive(theta=self.config.theta)
        self.widths = layer_widths(hidden_channels, num_layers)
        above: list[tuple[int, ...]] = [(width,) for width in self.widths[1:]] if mode == "top_to_input" else [()] * (num_layers - 1)
        inputs = [(below, *up) for below, up in zip([in_channels, *self.widths], [*above, ()], strict=False)]
        made = [GraphLayer(parts, width, conv) for parts, width in zip(inputs, self.widths, strict=True)]
        self.layers = cast("Sequence[GraphLayer]", nn.ModuleList(made))

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
        schedule, history = Schedule(epochs, patience, lr, validate_every, tuple(callbacks)), History()
        like = next(self.parameters())
        problem = prepare_links(train_data, like=like, in_channels=self.in_channels)
        watched = prepare_links(val_data, like=like, in_channels=self.in_channels) if val_data is not None else None
        if self.mode == "single":
            self._fit_in_turn(problem, watched, schedule, history, generator, cache)
        else:
            self._fit_side_by_side(problem, watched, schedule, history, generator)
        return history.stop_clock()

    @torch.no_grad()
    def predict(self, data: Any, edge_label_index: Int[Tensor, "2 pairs"]) -> Float[Tensor, "pairs"]:
        """The mean over the layers (and time steps) of the sigmoid of the pairs' scores, in 0..1.

        Args:
            data: a graph with x [N, F] and the edges that messages take.
            edge_label_index: the pairs.

        Raises:
            ValueError: a graph or pairs that cannot be used.
        """
        check_graph(data, self.in_channels)
        check_pairs(edge_label_index, len(data.x))
        like = next(self.parameters())
        return self._probabilities(data.x.to(like), plain_graph(data, like), edge_label_index.to(like.device))

    @torch.no_grad()
    def embed(self, data: Any) -> list[Float[Tensor, "nodes width"]]:
        """Each layer's output."""
        check_graph(data, self.in_channels)
        like = next(self.parameters())
        return list(self._embeddings(data.x.to(like), plain_graph(data, like)))[-1]

    def scores(self, h: Float[Tensor, "nodes width"], pairs: Int[Tensor, "2 pairs"]) -> Float[Tensor, "pairs"]:
        """The pairs' logits at one layer's output."""
        return pair_score(pair_products(h, pairs), self.loss, self.config.theta)

    def _layer_loss(self, h: Tensor, problem: LinkProblem, negatives: Tensor) -> Tensor:
        return binary_loss(self.scores(h, problem.positives), self.scores(h, negatives))

    def _probabilities(self, x: Tensor, graph: Graph, pairs: Tensor) -> Tensor:
        found = [self.scores(h, pairs).sigmoid() for outputs in self._embeddings(x, graph) for h in outputs]
        return torch.stack(found).mean(dim=0)

    def _embeddings(self, x: Tensor, graph: Graph) -> Iterator[list[Tensor]]:
        """The layers' outputs, once or at every time step that counts."""
        features = compact(normalize_rows(x), self.layers[0])
        if self.mode == "single":
            outputs: list[Tensor] = []
            for layer in self.layers:
                outputs.append(layer([normalize_rows(outputs[-1]) if outputs else features], graph))
            yield outputs
            return
        bottom = self.layers[0].project(0, features)
        states = self._bottom_up(bottom, graph)
        for step in range(1, self.config.test_time_steps + 1):
            outputs = [*states]

            def keep(i: int, h: Tensor, outputs: list[Tensor] = outputs) -> Tensor:
                outputs[i] = h
                return h

            states = self._move(bottom, graph, states, keep)
            if step >= self.config.first_counted_step:
                yield outputs

    # One layer after the other

    def _fit_in_turn(
        self,
        problem: LinkProblem,
        watched: LinkProblem | None,
        schedule: Schedule,
        history: History,
        generator: torch.Generator | None,
        cache: bool | None,
    ) -> None:
        x: Matrix = compact(normalize_rows(problem.x), self.layers[0])
        seen: Matrix | None = compact(normalize_rows(watched.x), self.layers[0]) if watched else None
        so_far: Tensor | float = 0.0
        for number, layer in enumerate(self.layers, start=1):
            outputs = self._constant(layer, x, problem, cache)
            judged = (
                self._probabilities_of(self._constant(layer, seen, watched, cache), watched, so_far)
                if watched and seen is not None
                else None
            )
            self._fit_layer(f"layer {number}", layer, outputs, judged, problem, watched, schedule, history, generator)
            with torch.no_grad():
                x = normalize_rows(outputs())
                if watched and seen is not None and judged is not None:
                    so_far = judged()
                    seen = normalize_rows(self._constant(layer, seen, watched, False)())

    def _fit_layer(
        self,
        stage: str,
        layer: GraphLayer,
        outputs: Callable[[], Tensor],
        judged: Callable[[], Tensor] | None,
        problem: LinkProblem,
        watched: LinkProblem | None,
        schedule: Schedule,
        history: History,
        generator: torch.Generator | None,
    ) -> None:
        """Train one layer; `outputs` is what it gives for its constant input, `judged` the summed scores of the watched pairs."""
        optimizer = torch.optim.Adam(layer.parameters(), lr=schedule.lr, fused=True)

        def step() -> float:
            optimizer.zero_grad()
            loss = self._layer_loss(outputs(), problem, problem.negatives(generator))
            loss.backward()
            optimizer.step()
            return loss.item()

        def validate() -> float:
            assert watched is not None
            assert judged is not None
            return area_under_curve(judged(), watched.truth)

        train(stage, [layer], step, validate if judged else None, schedule, history)
        optimizer.zero_grad()

    def _probabilities_of(self, outputs: Callable[[], Tensor], watched: LinkProblem, so_far: Tensor | float) -> Callable[[], Tensor]:
        """A function that adds a layer's probabilities of the watched pairs to those of the layers below."""

        @torch.no_grad()
        def judged() -> Tensor:
            return so_far + self.scores(outputs(), watched.pairs).sigmoid()

        return judged

    def _constant(self, layer: GraphLayer, x: Matrix, problem: LinkProblem, cache: bool | None) -> Callable[[], Tensor]:
        """The layer's output at all nodes, for its present weights and a constant input."""
        rows = torch.arange(problem.graph.num_nodes, device=problem.x.device)
        return layer.outputs_of(x, problem.graph, rows, keeps_propagation(layer, x, cache))

    # All at every time step

    def _bottom_up(self, bottom: Tensor, graph: Graph) -> list[Tensor]:
        states: list[Tensor] = []
        for i in range(len(self.layers)):
            above = bottom.new_zeros(graph.num_nodes, self.layers[i].widths[-1])
            states.append(normalize_rows(self._run(bottom, graph, i, states[-1] if states else None, above)))
        return states

    def _run(self, bottom: Tensor, graph: Graph, i: int, below: Tensor | None, above: Tensor) -> Tensor:
        layer = self.layers[i]
        parts = [bottom if below is None else layer.project(0, below)]
        return layer.combine([*parts, *([layer.project(1, above)] if len(layer.widths) > 1 else [])], graph)

    def _move(self, bottom: Tensor, graph: Graph, states: list[Tensor], visit: Visit) -> list[Tensor]:
        def run(i: int, below: Tensor | None, above: Tensor) -> Tensor:
            return self._run(bottom, graph, i, below, above)

        return time_step(list(self.layers), run, states, states[-1], self.config.alternating_update, visit)

    def _fit_side_by_side(
        self,
        problem: LinkProblem,
        watched: LinkProblem | None,
        schedule: Schedule,
        history: History,
        generator: torch.Generator | None,
    ) -> None:
        features = compact(normalize_rows(problem.x), self.layers[0])
        optimizers = [torch.optim.Adam(layer.parameters(), lr=schedule.lr, fused=True) for layer in self.layers]
        with torch.no_grad():
            states = self._bottom_up(self.layers[0].project(0, features), problem.graph)

        def step() -> float:
            nonlocal states
            losses, negatives = [], problem.negatives(generator)

            def visit(i: int, h: Tensor) -> Tensor:
                loss = self._layer_loss(h, problem, negatives)
                loss.backward()
                optimizers[i].step()
                optimizers[i].zero_grad()
                losses.append(loss.item())
                return h.detach()

            states = self._move(self.layers[0].project(0, features), problem.graph, states, visit)
            return sum(losses) / len(losses)

        @torch.no_grad()
        def validate() -> float:
            assert watched is not None
            return area_under_curve(self._probabilities(watched.x, watched.graph, watched.pairs), watched.truth)

        train("network", [self], step, validate if watched else None, schedule, history)
