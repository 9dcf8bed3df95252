"""Products of a vector with the rows of some matrices, on a CPU: each row is read once, from its first number to its last.

A library's product of a matrix and a vector reads several rows side by side, which memory (not a cache) serves at half its pace.
"""

# pyright: reportCallIssue=false
from __future__ import annotations

import numba
import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor


@numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def dot_rows(matrices, chosen, x, out):  # pragma: no cover - compiled
    """out[i, r] = matrices[chosen[i], r] . x"""
    for i in range(len(chosen)):
        rows = matrices[chosen[i]]
        for r in range(rows.shape[0]):
            total = x[0] * 0
            for c in range(rows.shape[1]):
                total += rows[r, c] * x[c]
            out[i, r] = total


def row_products(matrices: Float[Tensor, "E e d"], chosen: Int64[Tensor, "A"], x: Float[Tensor, "d"]) -> Float[Tensor, "A e"]:
    """The chosen matrices times x; float32 or float64, contiguous, on the CPU, without a gradient.

    >>> row_products(torch.arange(12.0).reshape(3, 2, 2), torch.tensor([2, 0]), torch.tensor([1.0, 10.0]))
    tensor([[ 98., 120.],
            [ 10.,  32.]])
    """
    out = np.empty((len(chosen), matrices.shape[1]), matrices.detach().numpy().dtype)
    dot_rows(matrices.detach().numpy(), chosen.numpy(), x.contiguous().numpy(), out)
    return torch.from_numpy(out)
