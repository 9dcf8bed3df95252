"""Casts of blocks on a CPU in one pass over the tensor: the values of the torch path, bit for bit, several times quicker.

Blocks come as [blocks, block, inner] of float32. Numbers are rounded by an addition that leaves no room for a fraction, so that the
compiler makes vector instructions of it all.
"""

# pyright: reportCallIssue=false
from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from fewer.lowbit._shared.formats import ElementFormat, Rule

SIGN, MAGNITUDE, EXPONENT = np.uint32(1 << 31), np.uint32((1 << 31) - 1), np.uint32(0xFF << 23)
TO_WHOLE = np.float32(1.5 * 2**23)  # a float of that size has no fraction: what is added to it is rounded to nearest, ties to even
A_THREADS_WORK = 1 << 18  # values


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _block_amax(bits, out):
    """out [blocks, inner] <- the largest magnitude in bits [blocks, block, inner]; as a whole number NaN is the largest."""
    blocks, size, inner = bits.shape
    for b in range(blocks):
        if inner == 1:
            top = np.uint32(0)
            for j in range(size):
                top = max(top, bits[b, j, 0] & MAGNITUDE)
            out[b, 0] = top
        else:
            for i in range(inner):
                out[b, i] = 0
            for j in range(size):
                for i in range(inner):
                    out[b, i] = max(out[b, i], bits[b, j, i] & MAGNITUDE)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _spacing(v, least, ulp):
    """The distance of neighbouring codes at v: 2^(max(floor(log2 |v|), emin)) ulp."""
    binade = np.uint32(np.float32(v).view(np.uint32) & EXPONENT).view(np.float32)
    return (binade if binade > least else least) * ulp


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _clamped(v, lowest, highest):
    v = highest if v > highest else v
    return lowest if v < lowest else v


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _signed(q, v):
    """q with the sign of v, which a magnitude that rounds to zero keeps."""
    return np.uint32((np.float32(q).view(np.uint32) & MAGNITUDE) | (np.float32(v).view(np.uint32) & SIGN)).view(np.float32)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _near(x, step, only, whole, least, ulp, lowest, highest):
    v = _clamped(x / (step if step != 0 else np.float32(1)), lowest, highest)
    shift = TO_WHOLE if whole else _spacing(v, least, ulp) * TO_WHOLE
    q = (v + shift) - shift
    return (q if whole else _signed(q, v)) * (np.float32(1) if only else step)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _mixed(z):
    """The finaliser of MurmurHash3: every bit of z moves every bit of the result."""
    z = np.uint32(np.uint32(z ^ (z >> np.uint32(16))) * np.uint32(0x85EBCA6B))
    z = np.uint32(np.uint32(z ^ (z >> np.uint32(13))) * np.uint32(0xC2B2AE35))
    return np.uint32(z ^ (z >> np.uint32(16)))


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _drawn(x, step, only, whole, least, ulp, lowest, highest, place, key, other, bits):
    v = _clamped(x / (step if step != 0 else np.float32(1)), lowest, highest)
    spacing = np.float32(1) if whole else _spacing(v, least, ulp)
    t = abs(v) / spacing
    low = np.float32(np.int32(t))
    word = _mixed(np.uint32(_mixed(np.uint32(place ^ key)) + other))
    if bits:
        share = (np.float32(word >> np.uint32(32 - bits)) + np.float32(0.5)) * (np.float32(1) / np.float32(1 << bits))
        up = t - low >= np.float32(1) - share  # both exact, as t - low + share is not
    else:
        up = t - low > np.float32(np.int32(word >> np.uint32(8))) * np.float32(2.0**-24)
    q = _signed((low + (np.float32(1) if up else np.float32(0))) * spacing, v)
    return (q + np.float32(0) if whole else q) * (np.float32(1) if only else step)  # whole numbers have no -0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _nearest(x, step, only, whole, least, ulp, lowest, highest, out):
    """out <- step q(x / step), or q alone where `only`; a step of 0 divides by 1. The range's ends are on the grid: what is clamped first is rounded to the same."""
    blocks, size, inner = x.shape
    for b in range(blocks):
        if inner == 1:  # the loop over a block is the one to make vectors of
            for j in range(size):
                out[b, j, 0] = _near(x[b, j, 0], step[b, 0], only, whole, least, ulp, lowest, highest)
        else:
            for j in range(size):
                for i in range(inner):
                    out[b, j, i] = _near(x[b, j, i], step[b, i], only, whole, least, ulp, lowest, highest)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _stochastic(x, step, only, whole, least, ulp, lowest, highest, first, key, other, bits, out):
    """The same, up where the share of the way to the next code is above a number that the value's place and two keys give."""
    blocks, size, inner = x.shape
    for b in range(blocks):
        if inner == 1:
            for j in range(size):
                place = np.uint32(first + b * size + j)
                out[b, j, 0] = _drawn(x[b, j, 0], step[b, 0], only, whole, least, ulp, lowest, highest, place, key, other, bits)
        else:
            for j in range(size):
                start = first + (b * size + j) * inner
                for i in range(inner):
                    place = np.uint32(start + i)
                    out[b, j, i] = _drawn(x[b, j, i], step[b, i], only, whole, least, ulp, lowest, highest, place, key, other, bits)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _grid_scales(amax, most, whole, least, ulp, highest, floor, one, out):
    for i in range(amax.size):
        s = _near(amax[i] / most / whole, np.float32(1), True, False, least, ulp, np.float32(0), highest)
        s = (np.float32(1) if s == 0 else s) if one else (floor if s < floor else s)
        out[i] = s if abs(amax[i]) < np.float32(np.inf) else np.float32(np.nan)


