"""Graphs with features and a label for each node: Cora and CiteSeer, as Planetoid split them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fewer.data.declarations import DataSet, File
from fewer.data.fetching import obtain

CITATION = "Yang, Cohen, Salakhutdinov: Revisiting semi-supervised learning with graph embeddings, arXiv 1603.08861, 2016"

CORA = DataSet(
    "cora",
    title="Cora: 2,708 papers in 7 fields, 10,556 directed citations, 1,433 words",
    licence="none stated for the data; the repository that carries it: MIT",
    citation=CITATION,
    files=(File("cora.npz", "4368c4cffb031f45abedac26eb78a36737826d49ba446e0b3cbb477a3d7ddbf7", 115_552),),
)
CITESEER = DataSet(
    "citeseer",
    title="CiteSeer: 3,327 papers in 6 fields, 9,104 directed citations, 3,703 words; 15 papers have neither label nor citation",
    licence="none stated for the data; the repository that carries it: MIT",
    citation=CITATION,
    files=(File("citeseer.npz", "6a2f9f98d453c7738b1dc63d2b76a90b8e0c5451e477521c3c166b4c3b0a8318", 216_081),),
)
SETS = (CORA, CITESEER)


@dataclass(frozen=True)
class CitationGraph:
    """A graph with features and a class for each node.

    Attributes:
        x: float32 features [N, F].
        edge_index: int64 [2, E], each edge in both directions, no self loops.
        y: int64 class numbers [N], -1 where a node has none.
        classes: how many classes there are.
        train, val, test: int64 node numbers of Planetoid's public split (20 a class, the next 500, 1,000).
        name: of the set.
    """

    x: Any
    edge_index: Any
    y: Any
    classes: int
    train: Any
    val: Any
    test: Any
    name: str


def load_cora() -> CitationGraph:
    """Cora: x [2708, 1433], edge_index [2, 10556], 7 classes.

    Raises:
        DataUnavailable: the file can be had from nowhere; the message names the ways.
    """
    return _load(CORA)


def load_citeseer() -> CitationGraph:
    """CiteSeer: x [3327, 3703], edge_index [2, 9104], 6 classes.

    Raises:
        DataUnavailable: the file can be had from nowhere; the message names the ways.
    """
    return _load(CITESEER)


def _load(dataset: DataSet) -> CitationGraph:
    import numpy as np

    with np.load(obtain(dataset)[f"{dataset.name}.npz"], allow_pickle=False) as arrays:
        x = _dense(arrays["x_data"], arrays["x_indices"], arrays["x_indptr"], arrays["x_shape"])
        y = arrays["labels"].astype(np.int64)
        parts = {part: arrays[part].astype(np.int64) for part in ("train", "val", "test")}
        return CitationGraph(x, arrays["edge_index"].astype(np.int64), y, int(y.max()) + 1, **parts, name=dataset.name)


def _dense(values: Any, columns: Any, starts: Any, shape: Any) -> Any:
    """A matrix in compressed rows, written out."""
    import numpy as np

    dense = np.zeros(tuple(shape), np.float32)
    dense[np.repeat(np.arange(len(starts) - 1), np.diff(starts)), columns] = values
    return dense
