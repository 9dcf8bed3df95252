"""The local losses: class logits from virtual nodes, goodness, and scores of pairs (arXiv 2403.11004)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fewer.graphs._shared.links import binary_loss

THETA = 2.0  # the goodness above which an example counts as positive


def class_logits(
    h: Float[Tensor, "nodes width"], h_virtual: Float[Tensor, "classes width"], temperature: float = 1.0
) -> Float[Tensor, "nodes classes"]:
    """h h_virtual^T / temperature.

    >>> import torch
    >>> class_logits(torch.tensor([[1.0, 2.0]]), torch.eye(2), temperature=2.0)
    tensor([[0.5000, 1.0000]])
    """
    return h @ h_virtual.T / temperature


def single_forward_loss(
    h_train: Float[Tensor, "train width"], h_virtual: Float[Tensor, "classes width"], y: Int[Tensor, "train"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """Cross-entropy of the class logits; its gradient passes through both the nodes and the virtual nodes."""
    return F.cross_entropy(class_logits(h_train, h_virtual, temperature), y)


def sum_goodness(h: Float[Tensor, "nodes width"]) -> Float[Tensor, "nodes"]:
    """The sum of squares: what a layer is trained on."""
    return h.square().sum(dim=1)


def mean_goodness(h: Float[Tensor, "nodes width"], theta: float = THETA) -> Float[Tensor, "nodes"]:
    """The mean of squares minus theta: what a layer adds to a class's score."""
    return h.square().mean(dim=1) - theta


def forward_forward_loss(
    positive: Float[Tensor, "positives"], negative: Float[Tensor, "negatives"], theta: float = THETA
) -> Float[Tensor, ""]:
    """BCE of sigmoid(goodness - theta) against 1 for positives and 0 for negatives."""
    return binary_loss(positive - theta, negative - theta)


def pair_score(products: Float[Tensor, "pairs width"], loss: str, theta: float = THETA) -> Float[Tensor, "pairs"]:
    """The logit of a pair: the sum of its product ("FL"), or the product's goodness minus theta ("FF")."""
    return products.sum(dim=1) if loss == "FL" else sum_goodness(products) - theta
