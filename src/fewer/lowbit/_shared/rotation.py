"""The Hadamard rotation of consecutive groups, which spreads an outlier over its whole group before a cast."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from fewer.checks import is_whole
from fewer.lowbit._shared.formats import check_floating, compute_dtype

RADIX = 32  # the largest group whose matrix is quicker than its butterflies


def hadamard(x: Tensor, n: int, dim: int = -1, signs: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Consecutive groups of n along a dimension, each turned by the Hadamard matrix in Sylvester's order: x -> (x d) H / sqrt(n).

    Gradients flow through it.

    Args:
        x: any shape; float32, bfloat16, float16 (computed in float32) or float64.
        n: a power of two that divides the dimension.
        dim: the dimension.
        signs: d, [n] or as long as the dimension, of +1 and -1; by default none.
        inverse: undo it: H / sqrt(n), then d.

    Returns:
        A tensor of x's shape and dtype.

    Raises:
        ValueError: n is no power of two or does not divide the dimension, or the signs have another length.

    Examples:
        >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    check_floating(x)
    if x.ndim == 0 or not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim is {dim} and x has {x.ndim} dimensions; expected one of x's: name another")
    width = x.shape[dim]
    if not is_whole(n) or n < 1 or n & (n - 1) or width % n:
        raise ValueError(f"n is {n!r} and dimension {dim} has length {width}; expected a power of two that divides it: choose another n")
    if signs is not None and signs.shape not in ((n,), (width,)):
        raise ValueError(f"signs have shape {tuple(signs.shape)}; expected ({n},) or ({width},): one a value")
    if x.numel() == 0:
        return x.clone()
    if n <= RADIX and (signs is None or len(signs) == n):
        return _by_matrix(x, n, dim % x.ndim, signs, inverse)
    turned = x.movedim(dim, -1).to(compute_dtype(x))
    shape = turned.shape
    d = None if signs is None else signs.to(turned).repeat(width // len(signs) if len(signs) else 1)
    if d is not None and not inverse:
        turned = turned * d
    turned = _turn(turned.reshape(turned.numel() // n, n)).reshape(shape)
    if d is not None and inverse:
        turned = turned * d
    return turned.movedim(-1, dim).to(x.dtype)


def _by_matrix(x: Tensor, n: int, dim: int, signs: Tensor | None, inverse: bool) -> Tensor:
    """Every group times diag(d) H / sqrt(n), or its inverse: one product, where nothing is moved."""
    turn = _matrix(n).to(x.device, compute_dtype(x))
    if signs is not None:
        turn = turn * signs.to(turn) if inverse else signs.to(turn)[:, None] * turn
    inner = math.prod(x.shape[dim + 1 :])
    if inner == 1:
        return (x.reshape(-1, n).to(turn.dtype) @ turn).reshape(x.shape).to(x.dtype)
    return (turn.T @ x.reshape(-1, n, inner).to(turn.dtype)).reshape(x.shape).to(x.dtype)


def _turn(rows: Tensor) -> Tensor:
    """Rows [R, n] times H / sqrt(n), five butterflies at a time: H_n = H_(n/32) x H_32, and a small matrix is quicker than its stages."""
    count, n = rows.shape
    if n <= RADIX:
        return rows @ _matrix(n).to(rows)
    inner = (rows.reshape(count * (n // RADIX), RADIX) @ _matrix(RADIX).to(rows)).view(count, n // RADIX, RADIX)
    outer = _turn(inner.transpose(1, 2).reshape(count * RADIX, n // RADIX))
    return outer.view(count, RADIX, n // RADIX).transpose(1, 2).reshape(count, n)


@functools.cache
def _matrix(n: int) -> Tensor:
    """H_n / sqrt(n), float64: H_2n = [[H, H], [H, -H]]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(n)
