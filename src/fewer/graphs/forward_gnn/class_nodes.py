"""Virtual class nodes: one node a class, joined to the training nodes of its class (section "virtual nodes" of arXiv 2403.11004).

Edge types: 0 the graph's own, 1..C from a training node to its class, C+1..2C back.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.data.datapipes import functional_transform
from torch_geometric.transforms import BaseTransform

from fewer.checks import check_choice, check_whole
from fewer.graphs._shared.graph_input import check_labels_cover_classes, check_nodes

Direction = Literal["bidirection", "unidirection"]
DIRECTIONS = ("bidirection", "unidirection")
Unlabelled = Literal["uniform", "zero"]


@functional_transform("add_class_nodes")
class AddClassNodes(BaseTransform):
    """Add a virtual node for each class and join the training nodes to it; real nodes and edges stay as they are, and come first.

    The result has N + C nodes: `x` (virtual rows random normal), `y` (virtual nodes: their own class), `edge_index`, `edge_type`
    (0 real, 1..C node to class, C+1..2C class to node), `virtual_mask`; the virtual nodes are in no other mask. Other attributes of
    nodes and edges are filled up with zeros, `edge_weight` with ones. Validation and test nodes are never joined to a class.

    Args:
        num_classes: C; by default one more than the highest label of a training node.
        direction: "bidirection" (the default), or "unidirection" for edges from the training nodes to the classes alone.
        features: [C, F], the virtual nodes' features; by default drawn from a normal distribution.
        seed: of the drawn features.

    Raises:
        ValueError: no `train_mask`, a class without a training node, labels or edges out of range, NaN features, or a graph that has
            class nodes already.

    Examples:
        >>> from torch_geometric.data import Data
        >>> mask = torch.tensor([True, True, False])
        >>> data = Data(x=torch.eye(3), edge_index=torch.tensor([[0, 2], [2, 0]]), y=torch.tensor([0, 1, 1]), train_mask=mask)
        >>> augmented = AddClassNodes()(data)
        >>> augmented.num_nodes, augmented.edge_index.tolist(), augmented.edge_type.tolist()
        (5, [[0, 2, 0, 1, 3, 4], [2, 0, 3, 4, 0, 1]], [0, 0, 1, 2, 3, 4])
    """

    def __init__(
        self, num_classes: int | None = None, direction: Direction = "bidirection", features: Tensor | None = None, seed: int = 0
    ) -> None:
        check_choice(DIRECTIONS, direction=direction)
        check_whole(least=2, optional=["num_classes"], num_classes=num_classes)
        self.num_classes, self.features, self.seed = num_classes, features, seed
        self.direction: Direction = direction

    def forward(self, data: Any) -> Data:
        if "virtual_mask" in data:
            raise ValueError("the graph has class nodes already (virtual_mask); expected a plain one: add them once")
        train = check_nodes(data)
        labels = data.y[train].long()
        classes = self.num_classes or int(labels.max()) + 1
        check_labels_cover_classes(labels, classes)
        nodes, device = int(data.num_nodes or 0), data.x.device
        ends, types = class_edges(train, labels, classes, nodes, self.direction)
        of_nodes = [name for name in data.keys() if data.is_node_attr(name)]  # noqa: SIM118 - PyG's graphs are no mappings
        of_edges = [name for name in data.keys() if data.is_edge_attr(name) and name != "edge_index"]  # noqa: SIM118
        for name in of_nodes:
            data[name] = torch.cat([data[name], data[name].new_zeros(classes, *data[name].shape[1:])])
        for name in of_edges:
            filling = 1 if name == "edge_weight" else 0
            data[name] = torch.cat([data[name], data[name].new_full((len(types), *data[name].shape[1:]), filling)])
        data.x[nodes:] = self._features(classes, data.x.shape[1]).to(data.x)
        data.y[nodes:] = torch.arange(classes, device=device)
        data.virtual_mask = torch.arange(nodes + classes, device=device) >= nodes
        data.edge_type = torch.cat([torch.zeros(data.edge_index.shape[1], dtype=torch.long, device=device), types])
        data.edge_index = torch.cat([data.edge_index, ends], dim=1)
        if "num_nodes" in data:
            data.num_nodes = nodes + classes
        return data

    def _features(self, classes: int, width: int) -> Float[Tensor, "classes features"]:
        if self.features is None:
            return torch.randn(classes, width, generator=torch.Generator().manual_seed(self.seed))
        if self.features.shape != (classes, width):
            raise ValueError(
                f"features of the class nodes are {tuple(self.features.shape)}; expected {(classes, width)}: a row a class, as wide as x"
            )
        return self.features

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_classes={self.num_classes}, direction={self.direction!r}, seed={self.seed})"


def remove_class_nodes(data: Any) -> Data:
    """The graph without its class nodes and their edges: what `AddClassNodes` was given.

    Raises:
        ValueError: the graph has no class nodes.

    Examples:
        >>> mask = torch.tensor([True, True])
        >>> data = Data(x=torch.eye(2), edge_index=torch.tensor([[0, 1], [1, 0]]), y=torch.tensor([0, 1]), train_mask=mask)
        >>> remove_class_nodes(AddClassNodes()(data)).edge_index.equal(data.edge_index)
        True
    """
    if "virtual_mask" not in data:
        raise ValueError("the graph has no virtual_mask; expected one that AddClassNodes returned")
    kept_nodes, kept_edges = ~data.virtual_mask, data.edge_type == 0
    plain = Data()
    for name, value in data.to_dict().items():
        if name in ("virtual_mask", "edge_type"):
            continue
        if name == "num_nodes":
            value = int(kept_nodes.sum())
        elif name == "edge_index":
            value = value[:, kept_edges]
        elif data.is_node_attr(name):
            value = value[kept_nodes]
        elif data.is_edge_attr(name):
            value = value[kept_edges]
        plain[name] = value
    return plain


def class_edges(
    nodes: Int[Tensor, "labelled"], labels: Int[Tensor, "labelled"], classes: int, first: int, direction: Direction
) -> tuple[Int[Tensor, "2 edges"], Int[Tensor, "edges"]]:
    """Edges between nodes and their class's node (class c is node `first` + c), and their types."""
    to_class = torch.stack([nodes, first + labels])
    if direction == "unidirection":
        return to_class, 1 + labels
    return torch.cat([to_class, to_class.flip(0)], dim=1), torch.cat([1 + labels, 1 + classes + labels])


def label_features(
    count: int, nodes: Int[Tensor, "labelled"], labels: Int[Tensor, "labelled"], classes: int, unlabelled: Unlabelled, like: Tensor
) -> Float[Tensor, "count classes"]:
    """One-hot rows for the labelled nodes; for the others 1/C everywhere, or zero.

    >>> label_features(2, torch.tensor([1]), torch.tensor([0]), 2, "uniform", like=torch.zeros(1))
    tensor([[0.5000, 0.5000],
            [1.0000, 0.0000]])
    """
    rows = like.new_full((count, classes), 1 / classes if unlabelled == "uniform" else 0.0)
    rows[nodes] = torch.eye(classes, dtype=rows.dtype, device=rows.device)[labels]
    return rows
