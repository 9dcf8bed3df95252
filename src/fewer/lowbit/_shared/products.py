"""Products of packed matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from fewer.lowbit._shared.blocks import QuantizedTensor, element_values


@torch.no_grad()
def block_matmul(a: QuantizedTensor, b: QuantizedTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """a b of two packed matrices whose blocks lie along the contraction: a [M, K] cut along its rows, b [K, N] along its columns.

    (x W^T is `block_matmul(quantize(x, ...), quantize(W, ...).T)`.) Integers of equal blocks are multiplied as integers, exactly within
    a block, and only then scaled; others are dequantised.

    Args:
        a, b: the matrices.
        dtype: float32 or float64: of the products and their sums.

    Raises:
        ValueError: shapes or blocks that do not meet.

    Examples:
        >>> from fewer.lowbit import quantize
        >>> a = quantize(torch.eye(2), "mxint8")
        >>> block_matmul(a, a.T)
        tensor([[1., 0.],
                [0., 1.]])
    """
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[0] or a.dim != 1 or b.dim != 0:
        raise ValueError(
            f"a is {tuple(a.shape)} cut along dim {a.dim}, b {tuple(b.shape)} along {b.dim}; expected [M, K] along 1 and [K, N] along 0: "
            "quantise both along the contraction, and transpose with .T"
        )
    size = a.fmt.block
    if not (a.fmt.elements.is_integer and b.fmt.elements.is_integer and size == b.fmt.block and size is not None):
        return a.dequantize(dtype) @ b.dequantize(dtype)
    left, right = (element_values(each.fmt.element, each.elements(), dtype) for each in (a, b))
    size = left.shape[1] if size == -1 else size
    if size * a.fmt.elements.max * b.fmt.elements.max >= 2**24:
        left, right = left.double(), right.double()
    steps_a, steps_b = a.steps(dtype), b.steps(dtype)
    out = left.new_zeros(left.shape[0], right.shape[0], dtype=dtype)
    for i, start in enumerate(range(0, left.shape[1], size)):
        dots = left[:, start : start + size] @ right[:, start : start + size].T  # whole numbers below 2^24 (or 2^53): exact
        out += dots.to(dtype) * steps_a[:, i : i + 1] * steps_b[:, i]
    return out
