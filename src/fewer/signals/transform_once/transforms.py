"""Orthonormal bases of fields: the cosine transform (DCT-II) and the real Fourier basis, whole or of the lowest modes alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.checks import check_choice

Basis = Literal["dct", "fourier"]
Norm = Literal["ortho", "backward"]
BASES, NORMS = ("dct", "fourier"), ("ortho", "backward")
MATRIX_MOST = 256  # entries of an axis up to which the product with the matrix is quicker than the FFT


@functools.lru_cache(256)
@torch.inference_mode(False)  # what is kept must serve a backward pass as well, whoever asks first
def basis_matrix(
    basis: Basis, modes: int, points: int, base: int, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Float[Tensor, "modes points"]:
    """The basis functions of `base` points, evaluated at `points`: orthonormal rows where the two are equal.

    "dct": C[k, j] = sqrt(2/n) cos(pi k (2j+1) / 2p), row 0 divided by sqrt 2. "fourier": 1, cos, sin, cos, sin, ... of 2 pi k j / p. Angles
    are reduced in whole numbers, so that they are right for any length.
    """
    j = torch.arange(points)
    if basis == "dct":
        turns = torch.arange(modes)[:, None] * (2 * j + 1) % (4 * points)
        rows = torch.cos(turns.double() * (math.pi / (2 * points)))
        constant = torch.arange(modes) == 0
    else:
        row = torch.arange(modes)
        frequency = (row + 1) // 2
        angle = (frequency[:, None] * j % points).double() * (2 * math.pi / points)
        rows = torch.where((row % 2 == 1)[:, None] | (row == 0)[:, None], torch.cos(angle), torch.sin(angle))
        constant = (row == 0) | (2 * frequency == base)  # the fastest cosine of an even length is +-1 everywhere
    scale = torch.full((modes,), math.sqrt(2 / base), dtype=torch.float64)
    scale[constant] = math.sqrt(1 / base)
    return (rows * scale[:, None]).to(device, dtype)


def dct(x: Float[Tensor, "..."], dims: Sequence[int] | int, norm: Norm = "ortho") -> Float[Tensor, "..."]:
    """The DCT-II along some axes, as `scipy.fft.dctn`.

    Args:
        x: real; gradients pass.
        dims: the axes, of any length: products with the matrix up to 256 entries, FFTs above.
        norm: "ortho", or "backward" (no factor).

    Examples:
        >>> dct(torch.ones(4), 0)
        tensor([2., 0., 0., 0.])
    """
    for dim in _checked(x, dims, norm):
        x = _along(x, dim, norm, _forward_matrix, _forward_fft)
    return x


def idct(x: Float[Tensor, "..."], dims: Sequence[int] | int, norm: Norm = "ortho") -> Float[Tensor, "..."]:
    """The inverse of `dct` (a DCT-III), as `scipy.fft.idctn`."""
    for dim in _checked(x, dims, norm):
        x = _along(x, dim, norm, _inverse_matrix, _inverse_fft)
    return x


def _checked(x: Tensor, dims: Sequence[int] | int, norm: str) -> Sequence[int]:
    check_choice(NORMS, norm=norm)
    if not x.dtype.is_floating_point:
        raise ValueError(f"x is {x.dtype}; expected real floating-point numbers: transform real and imaginary parts apart")
    return [dims] if isinstance(dims, int) else dims


def _along(x: Tensor, dim: int, norm: str, by_matrix, by_fft) -> Tensor:
    x = x.movedim(dim, -1)
    if x.shape[-1] <= MATRIX_MOST:
        return by_matrix(x, norm).movedim(-1, dim)
    return by_fft(at_least_single(x), norm).to(x.dtype).movedim(-1, dim)


def at_least_single(x: Tensor) -> Tensor:
    """x in float32 where it is of half precision, which has no FFT."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _backward_scale(n: int, like: Tensor) -> Tensor:
    """What turns orthonormal coefficients into those without a factor."""
    scale = like.new_full((n,), math.sqrt(2 * n))
    scale[0] = math.sqrt(4 * n)
    return scale


