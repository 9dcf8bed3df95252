"""The paper's static algorithm as it is written: the Sherman-Morrison formula unrolled over the gradients.

    v_k = g_k / lambda - sum_{j<k} v_j (v_j . g_k) / c_j         c_k = m + g_k . v_k
    F^{-1} x = x / lambda - sum_k v_k (v_k . x) / c_k            [F^{-1}]_ij = [i = j] / lambda - sum_k V_ki V_kj / c_k

It works in the gradients' own dtype, float32 at least. It is the reference that the factor is held against, and what the factor is raced with.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.optimization.mfac.gradients import wide


def precompute(grads: Float[Tensor, "blocks m b"], damping: float) -> tuple[Float[Tensor, "blocks m b"], Float[Tensor, "blocks m"]]:
    """V and c of every block, in O(d m^2).

    Examples:
        >>> v, c = precompute(torch.tensor([[[2.0, 0.0]]]), damping=1.0)
        >>> v, c
        (tensor([[[2., 0.]]]), tensor([[5.]]))
    """
    blocks, m, _ = grads.shape
    v, c = grads / damping, grads.new_empty(blocks, m)
    for k in range(m):
        g = grads[:, k]
        if k:
            v[:, k] -= _combine(v[:, :k], _products(v[:, :k], g) / c[:, :k])
        c[:, k] = m + (g * v[:, k]).sum(1)
    return v, c


def _products(rows: Tensor, x: Tensor) -> Tensor:
    """rows [blocks, k, b] times x [blocks, b]; a single block goes to the quicker matrix-vector product."""
    return (rows[0] @ x[0])[None] if len(rows) == 1 else (rows @ x[..., None])[..., 0]


def _combine(rows: Tensor, weights: Tensor) -> Tensor:
    """rows^T times weights [blocks, k]."""
    return (rows[0].T @ weights[0])[None] if len(rows) == 1 else (weights[:, None] @ rows)[:, 0]


class Recursion:
    """F^{-1} of all blocks of one size by V and c.

    Args:
        grads: [blocks, m, b].
        damping: lambda.
    """

    def __init__(self, grads: Float[Tensor, "blocks m b"], damping: float, chunk: int) -> None:
        self.damping = damping
        self.v, self.c = precompute(grads.to(wide(grads.dtype)), damping)

    def product(self, x: Float[Tensor, "blocks b k"]) -> Float[Tensor, "blocks b k"]:
        """F^{-1} x, O(d m) a column."""
        x = x.to(self.v.dtype)
        return x / self.damping - self.v.mT @ ((self.v @ x) / self.c[..., None])

    def diagonal(self) -> Float[Tensor, "blocks b"]:
        """The diagonal, O(d m)."""
        return 1 / self.damping - torch.einsum("nmb,nm->nb", self.v.square(), 1 / self.c)

    def element(self, block: int, i: int, j: int) -> float:
        """One element within a block, O(m)."""
        return (i == j) / self.damping - float((self.v[block, :, i] * self.v[block, :, j] / self.c[block]).sum())
