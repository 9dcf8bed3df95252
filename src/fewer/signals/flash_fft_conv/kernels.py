"""The fused convolution on a GPU: one Triton program a pair of rows and channel, the whole tile in registers and shared memory.

A tile is [N_1, N_2], n = n_1 N_2 + n_2: two matrix products there (order 2), two back. Sizes up to 4096 are one kernel; above, one outer
stage is a batched matrix product around it. Rows of zeros (causal padding) are neither loaded nor multiplied. Sums are float32; 1/N
stands in the forward twiddles, so that float16 does not overflow. Tested in Triton's interpreter.
"""

# pyright: reportArgumentType=false
from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewer.signals.flash_fft_conv.blocks import Job, Wanted
from fewer.signals.flash_fft_conv.monarch import dft_matrix, monarch_dft, twiddles
from fewer.signals.flash_fft_conv.plan import TRITON_FUSED

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LEAST = 16  # rows or columns that tl.dot takes


@triton.jit
def _product(ar, ai, br, bi, OPERAND: tl.constexpr, UNIT: tl.constexpr):  # pragma: no cover - compiled
    """A complex matrix product, operands rounded, sums in float32."""
    ar, ai, br, bi = ar.to(OPERAND).to(UNIT), ai.to(OPERAND).to(UNIT), br.to(OPERAND).to(UNIT), bi.to(OPERAND).to(UNIT)
    real = tl.dot(ar, br, input_precision="ieee") - tl.dot(ai, bi, input_precision="ieee")
    return real, tl.dot(ar, bi, input_precision="ieee") + tl.dot(ai, br, input_precision="ieee")


