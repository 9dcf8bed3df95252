"""A layer: a PyG convolution and ReLU, h = ReLU(conv(x, edges)), and what is constant in it while its input is.

GCN and mean-SAGE are linear before the ReLU: with A their propagation matrix, h = ReLU(A x W^T + x U^T + b) (U = 0 in GCN). So a
constant A x is computed once, the products of a constant x with the weights are shared, and rows that no loss reads are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv, GCNConv, MessagePassing, SAGEConv
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from fewer.checks import check_whole, is_whole
from fewer.graphs._shared.sparse import SparseMatrix, sparse_product

ConvolutionName = Literal["gcn", "sage", "gat"]
Convolution = ConvolutionName | Callable[[int, int], MessagePassing]
Matrix = Tensor | SparseMatrix

EPSILON = 1e-8  # the paper's, in norm(h)
HEADS = 4  # of GAT, concatenated
SPARSE_BELOW = 0.1  # share of non-zero features below which a sparse product is quicker than a dense one


def normalize_rows(h: Float[Tensor, "nodes width"]) -> Float[Tensor, "nodes width"]:
    """norm(h) = h / (|h|_2 + 1e-8), row by row.

    >>> normalize_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    return h / (h.norm(dim=1, keepdim=True) + EPSILON)


@dataclass(frozen=True, eq=False)
class Graph:
    """Edges [2, E] from row 0 to row 1, and the propagation matrices that belong to them."""

    edge_index: Int[Tensor, "2 edges"]
    num_nodes: int
    dtype: torch.dtype

    @functools.cached_property
    def gcn(self) -> SparseMatrix:
        """D^-1/2 (A + I) D^-1/2 with the degrees of this graph, virtual nodes' included."""
        edges, weights = cast("tuple[Tensor, Tensor]", gcn_norm(self.edge_index, None, self.num_nodes, dtype=self.dtype))
        source, target = edges
        return SparseMatrix.of_entries(target, source, weights, (self.num_nodes, self.num_nodes))

    @functools.cached_property
    def sage(self) -> SparseMatrix:
        """D^-1 A: the mean over the nodes that point to a node; zero where none does."""
        source, target = self.edge_index
        weights = 1 / torch.bincount(target, minlength=self.num_nodes).to(self.dtype)[target]
        return SparseMatrix.of_entries(target, source, weights, (self.num_nodes, self.num_nodes))


class GraphLayer(nn.Module):
    """A PyG convolution and ReLU, whose input comes in parts that stand side by side.

    Args:
        widths: of the parts of the input.
        out_channels: of the output.
        conv: "gcn", "sage", "gat", or a function (in_channels, out_channels) -> MessagePassing.

    Raises:
        ValueError: a name that is unknown, or a width that GAT's heads do not divide.
    """

    def __init__(self, widths: Sequence[int], out_channels: int, conv: Convolution) -> None:
        super().__init__()
        self.widths, self.out_channels = tuple(widths), out_channels
        self.kind = conv if isinstance(conv, str) and conv in ("gcn", "sage") else None  # linear: its parts may be shared and kept
        self.attends = conv == "gat"
        self.conv = make_convolution(conv, sum(widths), out_channels)

    def project(self, part: int, x: Matrix) -> Tensor:
        """What a part of the input adds before propagation (linear convolutions), or the part itself (others)."""
        if self.kind is None:
            return x.csr if isinstance(x, SparseMatrix) else x
        start = sum(self.widths[:part])
        return product(x, self._weights()[:, start : start + self.widths[part]])

    def combine(self, projected: Sequence[Tensor], graph: Graph) -> Float[Tensor, "nodes width"]:
        """The layer's output, given what each part adds."""
        if self.kind is None:
            whole = projected[0] if len(projected) == 1 else torch.cat(list(projected), dim=1)
            return torch.relu(self.conv(whole, graph.edge_index))
        total = functools.reduce(torch.add, projected)
        h = sparse_product(getattr(graph, self.kind), total[:, : self.out_channels]).add_(self._bias())  # in place: nothing else reads it
        return torch.relu_(h if self.kind == "gcn" else h.add_(total[:, self.out_channels :]))

    def forward(self, parts: Sequence[Matrix], graph: Graph) -> Float[Tensor, "nodes width"]:
        return self.combine([self.project(part, x) for part, x in enumerate(parts)], graph)

    def outputs_of(self, x: Matrix, graph: Graph, rows: Int[Tensor, "rows"], keep: bool) -> Callable[[], Float[Tensor, "rows width"]]:
        """A function that gives the layer's output at these rows, for its present weights and a constant input.

        Args:
            x: the whole input [nodes, width], one part.
            keep: keep A x for these rows, so that a call is a dense product (linear convolutions only).
        """
        if self.attends:  # attention at a node reads the edges that end there alone
            graph = Graph(graph.edge_index[:, torch.isin(graph.edge_index[1], rows)], graph.num_nodes, graph.dtype)
        if self.kind is None:
            return lambda: self([x], graph)[rows]
        propagation = cast("SparseMatrix", getattr(graph, self.kind)).select(rows)
        own = rows_of(x, rows) if self.kind == "sage" else None
        kept = propagate(propagation, x) if keep else None

        def outputs() -> Tensor:
            weights = self._weights()
            neighbours, bias = weights[: self.out_channels], self._bias()
            h = F.linear(kept, neighbours, bias) if kept is not None else sparse_product(propagation, product(x, neighbours)).add_(bias)
            return torch.relu_(h if own is None else h.add_(product(own, weights[self.out_channels :])))

        return outputs

    def _weights(self) -> Tensor:
        """W, and U below it in SAGE."""
        if self.kind == "gcn":
            return self.conv.lin.weight
        return torch.cat([self.conv.lin_l.weight, self.conv.lin_r.weight])

    def _bias(self) -> Tensor:
        return self.conv.bias if self.kind == "gcn" else self.conv.lin_l.bias


