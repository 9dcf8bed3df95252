"""Optimal brain surgeon with the empirical Fisher matrix as Hessian: which weights to drop, and what the others do about it."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.optimization.mfac.inverse_fisher import InverseFisher, cholesky, gram, self_products, split_blocks

CHUNK = 65536  # columns that are worked on in float64 at a time


def saliency(weights: Float[Tensor, "d"], diagonal: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
    """rho_i = w_i^2 / (2 [F^{-1}]_ii): by how much the loss rises where weight i is dropped and the others make the best of it.

    Examples:
        >>> saliency(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 4.0]))
        tensor([1.0000, 0.5000])
    """
    return weights.square() / (2 * diagonal)


def independent_update(
    fisher: InverseFisher, diagonal: Float[Tensor, "d"], weights: Float[Tensor, "d"], dropped: Bool[Tensor, "d"]
) -> Float[Tensor, "d"]:
    """F^{-1} t with t_i = -w_i / [F^{-1}]_ii for the dropped: the single-weight updates added up, as if those did not know of each other."""
    return fisher @ torch.where(dropped, -weights / diagonal, 0.0)


@torch.no_grad()
def joint_update(
    grads: Float[Tensor, "m d"],
    damping: float,
    block_size: int,
    weights: Float[Tensor, "d"],
    dropped: Bool[Tensor, "d"],
    chunk: int = CHUNK,
) -> Float[Tensor, "d"]:
    """The step of least 1/2 delta^T F delta with delta_K = -w_K for the dropped set K: optimal brain surgeon for a set, exactly.

    It is -F^{-1}_{:,K} (F^{-1}_{KK})^{-1} w_K. Said from the side of those that stay, R, it is delta_R = F_RR^{-1} F_RK w_K, or

        delta_R = G_R^T (lambda m I + G_R G_R^T)^{-1} G_K w_K

    which needs an m x m system however many are dropped. Not in the paper.
    """
    done = []
    ends = 0
    for part in split_blocks(grads, min(block_size, grads.shape[1])):
        blocks, m, b = part.shape
        start, ends = ends, ends + blocks * b
        w, k = (each[start:ends].view(blocks, b) for each in (weights.double(), dropped))
        solve = _from_gradients if b >= m else _from_weights
        at_once = max(1, chunk // max(b, m))
        groups = zip(part.split(at_once), w.split(at_once), k.split(at_once), strict=True)
        done += [solve(g, damping, w_, k_, chunk).flatten() for g, w_, k_ in groups]
    return torch.cat(done).to(weights.dtype)


def _from_gradients(grads: Tensor, damping: float, w: Tensor, dropped: Tensor, chunk: int) -> Float[Tensor, "blocks b"]:
    """The m x m system: for blocks of at least m weights."""
    blocks, m, _ = grads.shape
    matrix = torch.zeros(blocks, m, m, dtype=torch.float64, device=grads.device)
    lost = torch.zeros(blocks, m, 1, dtype=torch.float64, device=grads.device)  # G_K w_K
    for g, w_, k in zip(grads.split(chunk, 2), w.split(chunk, 1), dropped.split(chunk, 1), strict=True):
        g = g.double()
        staying = g * ~k[:, None]
        matrix += self_products(staying)
        lost += g @ (w_ * k)[..., None]
    answer = torch.cholesky_solve(lost, cholesky(matrix, damping * m))
    delta = -w * dropped
    for g, k, part in zip(grads.split(chunk, 2), dropped.split(chunk, 1), delta.split(chunk, 1), strict=True):
        part += (g.double().mT @ answer)[..., 0] * ~k
    return delta


def _from_weights(grads: Tensor, damping: float, w: Tensor, dropped: Tensor, chunk: int) -> Float[Tensor, "blocks b"]:
    """F_RR delta_R = F_RK w_K, b x b: for blocks of fewer weights than gradients. Rows of K are made those of the identity."""
    m, stays = grads.shape[1], ~dropped
    matrix = gram(grads.mT, chunk)
    right = (matrix @ (w * dropped)[..., None]) * stays[..., None]
    matrix *= stays[:, None] & stays[..., None]
    delta = torch.cholesky_solve(right, cholesky(matrix, damping * m))[..., 0]
    return torch.where(dropped, -w, delta)


def loss_increase(grads: Float[Tensor, "m d"], damping: float, block_size: int, delta: Float[Tensor, "d"]) -> float:
    """1/2 delta^T F delta: by how much the quadratic model says the loss rises.

    Examples:
        >>> loss_increase(torch.tensor([[2.0, 0.0]]), 1.0, 2, torch.tensor([1.0, 1.0]))  # F = diag(5, 1)
        3.0
    """
    blocks = zip(split_blocks(grads, min(block_size, grads.shape[1])), split_blocks(delta[None], min(block_size, len(delta))), strict=True)
    along = sum(float((g.double() @ part.double().mT).square().sum()) for g, part in blocks)
    return damping * float(delta.double().square().sum()) / 2 + along / (2 * len(grads))
