"""Races: SF's steps against backpropagation's through PyG's own models, kept propagation against none, and memory over depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch_geometric.nn.models import GAT, GCN

from fewer.data import load_cora
from fewer.graphs._shared.layers import HEADS
from fewer.graphs.forward_gnn.model import ForwardGNN
from fewer.graphs.forward_gnn.modes.mode import local_task
from fewer.graphs.forward_gnn.modes.single_forward import layer_inputs, layer_step
from fewer.graphs.forward_gnn.problems import fold, random_geometric_graph
from fewer.meters import tensor_memory
from fewer.study import Bench

bench = Bench("forward-gnn")
HIDDEN, LAYERS = 128, 4

Step = Callable[[], object]


def _cora() -> tuple[Any, int]:
    graph = load_cora()
    return fold(graph, 0), graph.classes


def sf_steps(data: Any, classes: int, conv: str, layers: int = LAYERS, cache: bool | None = None, first: int = 0) -> Step:
    """One SF step of every layer (from `first` on), each on its own constant input: as many updates as one step of backpropagation."""
    torch.manual_seed(0)
    model = ForwardGNN(data.num_features, HIDDEN, layers, classes, conv)  # pyright: ignore[reportArgumentType] - a name
    task = local_task(model.prepare(data))
    inputs = layer_inputs(model, task.inputs)
    steps = [layer_step(layer, x, task, 1e-3, cache) for layer, x in zip(model.layers, inputs, strict=True)][first:]
    return lambda: [step() for step in steps]


def bp_step(model: nn.Module, data: Any) -> Step:
    """One step of backpropagation."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.x, data.edge_index)[data.train_mask], data.y[data.train_mask])
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


@bench.race("a step of every layer, GCN 4x128, Cora", peer="backpropagation through PyG's GCN, normalisation cached", reach=0.5)
def gcn() -> tuple[Step, Step]:
    data, classes = _cora()
    return sf_steps(data, classes, "gcn"), bp_step(GCN(data.num_features, HIDDEN, LAYERS, classes, cached=True), data)


@bench.race("the same without sparse features on our side", peer="backpropagation through PyG's GCN, normalisation cached")
def gcn_dense() -> tuple[Step, Step]:
    data, classes = _cora()
    return sf_steps(data, classes, "gcn", cache=True), bp_step(GCN(data.num_features, HIDDEN, LAYERS, classes, cached=True), data)


@bench.race("a step of every layer, GAT 4x128, Cora (nothing can be kept)", peer="backpropagation through PyG's GAT", reach=1.1)
def gat() -> tuple[Step, Step]:
    data, classes = _cora()
    return sf_steps(data, classes, "gat"), bp_step(GAT(data.num_features, HIDDEN, LAYERS, classes, heads=HEADS), data)


@bench.race("a step of layers 2 to 4, GCN 4x128, Cora", peer="our own without kept propagation")
def kept() -> tuple[Step, Step]:
    data, classes = _cora()
    return sf_steps(data, classes, "gcn", cache=True, first=1), sf_steps(data, classes, "gcn", cache=False, first=1)


@bench.quantity("peak tensor bytes of SF, 8 layers, 20,000 nodes", peer="SF, 2 layers", unit="bytes", reach=1.15)
def memory() -> tuple[float, float]:
    data = random_geometric_graph(20_000, 64)
    peaks = []
    for layers in (8, 2):
        model = ForwardGNN(data.num_features, HIDDEN, layers, int(data.y.max()) + 1)
        with tensor_memory(model, beside=["kept states"]) as peak:
            model.fit(data, epochs=2, patience=None)
        peaks.append(float(peak.total))
    return peaks[0], peaks[1]
