"""`over_active_experts` on a GPU, for SiLU experts without a gate: two Triton kernels that read the experts in use alone.

Which experts are in use is listed on the device: a grid has a program for every expert, and those past the end of the list return at
once, so that the host never waits. The second map is split over the list (split-K), its parts added in one order.
"""

# pyright: reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Bool, Float
from torch import Tensor

DEPTH, WIDTH = 64, 64  # of a tile: entries that are summed over at a time, and entries of the result
SPLITS = 8  # parts of the list in the second map
LEAST_ROWS = 16  # that tl.dot takes


@triton.jit
def _up(
    x, gates, up, listed, count, out, tokens, d, e, experts,
    ONE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip  # pragma: no cover - compiled
    slot = tl.program_id(0)
    if slot < tl.load(count):
        expert = tl.load(listed + slot)
        columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
        held, inside = rows < tokens, columns < e
        total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        for first in range(0, d, DEPTH):
            depth = first + tl.arange(0, DEPTH)
            deep = depth < d
            weights = tl.load(up + (expert * e + columns)[None, :] * d + depth[:, None], mask=deep[:, None] & inside[None, :], other=0.0)
            given = tl.load(x + rows[:, None] * d + depth[None, :], mask=held[:, None] & deep[None, :], other=0.0)
            if ONE:  # no tensor core for a single row
                token = tl.sum(given.to(tl.float32), axis=0)
                total += tl.sum(weights.to(tl.float32) * token[:, None], axis=0)[None, :]
            else:
                total = tl.dot(given, weights, total, input_precision="ieee")
        gate = tl.load(gates + rows * experts + expert, mask=held, other=0.0).to(tl.float32)
        kept = total * tl.sigmoid(total) * gate[:, None]
        tl.store(out + (slot * tokens + rows)[:, None] * e + columns[None, :], kept, mask=held[:, None] & inside[None, :])


@triton.jit
def _down(
    hidden, down, listed, count, out, tokens, d, e,
    ONE: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip  # pragma: no cover - compiled
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    part = tl.program_id(1)
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    held, inside = rows < tokens, columns < d
    total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for slot in range(part, tl.load(count), SPLITS):
        expert = tl.load(listed + slot)
        for first in range(0, e, DEPTH):
            depth = first + tl.arange(0, DEPTH)
            deep = depth < e
            weights = tl.load(down + (expert * e + depth)[:, None] * d + columns[None, :], mask=deep[:, None] & inside[None, :], other=0.0)
            given = tl.load(hidden + (slot * tokens + rows)[:, None] * e + depth[None, :], mask=held[:, None] & deep[None, :], other=0.0)
            if ONE:
                token = tl.sum(given.to(tl.float32), axis=0)
                total += tl.sum(weights.to(tl.float32) * token[:, None], axis=0)[None, :]
            else:
                total = tl.dot(given, weights, total, input_precision="ieee")
    tl.store(out + (part * tokens + rows)[:, None] * d + columns[None, :], total, mask=held[:, None] & inside[None, :])


def union_experts(
    x: Float[Tensor, "T d"],
    gates: Float[Tensor, "T E"],
    active: Bool[Tensor, "T E"],
    up: Float[Tensor, "E e d"],
    down: Float[Tensor, "E e d"],
) -> Float[Tensor, "T d"]:
    """sum_i gates_i SiLU(up_i x) down_i over the experts that any token activates, sums in float32.

    Args:
        x: [T, d] in float32, bfloat16 or float16, on the device that Triton runs on.
        up, down: each expert's weights contiguous.

    Raises:
        TypeError: float64, which tensor cores do not multiply.
        RuntimeError: a gradient is wanted.
    """
    if x.dtype == torch.float64:
        raise TypeError("x is float64; expected float32, bfloat16 or float16 with the triton kernel: use kernel='union'")
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, gates, up, down)):
        raise RuntimeError("a gradient is wanted and the triton kernel has none; expected torch.no_grad(): train with kernel='auto'")
    (tokens, d), (experts, e, _) = x.shape, up.shape
    used = active.any(0)
    listed = torch.argsort(~used, stable=True)  # the used ones first
    count = used.sum(dtype=torch.int32)
    one = tokens == 1
    rows = 1 if one else max(LEAST_ROWS, min(64, triton.next_power_of_2(tokens)))
    tiles = {"ONE": one, "ROWS": rows, "DEPTH": DEPTH, "WIDTH": WIDTH}
    hidden = x.new_empty(experts, tokens, e)
    parts = x.new_empty(SPLITS, tokens, d, dtype=torch.float32)
    bands = triton.cdiv(tokens, rows)
    _up[(experts, triton.cdiv(e, WIDTH), bands)](
        x.contiguous(), gates.contiguous(), up, listed, count, hidden, tokens, d, e, experts, **tiles
    )
    _down[(triton.cdiv(d, WIDTH), SPLITS, bands)](hidden, down, listed, count, parts, tokens, d, e, **tiles, SPLITS=SPLITS)
    return parts.sum(0).to(x.dtype)
