"""G x and G^T y on a GPU: one Triton kernel over tiles of columns, which reads each tile of G once for whichever of the two is asked.

Sums within a tile are float32 (G may be stored in bfloat16 or float16); the tiles' parts of G x (split-k) are added in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

COLUMNS, ROWS = 128, 32  # of the piece of G that a program holds at a time


@triton.jit
def _fused_products(
    grads, x, y, partial, out, m, d, stride, WITH_X: tl.constexpr, WITH_Y: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # pragma: no cover - compiled
    tile = tl.program_id(0)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < d
    if WITH_X:
        part = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for first in range(0, m, ROWS):
        rows = first + tl.arange(0, ROWS)
        held = rows < m
        places = rows[:, None].to(tl.int64) * stride + columns[None, :]
        piece = tl.load(grads + places, mask=held[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if WITH_X:
            tl.store(partial + tile.to(tl.int64) * m + rows, tl.sum(piece * part[None, :], axis=1), mask=held)
        if WITH_Y:
            total += tl.sum(piece * tl.load(y + rows, mask=held, other=0.0)[:, None], axis=0)
    if WITH_Y:
        tl.store(out + columns, total, mask=inside)


def fused_products(
    grads: Float[Tensor, "m d"], x: Float[Tensor, "d"] | None = None, y: Float[Tensor, "m"] | None = None
) -> tuple[Float[Tensor, "m"], Float[Tensor, "d"]]:
    """(G x in float64, G^T y in float32), both of one pass over G; of what is not asked for, an empty tensor.

    Args:
        grads: float32, bfloat16 or float16, rows contiguous, on the device that Triton runs on.
        x: [d].
        y: [m].
    """
    m, d = grads.shape
    programs = triton.cdiv(d, COLUMNS)
    partial = grads.new_empty((programs, m) if x is not None else (0, m), dtype=torch.float32)
    out = grads.new_empty(d if y is not None else 0, dtype=torch.float32)
    left = grads if x is None else x.to(grads.device).contiguous()
    right = grads if y is None else y.to(grads.device, torch.float32).contiguous()
    flags: dict[str, Any] = {"WITH_X": x is not None, "WITH_Y": y is not None, "ROWS": ROWS, "COLUMNS": COLUMNS}
    _fused_products[(programs,)](grads, left, right, partial, out, m, d, grads.stride(0), **flags)
    return partial.sum(0, dtype=torch.float64), out
