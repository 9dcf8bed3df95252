"""The full fast Walsh-Hadamard transform: the baseline, and what turns a group's samples into bins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 1 << 12  # float64 entries that stay in the first-level cache (32 KiB) while all short strides are done
POWERS_OF_FOUR = 0x5555_5555_5555_5555  # their bits: powers of two with an even number of stages


def fwht(x: np.ndarray, axis: int = -1, normalize: bool = True, inplace: bool = False) -> np.ndarray:
    """The Walsh-Hadamard transform X[k] = (1/N) sum_m x[m] (-1)^<k,m> of arrays of length N = 2^n, in N log2 N additions.

    The index of an entry is its bit vector read as a binary number, first bit first. `normalize=False` leaves out 1/N, which makes it
    the inverse: `fwht(fwht(x), normalize=False)` is x.

    Args:
        x: real array; float32 and float64 keep their type, other types become float64.
        axis: the axis to transform; its length is a power of two.
        normalize: divide by N.
        inplace: overwrite x, which must be a writeable float array, C-contiguous.

    Returns:
        The transform, of x's shape; x itself with `inplace`.

    Raises:
        ValueError: a length that is no power of two, a complex or an empty array, or an array that cannot be transformed in place.

    Examples:
        >>> fwht(np.array([1.0, 0.0, 1.0, 0.0]))
        array([0.5, 0.5, 0. , 0. ])
        >>> fwht(fwht(np.arange(8.0)), normalize=False)
        array([0., 1., 2., 3., 4., 5., 6., 7.])
    """
    x = np.asarray(x)
    if x.dtype.kind not in "fiub" or x.ndim == 0:
        raise ValueError(f"x is {x.dtype} of shape {x.shape}; expected real numbers in an array: transform real and imaginary part apart")
    length = x.shape[axis]
    check_power_of_two(f"axis {axis} of x", length)
    if inplace:
        if x.dtype not in (np.float32, np.float64) or not x.flags.c_contiguous or not x.flags.writeable:
            raise ValueError(f"x is {x.dtype}, not a writeable C-contiguous float32 or float64 array; expected one: leave out inplace=True")
        out = x
    else:
        out = np.array(x, dtype=x.dtype if x.dtype in (np.float32, np.float64) else np.float64, order="C")
    axis %= x.ndim
    outer, inner = int(np.prod(x.shape[:axis])), int(np.prod(x.shape[axis + 1 :]))
    if out.size:
        _transform(out.reshape(outer, length, inner))
        if normalize:
            out *= out.dtype.type(1 / length)
    return out


def check_power_of_two(name: str, length: int) -> None:
    """ValueError unless the length is 1, 2, 4, ..."""
    if length < 1 or length & (length - 1):
        raise ValueError(
            f"{name} has length {length}; expected a power of two, such as {1 << max(length - 1, 0).bit_length()}: pad or cut it"
        )


def _transform(rows: np.ndarray) -> None:
    """Transform [outer, N, inner] along its middle axis, in place, without the factor."""
    if rows.shape[2] == 1:
        _lines(rows[:, :, 0])
    else:
        _stacks(rows)


@numba.njit(cache=True)
def _short(x: np.ndarray, start: int, size: int) -> None:  # pragma: no cover - compiled
    """All strides below `size` of x[start : start + size]: two at a time (radix 4), so that each entry is read half as often."""
    stride = 1
    if not size & POWERS_OF_FOUR:  # an odd number of stages: one alone first
        for i in range(start, start + size, 2):
            a, b = x[i], x[i + 1]
            x[i], x[i + 1] = a + b, a - b
        stride = 2
    while stride < size:
        _pair_of_stages(x, start, size, stride)
        stride *= 4


@numba.njit(cache=True)
def _pair_of_stages(x: np.ndarray, start: int, size: int, stride: int) -> None:  # pragma: no cover - compiled
    """The stages of strides h and 2h together."""
    for block in range(start, start + size, 4 * stride):
        x0 = x[block : block + stride]
        x1 = x[block + stride : block + 2 * stride]
        x2 = x[block + 2 * stride : block + 3 * stride]
        x3 = x[block + 3 * stride : block + 4 * stride]
        for i in range(stride):
            a, b, c, d = x0[i] + x1[i], x0[i] - x1[i], x2[i] + x3[i], x2[i] - x3[i]
            x0[i], x1[i], x2[i], x3[i] = a + c, b + d, a - c, b - d


@numba.njit(cache=True)
def _lines(rows: np.ndarray) -> None:  # pragma: no cover - compiled
    """Transform each line: short strides block by block in the cache, then the long ones across the blocks."""
    for line in range(rows.shape[0]):
        x = rows[line]
        length = x.size
        block = min(length, BLOCK)
        for start in range(0, length, block):
            _short(x, start, block)
        stride = block
        if not (length // block) & POWERS_OF_FOUR:
            for start in range(0, length, 2 * stride):
                low, high = x[start : start + stride], x[start + stride : start + 2 * stride]
                for i in range(stride):
                    a, b = low[i], high[i]
                    low[i], high[i] = a + b, a - b
            stride *= 2
        while stride < length:
            _pair_of_stages(x, 0, length, stride)
            stride *= 4


@numba.njit(cache=True)
def _stacks(rows: np.ndarray) -> None:  # pragma: no cover - compiled
    """Transform the middle axis of [outer, N, inner]; the inner axis goes along, contiguous."""
    outer, length, inner = rows.shape
    for each in range(outer):
        stride = 1
        while stride < length:
            for block in range(0, length, 2 * stride):
                for i in range(block, block + stride):
                    low, high = rows[each, i], rows[each, i + stride]
                    for p in range(inner):
                        a, b = low[p], high[p]
                        low[p], high[p] = a + b, a - b
            stride *= 2


def bins_of(samples: np.ndarray, device: str | None = None) -> np.ndarray:
    """U[c, j, p] = (1/B) sum_l u[c, l, p] (-1)^<j,l>: every group and offset at once, on a torch device where one is named.

    >>> bins_of(np.ones((1, 4, 2)))[0, :, 0]
    array([1., 0., 0., 0.])
    """
    if device is None:
        return fwht(samples, axis=1)
    import torch

    return _transform_tensor(torch.as_tensor(samples, device=device)).div_(samples.shape[1]).cpu().numpy()


def _transform_tensor(rows: Tensor) -> Any:
    """The transform of a tensor [C, B, P] along its middle axis, without the factor."""
    import torch

    groups, length, offsets = rows.shape
    stride = 1
    while stride < length:
        pairs = rows.view(groups, length // (2 * stride), 2, stride, offsets)
        rows = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).view(groups, length, offsets)
        stride *= 2
    return rows
