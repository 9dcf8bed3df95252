"""Casts of blocks on a GPU in one pass over the tensor: the values of the torch path, bit for bit where nothing is drawn."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewer.lowbit._shared.formats import ElementFormat, Rule

TO_WHOLE = 1.5 * 2**23  # a float32 of that size has no fraction: what is added to it is rounded to nearest, ties to even
WIDTH = 1024  # values a program


@triton.jit
def _cast(
    x, steps, out, count, size, inner, least, ulp, lowest, highest, seed,
    ONLY: tl.constexpr, WHOLE: tl.constexpr, DRAWN: tl.constexpr, BITS: tl.constexpr, TO_WHOLE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip  # pragma: no cover - compiled
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = place < count
    block = place // (size * inner) * inner + place % inner
    given = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(steps + block, mask=inside, other=1.0)
    v = tl.div_rn(given, tl.where(step == 0, 1.0, step))
    v = tl.where(v > highest, highest, v)  # the range's ends are on the grid: what is clamped first is rounded to the same
    v = tl.where(v < lowest, lowest, v)
    bits = v.to(tl.uint32, bitcast=True)
    if WHOLE:
        spacing = tl.full((WIDTH,), 1.0, tl.float32)
    else:
        binade = (bits & 0x7F800000).to(tl.float32, bitcast=True)
        spacing = tl.where(binade > least, binade, least) * ulp
    if DRAWN:
        t = tl.div_rn(tl.abs(v), spacing)
        low = tl.floor(t)
        if BITS == 0:
            up = t - low > tl.rand(seed, place)
        else:
            word = tl.randint(seed, place).to(tl.uint32, bitcast=True) >> (32 - BITS)
            up = t - low >= 1.0 - (word.to(tl.float32) + 0.5) / (1 << BITS)
        q = (low + tl.where(up, 1.0, 0.0)) * spacing
    else:
        shift = spacing * TO_WHOLE
        q = tl.abs((v + shift) - shift)
    q = ((q.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) | (bits & 0x80000000)).to(tl.float32, bitcast=True)
    if WHOLE:
        q = q + 0.0  # there is no -0
    tl.store(out + place, q if ONLY else q * step, mask=inside)


def cast_blocks(blocks: Tensor, steps: Tensor, element: ElementFormat, rule: Rule, out: Tensor, elements_only: bool = False) -> None:
    """out <- steps q(blocks / steps): blocks [blocks, block, inner], float32, bfloat16 or float16, steps [blocks, 1, inner] float32.

    Args:
        element: an integer or floating point format.
        rule: "nearest" or "stochastic"; of its generator one word is drawn, the key of Philox numbers by place.
        elements_only: out <- q, on the element's own grid.
    """
    drawn = rule.rounding == "stochastic"
    seed = int(torch.randint(0, 2**31 - 1, (1,), generator=rule.generator, device=blocks.device)) if drawn else 0
    least = 1.0 if element.is_integer else 2.0 ** (1 - element.bias)
    made = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    _cast[(triton.cdiv(blocks.numel(), WIDTH),)](
        blocks, steps.contiguous(), made, blocks.numel(), blocks.shape[1], blocks.shape[2],
        least, 2.0**-element.mantissa_bits, element.lowest, element.max, seed,
        ONLY=elements_only, WHOLE=element.is_integer, DRAWN=drawn, BITS=rule.random_bits or 0, TO_WHOLE=TO_WHOLE, WIDTH=WIDTH,
    )  # fmt: skip
    if made is not out:
        out.copy_(made)  # rounded to nearest, as Triton's interpreter does not