def layer_widths(hidden_channels: int | Sequence[int], num_layers: int) -> list[int]:
    """One width a layer; ValueError where they are not as many as the layers or no whole numbers.

    >>> layer_widths(16, 3), layer_widths([8, 4], 2)
    ([16, 16, 16], [8, 4])
    """
    check_whole(num_layers=num_layers)
    widths = [int(hidden_channels)] * num_layers if is_whole(hidden_channels) else list(hidden_channels)  # pyright: ignore[reportArgumentType]
    if len(widths) != num_layers:
        raise ValueError(f"hidden_channels has {len(widths)} widths for {num_layers} layers; expected one number, or one a layer")
    for width in widths:
        check_whole(hidden_channels=width)
    return widths


def make_convolution(conv: Convolution | str, in_channels: int, out_channels: int) -> Any:
    """The PyG convolution of that name, or what the function makes."""
    if conv == "gcn":
        return GCNConv(in_channels, out_channels)
    if conv == "sage":
        return SAGEConv(in_channels, out_channels, aggr="mean")
    if conv == "gat":
        if out_channels % HEADS:
            raise ValueError(f"hidden_channels is {out_channels}; GAT concatenates {HEADS} heads: expected a multiple of {HEADS}")
        return GATConv(in_channels, out_channels // HEADS, heads=HEADS, concat=True)
    if not callable(conv):
        raise ValueError(f'conv is {conv!r}; expected "gcn", "sage", "gat" or a function (in_channels, out_channels) -> MessagePassing')
    return conv(in_channels, out_channels)


def product(x: Matrix, weights: Float[Tensor, "out in"]) -> Float[Tensor, "nodes out"]:
    """x W^T."""
    return sparse_product(x, weights.T.contiguous()) if isinstance(x, SparseMatrix) else F.linear(x, weights)


@torch.no_grad()
def propagate(propagation: SparseMatrix, x: Matrix) -> Float[Tensor, "rows width"]:
    """A x, a constant."""
    return propagation.csr @ (x.csr.to_dense() if isinstance(x, SparseMatrix) else x)


def rows_of(x: Matrix, rows: Int[Tensor, "rows"]) -> Matrix:
    return x.select(rows) if isinstance(x, SparseMatrix) else x[rows]


def compact(x: Float[Tensor, "nodes features"], layer: GraphLayer) -> Matrix:
    """The features as the layer multiplies them quickest: without their zeros, where most are zero and its convolution can take that."""
    takes_sparse = layer.kind is not None or (layer.attends and len(layer.widths) == 1)
    return SparseMatrix.of_dense(x) if takes_sparse and float((x != 0).to(torch.float32).mean()) < SPARSE_BELOW else x