@numba.njit(nogil=True, error_model="numpy", inline="always")
def _code(v, whole, mask, least, per_unit, shift, base, top_bit):
    """The code of a value on a format's grid; NaN becomes 0."""
    v = v if v == v else np.float32(0)
    if whole:
        return np.uint8(np.int32(v) & mask)
    bits = np.float32(v).view(np.uint32)
    code = np.int32(abs(v) * per_unit) if abs(v) < least else np.int32((bits & MAGNITUDE) >> shift) - base
    return np.uint8(code | (top_bit if bits & SIGN else 0))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _codes(q, whole, mask, least, per_unit, shift, base, top_bit, out):
    for i in range(q.size):
        out[i] = _code(q[i], whole, mask, least, per_unit, shift, base, top_bit)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _nibbles(q, whole, mask, least, per_unit, shift, base, top_bit, out):
    for i in range(q.size // 2):
        low = _code(q[2 * i], whole, mask, least, per_unit, shift, base, top_bit)
        out[i] = low | np.uint8(_code(q[2 * i + 1], whole, mask, least, per_unit, shift, base, top_bit) << 4)
    if q.size % 2:
        out[q.size // 2] = _code(q[q.size - 1], whole, mask, least, per_unit, shift, base, top_bit)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _values_of_nibbles(packed, table, out):
    for i in range(out.size // 2):
        byte = packed[i]
        out[2 * i] = table[byte & 15]
        out[2 * i + 1] = table[byte >> 4]
    if out.size % 2:
        out[out.size - 1] = table[packed[out.size // 2] & 15]


def block_amax(blocks: Tensor) -> Tensor:
    """[blocks, 1, inner] of blocks [blocks, block, inner], float32: the largest magnitude of each; NaN where one is."""
    out = torch.empty(blocks.shape[0], 1, blocks.shape[2])
    bits, tops = blocks.numpy().view(np.uint32), out.numpy().view(np.uint32)[:, 0]
    _in_threads(lambda part: _block_amax(bits[part], tops[part]), blocks)
    return out


def cast_blocks(blocks: Tensor, steps: Tensor, element: ElementFormat, rule: Rule, out: Tensor, elements_only: bool = False) -> None:
    """out <- steps q(blocks / steps): blocks [blocks, block, inner], steps [blocks, 1, inner], all float32 and contiguous.

    Args:
        element: an integer or floating point format.
        rule: "nearest" or "stochastic"; of its generator two words are drawn, the keys of all that follows.
        elements_only: out <- q, on the element's own grid.
    """
    x, made, step = blocks.numpy(), out.numpy(), steps[:, 0].numpy()
    grid = (elements_only, element.is_integer, *_grid_words(element), np.float32(element.lowest), np.float32(element.max))
    if rule.rounding == "nearest":
        _in_threads(lambda part: _nearest(x[part], step[part], *grid, made[part]), blocks)
        return
    key, other = torch.randint(0, 1 << 32, (2,), generator=rule.generator).numpy().astype(np.uint32)
    values = x.shape[1] * x.shape[2]
    _in_threads(
        lambda part: _stochastic(x[part], step[part], *grid, part.start * values, key, other, rule.random_bits or 0, made[part]), blocks
    )


def _grid_words(element: ElementFormat) -> tuple[np.float32, np.float32]:
    """The smallest normal number, and the spacing of the numbers from 1 on."""
    return np.float32(1.0 if element.is_integer else 2.0 ** (1 - element.bias)), np.float32(2.0**-element.mantissa_bits)


def grid_scales(amax: Tensor, most: float, whole: Tensor | None, grid: ElementFormat, floor: float, one: bool) -> Tensor:
    """Blocks' scales amax / most / whole, rounded to nearest on a floating point format's grid.

    Args:
        amax: contiguous float32; what is not finite gets NaN.
        whole: the tensor's scale; None and 0 count as 1.
        floor: the least scale; `one`: a scale that rounds to 0 is 1 instead.
    """
    out = torch.empty_like(amax)
    _grid_scales(
        amax.numpy().reshape(-1), np.float32(most), np.float32(1.0 if whole is None else float(whole) or 1.0), *_grid_words(grid),
        np.float32(grid.max), np.float32(floor), one, out.numpy().reshape(-1),
    )  # fmt: skip
    return out


def codes_of(q: Tensor, element: ElementFormat) -> Tensor:
    """The code (uint8) of each value of q, contiguous float32 on the format's grid; NaN becomes 0."""
    out = torch.empty(q.shape, dtype=torch.uint8)
    _codes(q.numpy().reshape(-1), *_code_words(element), out.numpy().reshape(-1))
    return out


def nibbles_of(q: Tensor, element: ElementFormat) -> Tensor:
    """The codes of a format of four bits, two a byte, the first value in the low half."""
    out = torch.empty(-(-q.numel() // 2), dtype=torch.uint8)
    _nibbles(q.numpy().reshape(-1), *_code_words(element), out.numpy())
    return out


def _code_words(element: ElementFormat) -> tuple[Any, ...]:
    m, least = element.mantissa_bits, 2.0 ** (1 - element.bias)
    base, top_bit = (127 - element.bias) << m, (1 << (element.bits - 1)) if element.signed else 0
    return (
        element.is_integer, (1 << element.bits) - 1, np.float32(least), np.float32(2.0**m / least), np.uint32(23 - m), base, top_bit,
    )  # fmt: skip


def values_of_nibbles(packed: Tensor, table: Tensor, count: int) -> Tensor:
    """The `count` values, float32, of codes of four bits, two a byte."""
    out = torch.empty(count)
    _values_of_nibbles(packed.numpy(), table.numpy(), out.numpy())
    return out


def _in_threads(work: Callable[[slice], None], blocks: Tensor) -> None:
    """Parts of the blocks worked on at once, as many as torch has threads and there is work for."""
    count = len(blocks)
    threads = max(1, min(torch.get_num_threads(), blocks.numel() // A_THREADS_WORK, count))
    if threads == 1:
        work(slice(0, count))
        return
    ends = [count * i // threads for i in range(threads + 1)]
    parts = [slice(*ends[i : i + 2]) for i in range(threads)]
    others = [_pool(threads - 1).submit(work, part) for part in parts[1:]]
    work(parts[0])
    for other in others:
        other.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Helpers that stay: starting one takes as long as casting thousands of values."""
    os.register_at_fork(after_in_child=_pool.cache_clear)
    return ThreadPoolExecutor(threads, thread_name_prefix="fewer-casts")
