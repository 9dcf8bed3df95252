"""What study and bench work on: graphs in folds, a user's own among them, a random geometric graph, and the costs of a step."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.spatial import KDTree
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.transforms import RandomLinkSplit

from fewer.data import CitationGraph, load_citeseer, load_cora
from fewer.graphs._shared.training import History
from fewer.graphs.forward_gnn.model import ForwardGNN
from fewer.inputs import read_arrays

FOLDS = 5
VALIDATION = 0.2  # of what does not test
STEPS = 12  # of a timed fit
COMPRESSED = ("x_data", "x_indices", "x_indptr", "x_shape")

Fit = Callable[..., History]


def graph_sets(file: str) -> dict[str, CitationGraph]:
    """Cora and CiteSeer, or the graph of a file."""
    return {"graph": read_graph(file)} if file else {"cora": load_cora(), "citeseer": load_citeseer()}


def read_graph(file: str | Path) -> CitationGraph:
    """A graph as Cora's file has it: edge_index [2, E], labels [N] (-1: none), and x [N, F], or x in compressed rows.

    Raises:
        FileNotFoundError, ValueError: no such file, or arrays that do not belong together.
    """
    arrays = read_arrays(file, ["edge_index", "labels"], ["x", *COMPRESSED])
    missing = [name for name in COMPRESSED if name not in arrays]
    if "x" not in arrays and missing:
        raise ValueError(f"{file} has no x (nor {missing[0]}); expected features [N, F]: add x to the file, a row a node")
    try:
        if "x" in arrays:
            x = arrays["x"].astype(np.float32)
        else:
            x = csr_matrix(tuple(arrays[name] for name in COMPRESSED[:3]), shape=tuple(arrays["x_shape"])).toarray().astype(np.float32)
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{file}: its features are no matrix ({error}); expected x [N, F], or compressed rows of one") from error
    y, edges = arrays["labels"], arrays["edge_index"]
    if x.ndim != 2 or y.shape != (len(x),) or y.dtype.kind not in "iu" or y.max(initial=-1) < 1:
        raise ValueError(f"{file}: x is {x.shape}, labels {y.shape} {y.dtype}; expected [N, F] and whole numbers [N], two classes at least")
    if edges.ndim != 2 or len(edges) != 2 or edges.dtype.kind not in "iu" or (edges.size and not 0 <= edges.min() <= edges.max() < len(x)):
        raise ValueError(f"{file}: edge_index is {edges.shape} {edges.dtype}; expected node numbers 0..{len(x) - 1}, [2, E]")
    none = np.empty(0, np.int64)
    return CitationGraph(x, edges.astype(np.int64), y.astype(np.int64), int(y.max()) + 1, none, none, none, name="graph")


def split_links(graph: CitationGraph, seed: int) -> tuple[Any, Any, Any]:
    """A graph's edges in parts: 10 % validate, 20 % test."""
    torch.manual_seed(seed)
    split = RandomLinkSplit(num_val=0.1, num_test=0.2, is_undirected=True, add_negative_train_samples=False)
    return split(Data(x=torch.as_tensor(graph.x), edge_index=torch.as_tensor(graph.edge_index)))


def fold(graph: CitationGraph, seed: int) -> Any:
    """The graph with fold `seed` of 5: 64 % of the labelled nodes train, 16 % validate, 20 % test (every five seeds another order)."""
    y = torch.as_tensor(graph.y)
    labelled = (y >= 0).nonzero()[:, 0]
    order = labelled[torch.randperm(len(labelled), generator=torch.Generator().manual_seed(seed // FOLDS))]
    ends = [round(len(order) * part / FOLDS) for part in range(FOLDS + 1)]
    start, end = ends[seed % FOLDS : seed % FOLDS + 2]
    rest = torch.cat([order[:start], order[end:]])
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    watched = round(VALIDATION * len(rest))
    data = Data(x=torch.as_tensor(graph.x), edge_index=torch.as_tensor(graph.edge_index), y=y)
    for name, rows in (("train_mask", rest[watched:]), ("val_mask", rest[:watched]), ("test_mask", order[start:end])):
        data[name] = mask_of(rows, len(y))
    return data


def mask_of(rows: Tensor, count: int) -> Tensor:
    """Booleans [count], true at the rows."""
    mask = torch.zeros(count, dtype=torch.bool)
    mask[rows] = True
    return mask


def random_geometric_graph(nodes: int, features: int, classes: int = 5, degree: int = 10, seed: int = 0) -> Any:
    """Points in the unit square, joined where they are near (`degree` neighbours in the mean); a class is a strip, features are waves."""
    draw = np.random.default_rng(seed)
    points = draw.random((nodes, 2))
    pairs = KDTree(points).query_pairs(math.sqrt(degree / (math.pi * nodes)), output_type="ndarray").T
    waves = np.cos(points @ draw.normal(scale=8, size=(2, features)) + draw.uniform(0, 2 * math.pi, features))
    edges = torch.as_tensor(np.concatenate([pairs, pairs[::-1]], axis=1))
    mask = torch.as_tensor(draw.random(nodes) < 1 - 1 / FOLDS)
    y = torch.as_tensor((points[:, 0] * classes).astype(np.int64))
    return Data(x=torch.as_tensor(waves, dtype=torch.float32), edge_index=edges, y=y, train_mask=mask)


def step_cpu_seconds(fit: Fit, model: nn.Module, data: Any) -> float:
    """Processor seconds of one step of every layer: the quickest of a stage's, summed over the stages.

    Other work on the machine only ever adds to it, as threads that wait for each other spin.
    """
    ends: list[tuple[str, float]] = []
    fit(model, data, epochs=STEPS, patience=None, callbacks=[lambda line: ends.append((line.stage, time.process_time()))])
    stages = itertools.groupby(ends, key=lambda end: end[0])
    return sum(float(np.diff([seconds for _, seconds in stage]).min()) for _, stage in stages)


def log_step_costs(trial: Any, data: Any, layers: Iterable[int], make: Callable[[int], nn.Module], fit: Fit) -> None:
    """What a step of all layers costs for each number of layers, and by how much its memory grows."""
    peaks = {}
    for count in layers:
        trial.log("step_cpu_seconds", step_cpu_seconds(fit, make(count), data), layers=count)
        model = make(count)
        with trial.tensors("bytes", model, beside=["kept states"], layers=count) as peak:
            fit(model, data, epochs=2, patience=None)
        peaks[count] = peak.total
    trial.log("memory_growth", peaks[max(peaks)] / peaks[min(peaks)])


def shallower(model: ForwardGNN, layers: int) -> ForwardGNN:
    """The first layers of a model whose layers were trained one after the other: what a fit with so many layers gives."""
    first = ForwardGNN(model.in_channels, model.widths[:layers], layers, model.num_classes, model.conv, model.mode, config=model.config)
    first.load_state_dict({name: value for name, value in model.state_dict().items() if name in first.state_dict()})
    return first
