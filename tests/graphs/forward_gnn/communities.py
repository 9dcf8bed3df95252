"""Small graphs, networks on them, and what a loss's graph reaches, for the tests of forward-gnn."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.utils import erdos_renyi_graph

from fewer.graphs import ForwardGNN

CLASSES, FEATURES = 3, 12


def community_graph(nodes=90, seed=0, zeros=0.0, dtype=torch.float32) -> Data:
    """Three communities, joined mostly within; features tell them apart a little. Node 0 is isolated."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(nodes) % CLASSES
    torch.manual_seed(seed)
    edges = erdos_renyi_graph(nodes, 0.25)
    kept = (y[edges[0]] == y[edges[1]]) | (edges.sum(0) % 5 == 0)
    edges = edges[:, kept & (edges != 0).all(0)]
    x = torch.randn(nodes, FEATURES, generator=draw, dtype=dtype) + 0.7 * F.one_hot(y, FEATURES)
    x = x * (torch.rand(nodes, FEATURES, generator=draw) >= zeros)
    order = torch.randperm(nodes, generator=draw)
    data = Data(x=x, edge_index=edges, y=y)
    for name, rows in (
        ("train_mask", order[: nodes // 2]),
        ("val_mask", order[nodes // 2 : 3 * nodes // 4]),
        ("test_mask", order[3 * nodes // 4 :]),
    ):
        data[name] = torch.zeros(nodes, dtype=torch.bool)
        data[name][rows] = True
    return data


def network(mode="single", layers=2, hidden=16, seed=0, **settings) -> ForwardGNN:
    torch.manual_seed(seed)
    return ForwardGNN(FEATURES, hidden, layers, CLASSES, mode=mode, **settings)


def fit(model, data, **settings):
    return model.fit(data, **{"epochs": 20, "lr": 1e-2, "generator": torch.Generator().manual_seed(0)} | settings)


def same(one, other) -> bool:
    """Whether two state dicts are equal, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses_of(history) -> list[float]:
    return [line.train_loss for line in history.epochs]


def leaves(loss: torch.Tensor) -> set[int]:
    """The parameters that the loss's graph reaches."""
    found, waiting, seen = set(), [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [each for each, _ in node.next_functions]
    return found
