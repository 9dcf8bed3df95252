"""What is asked of a graph before anything is computed on it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def check_graph(data: Any, in_channels: int | None = None) -> None:
    """ValueError unless features are finite floats [N, in_channels] and every edge joins two of the N nodes."""
    x, edge_index = data.x, data.edge_index
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 2 or len(x) == 0:
        given = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"data.x is {given}; expected float features [N, F], a row a node: convert it with .float()")
    if in_channels is not None and x.shape[1] != in_channels:
        raise ValueError(f"data.x has {x.shape[1]} features a node; the model was built for {in_channels}: give a graph of that width")
    finite = x.isfinite().all(dim=1)
    if not finite.all():
        raise ValueError(
            f"data.x has a NaN or infinite value in row {int((~finite).nonzero()[0])}; expected finite features: mend that row"
        )
    if not isinstance(edge_index, Tensor) or edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.long:
        given = f"{tuple(edge_index.shape)} {edge_index.dtype}" if isinstance(edge_index, Tensor) else type(edge_index).__name__
        raise ValueError(f"data.edge_index is {given}; expected int64 [2, E]: a column an edge")
    if edge_index.numel() and not (int(edge_index.min()) >= 0 and int(edge_index.max()) < len(x)):
        raise ValueError(
            f"data.edge_index names nodes {int(edge_index.min())}..{int(edge_index.max())}; expected 0..{len(x) - 1}: x has a row a node"
        )


def mask_rows(data: Any, name: str) -> Int[Tensor, "rows"]:
    """The node numbers that a mask marks; ValueError unless it is a boolean [N] that marks at least one node."""
    mask = data[name] if name in data else None  # noqa: SIM401 - PyG graphs have no get
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (len(data.x),):
        given = "missing" if mask is None else f"{tuple(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"data.{name} is {given}; expected booleans [{len(data.x)}], true where the label may be used: "
            "set it, or draw it with torch_geometric.transforms.RandomNodeSplit"
        )
    rows = mask.nonzero()[:, 0]
    if len(rows) == 0:
        raise ValueError(f"data.{name} marks no node; expected at least one true entry")
    return rows


def check_nodes(data: Any, in_channels: int | None = None) -> Int[Tensor, "train"]:
    """`check_graph`, and the training nodes; ValueError where there are none or they have no labels [N]."""
    check_graph(data, in_channels)
    train = mask_rows(data, "train_mask")
    y = data.y
    if not isinstance(y, Tensor) or y.is_floating_point() or y.dtype == torch.bool or y.shape != (len(data.x),):
        given = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"data.y is {given}; expected integers [{len(data.x)}], a class number a node")
    return train


def check_labels(labels: Int[Tensor, "nodes"], classes: int, name: str) -> None:
    """ValueError unless the labels are 0..classes-1."""
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"data.y holds {int(labels.min())}..{int(labels.max())} at {name} nodes; expected 0..{classes - 1}: "
            "renumber the classes, or leave nodes without a label out of the mask"
        )


def check_labels_cover_classes(labels: Int[Tensor, "train"], classes: int) -> None:
    """ValueError unless the labels are 0..classes-1 and every class has a training node."""
    check_labels(labels, classes, "training")
    missing = (torch.bincount(labels, minlength=classes) == 0).nonzero()[:, 0].tolist()
    if missing:
        raise ValueError(
            f"class {missing[0]} has no training node, so its virtual node would be isolated; expected one of each of the {classes} "
            "classes in train_mask: label one, or leave the class out"
        )


def check_precision(like: Tensor) -> None:
    """ValueError where a network is in half precision, which torch's sparse products do not know."""
    if like.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"the network is {like.dtype}; expected float32 or float64, as sparse products have no half precision: call .float()"
        )
