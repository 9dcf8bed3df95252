"""The twin that the local learners are measured against: the same convolutions, trained end to end with Adam and the same early stopping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_whole
from fewer.graphs._shared.graph_input import check_labels, check_nodes, check_precision, mask_rows
from fewer.graphs._shared.layers import Convolution, Graph, GraphLayer, Matrix, compact, layer_widths, normalize_rows
from fewer.graphs._shared.links import accuracy, area_under_curve, binary_loss, link_logits, prepare_links
from fewer.graphs._shared.training import Callback, History, Schedule, train


class BackpropagationGNN(nn.Module):
    """The layers of `ForwardGNN`, and a linear output layer on the last one.

    Args:
        in_channels, hidden_channels, num_layers, conv: as in `ForwardGNN`.
        out_channels: classes; None leaves the output layer away and the last layer without its ReLU's cut (for links).

    Examples:
        >>> model = BackpropagationGNN(5, 16, num_layers=2, out_channels=3)
        >>> model(torch.ones(4, 5), torch.tensor([[0, 1], [1, 0]])).shape
        torch.Size([4, 3])
    """

    def __init__(
        self, in_channels: int, hidden_channels: int | Sequence[int], num_layers: int, out_channels: int | None, conv: Convolution = "gcn"
    ) -> None:
        super().__init__()
        check_whole(in_channels=in_channels)
        widths = layer_widths(hidden_channels, num_layers)
        made = [GraphLayer((into,), width, conv) for into, width in zip([in_channels, *widths], widths, strict=False)]
        self.layers = cast("Sequence[GraphLayer]", nn.ModuleList(made))
        self.head = nn.Linear(widths[-1], out_channels) if out_channels is not None else None
        self._last: tuple[Tensor, Tensor, Matrix, Graph] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is made anew of the last graph, which need not be copied or written."""
        return self.__dict__ | {"_last": None}

    def forward(self, x: Float[Tensor, "nodes features"], edge_index: Tensor) -> Float[Tensor, "nodes out"]:
        """Class scores, or embeddings without an output layer. What is constant in a graph is made once while the same graph is given."""
        if self._last is None or self._last[0] is not x or self._last[1] is not edge_index:
            self._last = (x, edge_index, compact(normalize_rows(x), self.layers[0]), Graph(edge_index, len(x), x.dtype))
        _, _, h, graph = self._last
        for layer in self.layers:
            h = layer([h], graph)
        assert isinstance(h, Tensor)
        return h if self.head is None else self.head(h)


def fit_backpropagation(
    model: nn.Module,
    data: Any,
    *,
    epochs: int = 1000,
    patience: int | None = 100,
    lr: float = 1e-3,
    callbacks: Iterable[Callback] = (),
    validate_every: int = 2,
) -> History:
    """Train any module that maps (x, edge_index) to class scores end to end: cross-entropy at the training nodes, Adam, early stopping.

    Args:
        model: `BackpropagationGNN`, PyG's `GCN`, ...; trained in place.
        data: as in `ForwardGNN.fit`.
        epochs, patience, lr, callbacks, validate_every: as in `ForwardGNN.fit`.

    Returns:
        The history, of one stage "network".

    Raises:
        ValueError: a graph that cannot be used.
        FloatingPointError: a loss is not finite; the best state so far is kept.

    Examples:
        >>> from torch_geometric.datasets import KarateClub
        >>> data = KarateClub()[0]
        >>> fit_backpropagation(BackpropagationGNN(34, 16, 2, 4), data, epochs=3).epochs[-1].epoch
        3
    """
    schedule, history = Schedule(epochs, patience, lr, validate_every, tuple(callbacks)), History()
    rows = check_nodes(data)
    like = next(model.parameters())
    check_precision(like)
    x, edge_index, y = data.x.to(like), data.edge_index.to(like.device), data.y.long().to(like.device)
    check_labels(data.y[rows], 1 + int(data.y.max()), "training")
    watched = mask_rows(data, "val_mask").to(like.device) if "val_mask" in data and bool(data.val_mask.any()) else None
    rows = rows.to(like.device)
    step = _step(model, schedule, lambda: F.cross_entropy(model(x, edge_index)[rows], y[rows]))

    def validate() -> float:
        return accuracy(model(x, edge_index)[watched], y[watched])

    train("network", [model], step, validate if watched is not None else None, schedule, history)
    return history.stop_clock()


def fit_link_backpropagation(
    model: nn.Module,
    train_data: Any,
    val_data: Any = None,
    *,
    epochs: int = 1000,
    patience: int | None = 100,
    lr: float = 1e-3,
    callbacks: Iterable[Callback] = (),
    generator: torch.Generator | None = None,
    validate_every: int = 2,
) -> History:
    """Train any module that maps (x, edge_index) to embeddings end to end: BCE of the inner products of positive and sampled pairs.

    Args:
        model: `BackpropagationGNN` with `out_channels=None`, PyG's `GCN`, ...; trained in place.
        train_data, val_data, epochs, patience, lr, callbacks, generator, validate_every: as in `ForwardLinkPredictor.fit`.

    Returns:
        The history, of one stage "network"; its validation score is the AUC.

    Raises:
        ValueError: a graph that cannot be used.
        FloatingPointError: a loss is not finite; the best state so far is kept.
    """
    schedule, history = Schedule(epochs, patience, lr, validate_every, tuple(callbacks)), History()
    like = next(model.parameters())
    problem = prepare_links(train_data, like=like)
    watched = prepare_links(val_data, like=like) if val_data is not None else None

    def loss() -> Tensor:
        h = model(problem.x, problem.graph.edge_index)
        return binary_loss(link_logits(h, problem.positives), link_logits(h, problem.negatives(generator)))

    def validate() -> float:
        assert watched is not None
        return area_under_curve(link_logits(model(watched.x, watched.graph.edge_index), watched.pairs), watched.truth)

    train("network", [model], _step(model, schedule, loss), validate if watched else None, schedule, history)
    return history.stop_clock()


def _step(model: nn.Module, schedule: Schedule, loss_of: Callable[[], Tensor]) -> Callable[[], float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=schedule.lr, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
