"""The Monarch form of the DFT: matrix products and twiddles, in an order of frequencies that never needs a permutation.

With N = N_1 ... N_p, time is n = n_1 (N_2 ... N_p) + ... + n_p (n_1 slowest) and frequency k = k_1 + N_1 k_2 + N_1 N_2 k_3 + ... (k_1
fastest). A spectrum is an array [k_1, ..., k_p] in exactly that order. Every product of the reference is counted as `multiplications`
(complex ones).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from fewer.checks import check_whole
from fewer.meters import count

Factors = tuple[int, ...]


def roots(exponents: Int[Tensor, "..."], n: int) -> Complex[Tensor, "..."]:
    """exp(-2 pi i m / n) for whole m, complex128: reduced in integers to an eighth of a turn, so that each is right to the last bit or two."""
    m = exponents % n
    quarter = (8 * m + n) // (2 * n)  # the nearest quarter turn
    angle = (4 * m - quarter * n).double() * (math.pi / 2 / n)
    cos, sin = torch.cos(angle), torch.sin(angle)
    odd, behind = quarter % 2 == 1, (quarter % 4 >= 2).double() * -2 + 1
    real, imaginary = torch.where(odd, -sin, cos) * behind, torch.where(odd, -cos, -sin) * behind
    return torch.complex(real, imaginary)


@functools.lru_cache(128)
def dft_matrix(n: int, dtype: torch.dtype = torch.complex128, device: str = "cpu") -> Complex[Tensor, "n n"]:
    """F[k, j] = exp(-2 pi i k j / n)."""
    index = torch.arange(n)
    return roots(index[:, None] * index, n).to(device, dtype)


@functools.lru_cache(128)
def twiddles(rows: int, rest: int, dtype: torch.dtype = torch.complex128, device: str = "cpu") -> Complex[Tensor, "rows rest"]:
    """exp(-2 pi i k r / (rows rest)), between a stage of `rows` and the transforms of length `rest` that follow it."""
    return roots(torch.arange(rows)[:, None] * torch.arange(rest), rows * rest).to(device, dtype)


def check_factors(factors: Sequence[int], keep: Sequence[int] | None = None) -> tuple[Factors, Factors]:
    """The factors, and how many k_i each stage keeps (all where `keep` does not say)."""
    for i, factor in enumerate(factors):
        check_whole(optional=(), **{f"factors[{i}]": factor})
    if not factors:
        raise ValueError("factors is empty; expected at least one: (N,) is the plain DFT matrix")
    kept = tuple(keep or ())
    if len(kept) > len(factors):
        raise ValueError(
            f"keep has {len(kept)} entries and there are {len(factors)} factors {tuple(factors)}; expected at most one a factor"
        )
    for i, (most, size) in enumerate(zip(kept, factors, strict=False)):
        check_whole(optional=(), **{f"keep[{i}]": most})
        if most > size:
            raise ValueError(f"keep[{i}] is {most} and the factor is {size}; expected at most that: {tuple(factors)} keeps all")
    return tuple(factors), (*kept, *factors[len(kept) :])


def monarch_dft(
    x: Float[Tensor, "... L"] | Complex[Tensor, "... L"], factors: Sequence[int], keep: Sequence[int] | None = None
) -> Complex[Tensor, "... k1 k2"]:
    """The DFT of length N = N_1 ... N_p as p matrix products, its entry [k_1, ..., k_p] at frequency k_1 + N_1 k_2 + N_1 N_2 k_3 + ...

    Args:
        x: [..., L], L <= N, real or complex; what lies behind its end is zero, and rows of N_1 that are zero are not multiplied.
        factors: N_1, ..., N_p.
        keep: compute the entries k_i < keep_i alone; what they do not need is skipped in every stage.

    Returns:
        [..., keep_1, ..., keep_p] (or N_i where `keep` does not say), complex64, or complex128 for float64.

    Raises:
        ValueError: factors below 1, a longer x, or a `keep` that does not fit.

    Source: arXiv 2311.05908, the Monarch decomposition of order p.

    Examples:
        >>> x = torch.arange(6.0, dtype=torch.float64)
        >>> spectrum = monarch_dft(x, (2, 3))
        >>> torch.allclose(spectrum.T.flatten(), torch.fft.fft(x))  # k = k_1 + 2 k_2
        True
    """
    factors, kept = check_factors(factors, keep)
    length, total = x.shape[-1], math.prod(factors)
    if length > total:
        raise ValueError(
            f"x has length {length} and the factors {factors} make {total}; expected at most that: cut x, or take larger factors"
        )
    x = x.to(torch.promote_types(torch.promote_types(x.dtype, torch.float32), torch.complex64))
    rest = total // factors[0]
    x = torch.nn.functional.pad(x, (0, -length % rest))
    for rows, most in zip(factors, kept, strict=True):
        rest, total = total // rows, total // rows
        x = x.unflatten(-1, (x.shape[-1] // rest, rest))
        matrix = dft_matrix(rows, x.dtype, str(x.device))[:most, : x.shape[-2]]
        count("multiplications", x.shape[-2] * most * x[..., 0, :].numel())
        x = matrix @ x
        if rest > 1:
            x = x * twiddles(rows, rest, x.dtype, str(x.device))[:most]
    return x.squeeze(-1)


def monarch_idft(spectrum: Complex[Tensor, "... k1 k2"], factors: Sequence[int], length: int | None = None) -> Complex[Tensor, "... L"]:
    """The inverse of `monarch_dft`, 1/N included: the same stages backwards with conjugates.

    Args:
        spectrum: [..., k_1, ..., k_p]; entries k_i >= its size are zero, and nothing is multiplied for them.
        factors: N_1, ..., N_p.
        length: how many entries are wanted, N by default; rows of N_1 beyond them are not computed.

    Examples:
        >>> x = torch.arange(6.0, dtype=torch.float64)
        >>> torch.allclose(monarch_idft(monarch_dft(x, (2, 3)), (2, 3)).real, x)
        True
    """
    factors, kept = check_factors(factors, spectrum.shape[spectrum.ndim - len(factors) :])
    length = math.prod(factors) if length is None else length
    x, rest = spectrum.unsqueeze(-1), 1
    for i in reversed(range(len(factors))):
        rows, most = factors[i], kept[i]
        device = str(x.device)
        if rest > 1:
            x = x * twiddles(rows, rest, x.dtype, device)[:most].conj()
        wanted = rows if i else -(-length // rest)
        count("multiplications", wanted * most * x[..., 0, :].numel())
        x = (dft_matrix(rows, x.dtype, device)[:wanted, :most].conj() @ x).flatten(-2)
        rest *= rows
    return x[..., :length] / rest


def multiplications(factors: Sequence[int], keep: Sequence[int] | None = None) -> int:
    """Complex products of one DFT, or of one inverse: sum_i N N_i prod_(j <= i) keep_j / N_j.

    >>> multiplications((8, 8)), multiplications((8, 8), (5, 3))
    (1024, 440)
    """
    factors, kept = check_factors(factors, keep)
    left = [math.prod(kept[: i + 1]) * math.prod(factors[i + 1 :]) for i in range(len(factors))]
    return sum(size * share for size, share in zip(factors, left, strict=True))


@functools.lru_cache(64)
def frequencies(factors: Factors, keep: Factors | None = None) -> Int[Tensor, "k"]:
    """The frequency of each entry of a spectrum, flattened: k_1 + N_1 k_2 + ..."""
    _, kept = check_factors(factors, keep)
    k, stride = torch.zeros(1, dtype=torch.long), 1
    for size, most in zip(factors, kept, strict=True):
        k = (k[:, None] + stride * torch.arange(most)).flatten()
        stride *= size
    return k


@functools.lru_cache(64)
def kept_weights(factors: Factors, keep: Factors) -> Float[Tensor, "k"]:
    """c on the kept set S, flattened, so that y = Re IDFT(c K U) is what S union -S makes: 1 where -k is in S too, else 2 (ours)."""
    k, total = frequencies(factors, keep), math.prod(factors)
    inside = torch.zeros(total, dtype=torch.bool)
    inside[k] = True
    return 2.0 - inside[-k % total].double()


@functools.lru_cache(64)
def kept_mask(factors: Factors, keep: Factors) -> Float[Tensor, "bins"]:
    """The same set, S union -S, as a mask on the bins of rfft."""
    k, total = frequencies(factors, keep), math.prod(factors)
    mask = torch.zeros(total, dtype=torch.double)
    mask[k] = mask[-k % total] = 1.0
    return mask[: total // 2 + 1]


def real_dft(x: Float[Tensor, "... N"], factors: Sequence[int]) -> Complex[Tensor, "... bins"]:
    """The spectrum of a real x of even length N through a complex DFT of N/2 = prod(factors): entries in the order of `frequencies`, then N/2.

    z[m] = x[2m] + i x[2m+1];  X[k] = (Z[k] + conj Z[-k])/2 - (i/2) exp(-2 pi i k/N) (Z[k] - conj Z[-k]), indices mod N/2 (the paper's way).
    """
    half = math.prod(factors)
    x = torch.nn.functional.pad(x, (0, 2 * half - x.shape[-1])).unflatten(-1, (half, 2))
    z = monarch_dft(torch.complex(x[..., 0], x[..., 1]), factors).flatten(-len(tuple(factors)))
    mirror, turn = _halves(tuple(factors), z.dtype, str(z.device))
    other = z[..., mirror].conj()
    spectrum = (z + other) / 2 - 0.5j * turn * (z - other)
    return torch.cat([spectrum, (z[..., :1].real - z[..., :1].imag).to(z.dtype)], -1)


def real_idft(spectrum: Complex[Tensor, "... bins"], factors: Sequence[int]) -> Float[Tensor, "... N"]:
    """The inverse of `real_dft`: Z[k] = (X[k] + conj X[N/2-k])/2 + (i/2) exp(2 pi i k/N) (X[k] - conj X[N/2-k])."""
    mirror, turn = _halves(tuple(factors), spectrum.dtype, str(spectrum.device))
    mirror = torch.where(mirror == 0, len(mirror), mirror)  # the partner of k = 0 (at place 0) is N/2, the last
    x, other = spectrum[..., :-1], spectrum[..., mirror].conj()
    z = (x + other) / 2 + 0.5j * turn.conj() * (x - other)
    pairs = monarch_idft(z.unflatten(-1, tuple(factors)), factors)
    return torch.view_as_real(pairs).flatten(-2)


@functools.lru_cache(32)
def _halves(factors: Factors, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """For each entry of the transform of N/2: the place of -k mod N/2, and exp(-2 pi i k / N)."""
    k, half = frequencies(factors), math.prod(factors)
    place = torch.empty(half, dtype=torch.long)
    place[k] = torch.arange(half)
    return place[-k % half].to(device), roots(k, 2 * half).to(device, dtype)