def _forward_matrix(x: Tensor, norm: str) -> Tensor:
    n = x.shape[-1]
    y = x @ basis_matrix("dct", n, n, n, x.dtype, str(x.device)).T
    return y if norm == "ortho" else y * _backward_scale(n, y)


def _inverse_matrix(x: Tensor, norm: str) -> Tensor:
    n = x.shape[-1]
    x = x if norm == "ortho" else x / _backward_scale(n, x)
    return x @ basis_matrix("dct", n, n, n, x.dtype, str(x.device))


def _turn(n: int, like: Tensor) -> Tensor:
    """exp(-i pi k / 2n)."""
    angle = torch.arange(n, dtype=torch.float64) * (-math.pi / (2 * n))
    return torch.polar(torch.ones_like(angle), angle).to(like.device, like.dtype.to_complex())


def _forward_fft(x: Tensor, norm: str) -> Tensor:
    """Makhoul's way: even entries, then the odd ones backwards, one FFT, one turn."""
    n = x.shape[-1]
    v = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], -1)
    y = 2 * (torch.fft.fft(v) * _turn(n, x)).real
    return y if norm == "backward" else y / _backward_scale(n, y)


def _inverse_fft(x: Tensor, norm: str) -> Tensor:
    n = x.shape[-1]
    x = x if norm == "backward" else x * _backward_scale(n, x)
    mirrored = torch.cat([torch.zeros_like(x[..., :1]), x[..., 1:].flip(-1)], -1)
    v = torch.fft.ifft(torch.complex(x, -mirrored) * _turn(n, x).conj() / 2).real
    y = torch.empty_like(v)
    half = (n + 1) // 2
    y[..., ::2], y[..., 1::2] = v[..., :half], v[..., half:].flip(-1)
    return y


def truncated_dct(x: Float[Tensor, "... n"], m: Sequence[int] | int, basis: Basis = "dct") -> Float[Tensor, "... m"]:
    """The lowest m_1 x ... x m_d orthonormal coefficients along the last d axes, by small matrix products.

    Args:
        x: [..., n_1, ..., n_d].
        m: as many as are kept of each axis.
        basis: "dct", or "fourier" (1, cos, sin, cos, sin, ...).

    Raises:
        ValueError: m_i > n_i or below 1, no such basis, or numbers that are not real.

    Examples:
        >>> truncated_dct(torch.ones(2, 4), 2)
        tensor([[2., 0.],
                [2., 0.]])
    """
    check_choice(BASES, basis=basis)
    sizes = (m,) if isinstance(m, int) else tuple(m)
    check_modes(sizes, tuple(x.shape[x.ndim - len(sizes) :]))
    if not x.dtype.is_floating_point:
        raise ValueError(f"x is {x.dtype}; expected real floating-point numbers: transform real and imaginary parts apart")
    points = x.shape[x.ndim - len(sizes) :]
    return apply_matrices(x, [basis_matrix(basis, m_i, n, n, x.dtype, str(x.device)) for m_i, n in zip(sizes, points, strict=True)])


def check_modes(modes: Sequence[int], resolution: Sequence[int]) -> None:
    """ValueError unless 1 <= m_i <= n_i on every axis."""
    if len(modes) != len(resolution):
        raise ValueError(
            f"there are {len(modes)} n_modes {tuple(modes)} and {len(resolution)} axes {tuple(resolution)}; expected one an axis"
        )
    for m, n in zip(modes, resolution, strict=True):
        if not 1 <= m <= n:
            raise ValueError(
                f"n_modes is {tuple(modes)} and the resolution {tuple(resolution)}; expected 1 to n on every axis: take fewer modes"
            )


def apply_matrices(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """sum over the last axes with matrices [new, old], the widest reduction first so that later products are small."""
    first = x.ndim - len(matrices)
    order = sorted(range(len(matrices)), key=lambda i: matrices[i].shape[0] / matrices[i].shape[1])
    for i in order:
        x = (x.movedim(first + i, -1) @ matrices[i].T).movedim(-1, first + i)
    return x
