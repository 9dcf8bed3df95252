"""What the study's arms share: citation graphs in folds, a random geometric graph, and the costs of a step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor, nn
from torch_geometric.data import Data

from fewer import meters
from fewer.data import CitationGraph
from fewer.graphs.forward_gnn.model import ForwardGNN
from fewer.graphs.forward_gnn.training import History

FOLDS = 5
VALIDATION = 0.2  # of what does not test
STEPS = 6  # of a timed fit; the first of each stage is left out

Fit = Callable[..., History]


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


def step_seconds(history: History) -> float:
    """Seconds of one step of every layer: the mean over a stage's steps after its first one, summed over the stages."""
    total = 0.0
    for _, lines in itertools.groupby(history.epochs, key=lambda line: line.stage):
        seconds = [line.seconds for line in lines]
        total += float(np.median(np.diff(seconds)))
    return total


def log_step_costs(trial: Any, data: Any, layers: Iterable[int], make: Callable[[int], nn.Module], fit: Fit) -> None:
    """Seconds of a step of all layers, and the peak of tensor bytes of a fit, for each number of layers."""
    peaks = {}
    for count in layers:
        history = fit(make(count), data, epochs=STEPS, patience=None)
        trial.log("step_seconds", step_seconds(history), layers=count)
        model = make(count)
        with meters.tensor_memory(model, beside=["kept states"]) as peak:
            fit(model, data, epochs=2, patience=None)
        peaks[count] = peak.total
        trial.log("step_bytes", peak.total, layers=count)
    trial.log("memory_growth", peaks[max(peaks)] / peaks[min(peaks)])


def shallower(model: ForwardGNN, layers: int) -> ForwardGNN:
    """The first layers of a model whose layers were trained one after the other: what a fit with so many layers gives."""
    first = ForwardGNN(model.in_channels, model.widths[:layers], layers, model.num_classes, model.conv, model.mode, config=model.config)
    first.load_state_dict({name: value for name, value in model.state_dict().items() if name in first.state_dict()})
    return first
