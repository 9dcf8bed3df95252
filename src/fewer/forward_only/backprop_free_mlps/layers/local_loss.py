"""The mean cross-entropy of a linear read-out G = a M^T, and its gradients in closed form: no graph, no backward pass."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def softmax_error(scores: Float[Tensor, "batch classes"], y: Int[Tensor, "batch"]) -> Float[Tensor, "batch classes"]:
    """P = softmax(G) - onehot(y).

    >>> softmax_error(torch.zeros(1, 2), torch.tensor([1]))
    tensor([[ 0.5000, -0.5000]])
    """
    error = torch.softmax(scores, dim=1)
    error[torch.arange(len(y), device=y.device), y] -= 1
    return error


def cross_entropy_gradient(scores: Float[Tensor, "batch classes"], y: Int[Tensor, "batch"]) -> Float[Tensor, "batch classes"]:
    """dG = P / B, the gradient of the batch's mean cross-entropy."""
    return softmax_error(scores, y).div_(len(y))


def projection_gradient(
    score_gradient: Float[Tensor, "batch classes"], a: Float[Tensor, "batch width"], out: Tensor | None = None
) -> Float[Tensor, "classes width"]:
    """dM = dG^T a = P^T a / B, written into `out` where given."""
    return torch.mm(score_gradient.T, a, out=out)


def activation_gradient(
    score_gradient: Float[Tensor, "batch classes"], projection: Float[Tensor, "classes width"], out: Tensor | None = None
) -> Float[Tensor, "batch width"]:
    """da = dG M = P M / B, written into `out` where given."""
    return torch.mm(score_gradient, projection, out=out)
