"""A node classification task made ready for a model: its graph with class nodes, its features, who has a label and who is watched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.graphs._shared.graph_input import (
    check_graph,
    check_labels,
    check_labels_cover_classes,
    check_nodes,
    check_precision,
    mask_rows,
)
from fewer.graphs._shared.layers import Graph
from fewer.graphs.forward_gnn.class_nodes import AddClassNodes, Direction, Unlabelled, label_features


@dataclass(frozen=True, eq=False)
class NodeTask:
    """What a mode works on.

    Attributes:
        graph: with class nodes behind the real ones, unless `classes_kept`.
        plain: without them.
        x: features of the nodes of `graph`, label features of the input included [N + C, F].
        labels: one-hot for training and class nodes, neutral for the others [N + C, C]; the state above the last layer.
        class_features: of the class nodes [C, F].
        temperature: of the class logits.
        direction: of the class nodes' edges.
        real: N.
        train, y: training nodes and their classes.
        validation, validation_y: validation nodes and their classes; None where nothing is watched.
        classes_kept: there are no class nodes here: their embeddings are those of the fit.
    """

    graph: Graph
    plain: Graph
    x: Float[Tensor, "nodes features"]
    labels: Float[Tensor, "nodes classes"]
    class_features: Float[Tensor, "classes F"]
    temperature: float
    direction: Direction
    real: int
    train: Int[Tensor, "train"]
    y: Int[Tensor, "train"]
    validation: Int[Tensor, "validation"] | None
    validation_y: Int[Tensor, "validation"] | None
    classes_kept: bool

    @property
    def virtual(self) -> Int[Tensor, "classes"]:
        """The numbers of the class nodes."""
        return torch.arange(self.real, len(self.x), device=self.x.device)


def prepare(
    data: Any,
    *,
    classes: int,
    class_features: Float[Tensor, "classes features"],
    temperature: float,
    direction: Direction,
    unlabelled: Unlabelled,
    append_label: str | None,
    watch: bool = False,
    keep_virtual: bool = False,
) -> NodeTask:
    """The task of a PyG graph, in the dtype and on the device of the class features.

    Args:
        append_label: None, or where label features are appended: to x in any case.
        watch: look for validation nodes.
        keep_virtual: leave the graph's own labels and class nodes out.

    Raises:
        ValueError: a graph that cannot be used.
    """
    width = class_features.shape[1]
    check_precision(class_features)
    if "virtual_mask" in data:
        raise ValueError("the graph has class nodes already (virtual_mask); expected the plain graph: the model adds its own")
    if keep_virtual:
        check_graph(data, width)
        train = torch.empty(0, dtype=torch.long)
    elif "train_mask" not in data and not watch:
        check_graph(data, width)
        raise ValueError(
            "the graph has no train_mask; expected training nodes of its own, which the class nodes are joined to: "
            "set train_mask, or pass keep_virtual=True to read classes from the class nodes of the fit"
        )
    else:
        train = check_nodes(data, width)
        check_labels_cover_classes(data.y[train], classes)
    validation = mask_rows(data, "val_mask") if watch and "val_mask" in data and bool(data.val_mask.any()) else None
    if validation is not None:
        check_labels(data.y[validation], classes, "validation")
    nodes = len(data.x)
    graph_data = data if keep_virtual else AddClassNodes(classes, direction, class_features)(data)

    def to_model(tensor: Tensor) -> Tensor:
        return tensor.to(class_features.device)

    x = to_model(graph_data.x).to(class_features.dtype)
    train = to_model(train)
    y = to_model(data.y).long()[train] if len(train) else train
    own = torch.arange(0 if keep_virtual else classes, device=x.device)
    labels = label_features(len(x), torch.cat([train, nodes + own]), torch.cat([y, own]), classes, unlabelled, like=x)
    return NodeTask(
        graph=Graph(to_model(graph_data.edge_index), len(x), x.dtype),
        plain=Graph(to_model(data.edge_index), nodes, x.dtype),
        x=torch.cat([x, labels], dim=1) if append_label else x,
        labels=labels,
        class_features=class_features,
        temperature=temperature,
        direction=direction,
        real=nodes,
        train=train,
        y=y,
        validation=None if validation is None else to_model(validation),
        validation_y=None if validation is None else to_model(data.y.long()[validation]),
        classes_kept=keep_virtual,
    )
