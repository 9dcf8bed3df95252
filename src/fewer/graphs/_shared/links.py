"""A link prediction task made ready: the graph, its positive pairs, negatives drawn on demand, and pairs to be judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fewer.graphs._shared.graph_input import check_graph, check_precision
from fewer.graphs._shared.layers import Graph


@dataclass(frozen=True, eq=False)
class LinkProblem:
    """What a link predictor works on.

    Attributes:
        graph: the edges that messages take.
        x: features of the nodes [N, F].
        pairs: pairs with a label [2, P].
        truth: 1 where the pair is an edge, 0 where not [P].
    """

    graph: Graph
    x: Float[Tensor, "nodes features"]
    pairs: Int[Tensor, "2 pairs"]
    truth: Float[Tensor, "pairs"]

    @property
    def positives(self) -> Int[Tensor, "2 positives"]:
        return self.pairs[:, self.truth > 0]

    def negatives(self, generator: torch.Generator | None) -> Int[Tensor, "2 positives"]:
        """As many pairs as there are positive ones, none of them a known edge nor a node with itself, drawn anew."""
        wanted, nodes = self.positives.shape[1], self.graph.num_nodes
        known = torch.cat([self._known(), torch.arange(nodes, device=self.x.device) * (nodes + 1)])
        found = self.pairs.new_empty(0)
        for _ in range(100):
            drawn = torch.randint(nodes * nodes, (2 * wanted,), generator=generator, device=generator.device if generator else "cpu")
            drawn = drawn.to(self.x.device)
            found = torch.cat([found, drawn[~torch.isin(drawn, known)]])[:wanted]
            if len(found) == wanted:
                return torch.stack([found // nodes, found % nodes])
        raise ValueError(f"the graph of {nodes} nodes has too few pairs without an edge to draw {wanted} negatives; give a sparser graph")

    def _known(self) -> Int[Tensor, "edges"]:
        """Edges and positive pairs in both directions, as numbers."""
        both = torch.cat([self.graph.edge_index, self.positives], dim=1)
        return torch.cat([both[0] * self.graph.num_nodes + both[1], both[1] * self.graph.num_nodes + both[0]])


def prepare_links(data: Any, *, like: Tensor, in_channels: int | None = None) -> LinkProblem:
    """The task of a graph that PyG's `RandomLinkSplit` made.

    Raises:
        ValueError: a graph that cannot be used, or one without edge_label and edge_label_index.
    """
    check_graph(data, in_channels)
    check_precision(like)
    for name in ("edge_label", "edge_label_index"):
        if name not in data:
            raise ValueError(
                f"the graph has no {name}; expected pairs with labels: split it with torch_geometric.transforms.RandomLinkSplit"
            )
    pairs, truth = data.edge_label_index, data.edge_label
    check_pairs(pairs, len(data.x))
    if truth.shape != (pairs.shape[1],) or not bool((truth > 0).any()):
        raise ValueError(
            f"data.edge_label is {tuple(truth.shape)} with {int((truth > 0).sum())} positives; expected a 0 or 1 for each of the "
            f"{pairs.shape[1]} pairs, and at least one 1"
        )
    x = data.x.to(like)
    return LinkProblem(plain_graph(data, like), x, pairs.to(x.device), truth.to(x))


def plain_graph(data: Any, like: Tensor) -> Graph:
    """The graph that messages take."""
    return Graph(data.edge_index.to(like.device), len(data.x), like.dtype)


def check_pairs(pairs: Any, nodes: int) -> None:
    """ValueError unless the pairs are integers [2, P] in 0..nodes-1."""
    if not isinstance(pairs, Tensor) or pairs.ndim != 2 or len(pairs) != 2 or pairs.dtype != torch.long:
        given = f"{tuple(pairs.shape)} {pairs.dtype}" if isinstance(pairs, Tensor) else type(pairs).__name__
        raise ValueError(f"edge_label_index is {given}; expected int64 [2, P]: a column a pair")
    if pairs.numel() and not (int(pairs.min()) >= 0 and int(pairs.max()) < nodes):
        raise ValueError(f"edge_label_index names nodes {int(pairs.min())}..{int(pairs.max())}; expected 0..{nodes - 1}")


def binary_loss(positive: Float[Tensor, "positives"], negative: Float[Tensor, "negatives"]) -> Float[Tensor, ""]:
    """BCE with logits: 1 for positives, 0 for negatives, the mean over both."""
    return (F.softplus(-positive).sum() + F.softplus(negative).sum()) / (len(positive) + len(negative))


def pair_products(h: Float[Tensor, "nodes width"], pairs: Int[Tensor, "2 pairs"]) -> Float[Tensor, "pairs width"]:
    """The elementwise product of the two embeddings of each pair."""
    return h[pairs[0]] * h[pairs[1]]


def link_logits(h: Float[Tensor, "nodes width"], pairs: Int[Tensor, "2 pairs"]) -> Float[Tensor, "pairs"]:
    """The inner products of the pairs' embeddings."""
    return pair_products(h, pairs).sum(dim=1)


def accuracy(scores: Float[Tensor, "nodes classes"], y: Int[Tensor, "nodes"]) -> float:
    """The share of nodes whose highest score is their label's."""
    return float((scores.argmax(dim=1) == y).to(torch.float64).mean())


def area_under_curve(scores: Float[Tensor, "pairs"], truth: Float[Tensor, "pairs"]) -> float:
    """AUC: the chance that a positive pair scores above a negative one, ties counting half; nan without both kinds.

    >>> area_under_curve(torch.tensor([0.9, 0.5, 0.5]), torch.tensor([1.0, 1.0, 0.0]))
    0.75
    """
    from scipy.stats import rankdata

    positive = truth > 0
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores.double().cpu().numpy())[positive.cpu().numpy()]
    return float((ranks.sum() - positives * (positives + 1) / 2) / (positives * negatives))