@triton.jit
def _matrix(planes, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # pragma: no cover - compiled
    """The first rows and columns of a complex matrix [2, size, COLUMNS of it]."""
    at = tl.arange(0, ROWS)[:, None] * size + tl.arange(0, COLUMNS)[None, :]
    return tl.load(planes + at).to(tl.float32), tl.load(planes + size * size + at).to(tl.float32)


@triton.jit
def _there(
    xr, xi, f1, f2, turn, N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr, UNIT: tl.constexpr
):  # pragma: no cover
    """The DFT / N of a tile [ROWS, N2] whose other rows are zero: [k_1, k_2]."""
    fr, fi = _matrix(f1, N1, N1, ROWS)
    xr, xi = _product(fr, fi, xr, xi, OPERAND, UNIT)
    at = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tr, ti = tl.load(turn + at), tl.load(turn + N1 * N2 + at)
    xr, xi = xr * tr - xi * ti, xr * ti + xi * tr
    fr, fi = _matrix(f2, N2, N2, N2)
    return _product(xr, xi, fr, fi, OPERAND, UNIT)


@triton.jit
def _back(
    yr, yi, f1, f2, turn, N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr, UNIT: tl.constexpr
):  # pragma: no cover
    """N times the inverse DFT, the first ROWS rows: [ROWS, N2]."""
    fr, fi = _matrix(f2, N2, N2, N2)
    yr, yi = _product(yr, yi, fr, -fi, OPERAND, UNIT)
    at = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    tr, ti = tl.load(turn + at) * (N1 * N2), tl.load(turn + N1 * N2 + at) * (N1 * N2)
    yr, yi = yr * tr + yi * ti, yi * tr - yr * ti
    fr, fi = _matrix(f1, N1, ROWS, N1)
    return _product(fr, -fi, yr, yi, OPERAND, UNIT)


@triton.jit
def _pair(x, gate, first, second, at, here, both, GATED: tl.constexpr):  # pragma: no cover - compiled
    """Two rows as one complex tile, gated."""
    xr, xi = tl.load(x + first + at, mask=here, other=0.0).to(tl.float32), tl.load(x + second + at, mask=both, other=0.0).to(tl.float32)
    if GATED:
        xr *= tl.load(gate + first + at, mask=here, other=0.0).to(tl.float32)
        xi *= tl.load(gate + second + at, mask=both, other=0.0).to(tl.float32)
    return xr, xi


@triton.jit
def _convolve(
    u, pre, post, k, f1, f2, turn, out, batch, channels, length,
    N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr, UNIT: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
):  # fmt: skip  # pragma: no cover - compiled
    h, b = tl.program_id(0), 2 * tl.program_id(1)
    at = tl.arange(0, ROWS)[:, None] * N2 + tl.arange(0, N2)[None, :]
    here = at < length
    both = at < tl.where(b + 1 < batch, length, 0)  # an odd batch: the last row goes alone
    first, second = (b * channels + h) * length, ((b + 1) * channels + h) * length
    xr, xi = _pair(u, pre, first, second, at, here, both, PRE)
    xr, xi = _there(xr, xi, f1, f2, turn, N1, N2, ROWS, OPERAND, UNIT)
    place = h * N1 * N2 + tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    kr, ki = tl.load(k + place), tl.load(k + channels * N1 * N2 + place)
    yr, yi = _back(xr * kr - xi * ki, xr * ki + xi * kr, f1, f2, turn, N1, N2, ROWS, OPERAND, UNIT)
    if POST:
        yr *= tl.load(post + first + at, mask=here, other=0.0).to(tl.float32)
        yi *= tl.load(post + second + at, mask=both, other=0.0).to(tl.float32)
    tl.store(out + first + at, yr, mask=here)
    tl.store(out + second + at, yi, mask=both)


@triton.jit
def _gradients(
    dout, u, pre, post, k, f1, f2, turn, du, dk, dpre, dpost, batch, channels, length,
    N1: tl.constexpr, N2: tl.constexpr, ROWS: tl.constexpr, OPERAND: tl.constexpr, UNIT: tl.constexpr, PRE: tl.constexpr, POST: tl.constexpr,
):  # fmt: skip  # pragma: no cover - compiled
    """One program a channel: it goes through the batch, and sums the filter's spectrum in float32."""
    h = tl.program_id(0)
    at = tl.arange(0, ROWS)[:, None] * N2 + tl.arange(0, N2)[None, :]
    here = at < length
    place = h * N1 * N2 + tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    kr, ki = tl.load(k + place), tl.load(k + channels * N1 * N2 + place)
    sr, si = tl.zeros((N1, N2), dtype=tl.float32), tl.zeros((N1, N2), dtype=tl.float32)
    for b in range(0, batch, 2):
        both = at < tl.where(b + 1 < batch, length, 0)  # an odd batch: the last row goes alone
        first, second = (b * channels + h) * length, ((b + 1) * channels + h) * length
        xr, xi = _pair(u, pre, first, second, at, here, both, PRE)
        xr, xi = _there(xr, xi, f1, f2, turn, N1, N2, ROWS, OPERAND, UNIT)
        if POST:
            yr, yi = _back(xr * kr - xi * ki, xr * ki + xi * kr, f1, f2, turn, N1, N2, ROWS, OPERAND, UNIT)
            dr, di = _pair(dout, dout, first, second, at, here, both, False)
            tl.store(dpost + first + at, yr * dr, mask=here)
            tl.store(dpost + second + at, yi * di, mask=both)
        gr, gi = _pair(dout, post, first, second, at, here, both, POST)
        gr, gi = _there(gr, gi, f1, f2, turn, N1, N2, ROWS, OPERAND, UNIT)
        sr += gr * xr + gi * xi
        si += gi * xr - gr * xi
        yr, yi = _back(gr * kr + gi * ki, gi * kr - gr * ki, f1, f2, turn, N1, N2, ROWS, OPERAND, UNIT)
        if PRE:
            ur, ui = _pair(u, u, first, second, at, here, both, False)
            tl.store(dpre + first + at, yr * ur, mask=here)
            tl.store(dpre + second + at, yi * ui, mask=both)
            yr *= tl.load(pre + first + at, mask=here, other=0.0).to(tl.float32)
            yi *= tl.load(pre + second + at, mask=both, other=0.0).to(tl.float32)
        tl.store(du + first + at, yr, mask=here)
        tl.store(du + second + at, yi, mask=both)
    sr, si = _back(sr * (N1 * N2), si * (N1 * N2), f1, f2, turn, N1, N2, N1, OPERAND, UNIT)
    tl.store(dk + place, sr)
    tl.store(dk + channels * N1 * N2 + place, si)


@functools.lru_cache(32)
def _tables(n: int, dtype: torch.dtype, device: str) -> tuple[int, int, Tensor, Tensor, Tensor]:
    """N_1, N_2, both DFT matrices and the twiddles / N, as planes of real and imaginary parts."""
    first = 2 ** -(-(n.bit_length() - 1) // 2)
    second = n // first

    def planes(matrix: Tensor, kind: torch.dtype) -> Tensor:
        return torch.stack([matrix.real, matrix.imag]).to(device, kind).contiguous()

    return (
        first,
        second,
        planes(dft_matrix(first), dtype),
        planes(dft_matrix(second), dtype),
        planes(twiddles(first, second) / n, torch.float32),
    )


OPERANDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _tile(u: Tensor, spectrum: Tensor, gates: tuple[Tensor | None, Tensor | None], n: int, dout: Tensor | None = None) -> Any:
    """The kernel on u [B, C, L], L <= n, circular: the result, or with `dout` (du, dk as planes [2, C, n], dpre, dpost)."""
    batch, channels, length = u.shape
    n1, n2, f1, f2, turn = _tables(n, u.dtype, str(u.device))
    pre, post = (u if gate is None else gate.to(u.dtype).contiguous() for gate in gates)
    words = {"N1": n1, "N2": n2, "OPERAND": OPERANDS[u.dtype], "PRE": gates[0] is not None, "POST": gates[1] is not None}
    words["UNIT"] = tl.float32 if INTERPRETED and u.dtype == torch.bfloat16 else OPERANDS[u.dtype]  # its dot cannot take bfloat16
    words["ROWS"] = min(n1, max(LEAST, triton.next_power_of_2(-(-length // n2))))
    k = torch.stack([spectrum.real, spectrum.imag]).contiguous()
    if dout is None:
        out = torch.empty_like(u)
        _convolve[channels, (batch + 1) // 2](u, pre, post, k, f1, f2, turn, out, batch, channels, length, **words)
        return out
    du, dpre, dpost = (torch.empty_like(u) for _ in range(3))
    dk = u.new_empty(2, channels, n, dtype=torch.float32)
    _gradients[(channels,)](dout, u, pre, post, k, f1, f2, turn, du, dk, dpre, dpost, batch, channels, length, **words)
    return du, dk, dpre, dpost


def convolve(u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, skip: Tensor | None, job: Job) -> Tensor:
    """`blocks.convolve`, fused."""
    n, x = job.plan.n, u.contiguous()
    inner = min(n, TRITON_FUSED)
    if n == inner:
        y = _tile(x, _spectrum(k, n, 1), (pregate, postgate), n)
    else:
        x = x if pregate is None else x * pregate
        y = _outer_back(_tile(_outer(x, n, inner), _spectrum(k, n, n // inner), (None, None), inner), u, n, n // inner)
        y = y if postgate is None else y * postgate
    return y if skip is None else torch.addcmul(y, skip[:, None].to(u.dtype), u)


def gradients(
    dout: Tensor, u: Tensor, k: Tensor, pregate: Tensor | None, postgate: Tensor | None, skip: Tensor | None, job: Job, wanted: Wanted
) -> dict[str, Tensor]:
    """`blocks.gradients`, fused."""
    n, x, g = job.plan.n, u.contiguous(), dout.contiguous()
    inner, outer = min(n, TRITON_FUSED), max(1, n // TRITON_FUSED)
    if outer == 1:
        du, dk, dpre, dpost = _tile(x, _spectrum(k, n, 1), (pregate, postgate), n, g)
        taps = dk[0]
    else:
        spectrum = _spectrum(k, n, outer)
        gated = x if pregate is None else x * pregate
        rows = _outer(gated, n, inner)
        dz, planes, _, _ = _tile(rows, spectrum, (None, None), inner, _outer(g if postgate is None else g * postgate, n, inner))
        dx = _outer_back(dz, u, n, outer)
        du, dpre = dx if pregate is None else dx * pregate, dx * u
        dpost = dout * _outer_back(_tile(rows, spectrum, (None, None), inner), u, n, outer) if postgate is not None else dx
        summed = torch.complex(planes[0], planes[1]).view(-1, outer, inner)
        # each of the two transforms carried 1/outer, and the inverse one carries 1/outer itself
        taps = _stage_back(summed, n, outer).real.flatten(-2) * outer
    if skip is not None:
        du = torch.addcmul(du, skip[:, None].to(u.dtype), dout)
    found = {"u": du, "k": taps[:, : k.shape[-1]].to(k.dtype), "pregate": dpre, "postgate": dpost}
    like = {"u": u, "k": k, "pregate": pregate, "postgate": postgate}
    answers = {name: each.to(like[name].dtype) for name, each in found.items() if like[name] is not None and getattr(wanted, name)}  # pyright: ignore[reportOptionalMemberAccess]
    if skip is not None and wanted.skip:
        answers["skip"] = (dout.float() * u).sum((0, 2)).to(skip.dtype)
    return answers


def _spectrum(k: Tensor, n: int, outer: int) -> Tensor:
    """The filter's spectrum in float32, [C, N_1, N_2], or a row of channels for each k_1 of an outer stage."""
    inner = n // outer
    n1, n2, *_ = _tables(inner, torch.float32, str(k.device))
    spectrum = monarch_dft(k.float(), (n1, n2) if outer == 1 else (outer, n1, n2))
    return spectrum.flatten(0, -3)


def _outer(x: Tensor, n: int, inner: int) -> Tensor:
    """The outermost stage of pairs of rows [B, H, L]: [2 ceil(B/2), H N_1, inner], real and imaginary parts in turn; 1/N_1 stands in it."""
    outer, kind = n // inner, x.dtype
    x = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % inner, 0, 0, 0, x.shape[0] % 2)).unflatten(-1, (-1, inner))
    z = torch.complex(x[0::2], x[1::2])
    matrix = dft_matrix(outer, z.dtype, str(x.device))[:, : z.shape[-2]]
    z = (matrix @ z) * (twiddles(outer, inner, z.dtype, str(x.device)) / outer)
    return torch.stack([z.real, z.imag], 1).flatten(0, 1).flatten(1, 2).to(kind)


def _stage_back(z: Tensor, n: int, outer: int) -> Tensor:
    """N_1 times the inverse of the outermost stage, [..., N_1, inner]."""
    return dft_matrix(outer, z.dtype, str(z.device)).conj() @ (z * twiddles(outer, n // outer, z.dtype, str(z.device)).conj())


def _outer_back(rows: Tensor, u: Tensor, n: int, outer: int) -> Tensor:
    """Rows as `_outer` makes them, back to [B, H, L] in u's type."""
    z = rows.float().unflatten(1, (-1, outer))
    z = _stage_back(torch.complex(z[0::2], z[1::2]), n, outer).flatten(-2)
    return torch.stack([z.real, z.imag], 1).flatten(0, 1)[: u.shape[0], :, : u.shape[-1]].to(u.dtype)
