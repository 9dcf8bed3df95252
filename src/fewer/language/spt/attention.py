"""Attention over the keys that a lookup kept: values and indices of n K entries a head are stored, and no tensor of n x n ever.

Source: SPT, arXiv 2312.10365: a = clamp(q.k / sqrt(d), -10, 10), softmax over the kept entries; the clamp stands for subtracting the largest.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fewer.language.spt.quantizer import CSR


def sparse_attention(
    q: Float[Tensor, "B H n d"],
    k: Float[Tensor, "B G t d"],
    v: Float[Tensor, "B G t d"],
    csr: CSR,
    clamp: float | None = 10.0,
    scale: float | None = None,
) -> Float[Tensor, "B H n d"]:
    """Softmax attention over the kept keys; a query that keeps none gets zeros.

    Args:
        q, k, v: H query heads and G key heads (H is a multiple of G); half types are computed in float32.
        csr: what `lookup` gave for them.
        clamp: scores are clamped to it, and have no gradient beyond; None subtracts the largest score instead.
        scale: of q.k; 1 / sqrt(d) where it is None.

    Raises:
        ValueError: shapes that do not fit, a clamp that is not above 0.
    """
    batch, heads, queries, width = q.shape
    if csr.heads != (batch, heads, queries) or k.shape != v.shape or heads % k.shape[1] or k.shape[-1] != width:
        raise ValueError(
            f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} and the kept keys are of {csr.heads}; expected [B, H, n, d], "
            "[B, G, t, d] twice and the lookup of these very codes"
        )
    if clamp is not None and not clamp > 0:
        raise ValueError(f"clamp is {clamp}; expected a number above 0, or None")
    work = q.dtype if q.dtype == torch.float64 else torch.float32
    parts: Any = tuple(each.to(work).contiguous() for each in (q, k, v))
    out: Any = _Attention.apply(*parts, csr, clamp or 0.0, width**-0.5 if scale is None else scale)
    return out.to(q.dtype)


class _Attention(torch.autograd.Function):
    """Heads are independent but for the gradients of keys and values that several query heads share: a task is a key head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, csr: CSR, clamp: float, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        from fewer.language.spt import kernels

        run: Any = kernels.attend
        out, weights = torch.empty_like(q), q.new_empty(len(csr.indices))

        def one(b: int, h: int) -> None:
            indptr, indices, part = _of_head(csr, b, h)
            g = h * k.shape[1] // q.shape[1]
            run(*_arrays(q[b, h], k[b, g], v[b, g]), indptr, indices, scale, clamp, *_arrays(out[b, h], weights[part]))

        if kernels.in_loops(q):
            kernels.each_of(functools.partial(one, b, h) for b in range(len(q)) for h in range(q.shape[1]))
        else:
            kernels.attend_in_chunks(q, k, v, csr.indptr, csr.indices, scale, clamp, out, weights)
        ctx.save_for_backward(q, k, v, weights, csr.indptr, csr.indices)
        ctx.heads, ctx.scale = csr.heads, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        from fewer.language.spt import kernels

        q, k, v, weights, indptr, indices = ctx.saved_tensors
        csr = CSR(indptr, indices, ctx.heads)
        run: Any = kernels.attend_backward
        grad, share = grad.contiguous(), q.shape[1] // k.shape[1]
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)

        def one(b: int, g: int) -> None:
            for h in range(g * share, (g + 1) * share):
                indptr, indices, part = _of_head(csr, b, h)
                run(
                    *_arrays(q[b, h], k[b, g], v[b, g]), indptr, indices, ctx.scale,
                    *_arrays(weights[part], grad[b, h], dq[b, h], dk[b, g], dv[b, g]),
                )  # fmt: skip

        if kernels.in_loops(q):
            kernels.each_of(functools.partial(one, b, g) for b in range(len(q)) for g in range(k.shape[1]))
        else:
            kernels.attend_backward_in_chunks(q, k, v, csr.indptr, csr.indices, ctx.scale, weights, grad, dq, dk, dv)
        return dq, dk, dv, None, None, None


def _of_head(csr: CSR, b: int, h: int) -> tuple[np.ndarray, np.ndarray, slice]:
    """(indptr, indices, the entries) of a head."""
    _, heads, queries = csr.heads
    at = (b * heads + h) * queries
    indptr = csr.indptr[at : at + queries + 1]
    part = slice(int(indptr[0]), int(indptr[-1]))
    return indptr.numpy(), csr.indices[part].numpy(), part


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [each.detach().numpy() for each in tensors]
