"""What a convolution is planned by: sizes, the cost model (eq. 2 of the paper), and this machine's constants, measured once."""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fewer.checks import check_choice, check_whole
from fewer.data import folder_of, measured_once
from fewer.meters import median_seconds
from fewer.signals.flash_fft_conv.monarch import check_factors, multiplications

Backend = Literal["auto", "fft", "monarch", "triton"]
BACKENDS = ("auto", "fft", "monarch", "triton")
POINT_BYTES = 20  # of working memory a point of a row: the padded row, its spectrum, the filter's, the result
BLOCK_POINTS = 2**17  # of a block at least, measured: below, a block's some twenty calls cost more than its work
PASSES = 50.0  # what moving a point through a block costs, in operations of the FFT; decides between sizes of frames alone
IN_CACHE, OUT_OF_CACHE = 2**15, 1.5  # points of a row that stay in a second-level cache of 1 to 2 MiB, and what longer ones cost more
MATRIX_LEAST = 16  # mu: the smallest factor that fills a matrix unit
RELEASED: dict[int, tuple[int, ...]] = {
    256: (16, 16), 1024: (32, 32), 4096: (16, 16, 16), 8192: (32, 16, 16), 16384: (16, 32, 32), 32768: (32, 32, 32),
}  # fmt: skip
TRITON_LEAST, TRITON_FUSED, TRITON_MOST = 256, 4096, 2**22  # FFT sizes: of one tile, and with an outer stage
L2 = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


@dataclass(frozen=True)
class Constants:
    """A machine's rates: real operations or bytes a second, in float32."""

    matrix: float  # products of matrices of at least mu rows
    general: float  # of smaller ones
    fft: float  # 5/2 n log2 n operations of a real FFT
    cache: float  # bandwidth to a block that stays in cache
    memory: float  # bandwidth to main memory
    cache_bytes: int  # of the level that a block is to stay in


@dataclass(frozen=True)
class Plan:
    """How a convolution is done.

    Attributes:
        n: the FFT's size; below L + K - 1 the filter is applied in overlapping frames of that size.
        factors: of the Monarch form (and what `keep` counts in).
        backend: "fft" (the vendor's FFT, block by block), "monarch" (matrix products) or "triton" (one fused kernel).
        block_rows: rows that are worked on at a time.
        predicted_seconds: by the cost model, for all rows; NaN where nothing was measured.
        multiplications: complex products of a row, transform and inverse.
    """

    n: int
    factors: tuple[int, ...]
    backend: Backend
    block_rows: int
    predicted_seconds: float
    multiplications: int


def good_size(least: int) -> int:
    """The smallest even 2^a 3^b 5^c, 3^b 5^c <= 125, of at least `least`: FFTs of other sizes are slow.

    >>> good_size(2047), good_size(2 * 1000 - 1), good_size(1)
    (2048, 2000, 2)
    """
    return min(odd * 2 ** max(1, (-(-least // odd) - 1).bit_length()) for odd in (1, 3, 5, 9, 15, 25, 27, 45, 75, 81, 125))


@functools.lru_cache(1024)
def frame_size(length: int, taps: int) -> int:
    """The FFT size for a causal filter of K taps over L entries: one transform of L + K - 1, or shorter frames, whichever is cheaper.

    >>> frame_size(1024, 1024), frame_size(65536, 4096)
    (2048, 20480)
    """
    whole = good_size(length + taps - 1)
    even = {good_size(-(-length // parts) + taps - 1) for parts in (2, 3, 4, 6, 8, 12, 16, 24, 32)}  # frames without a rest
    sizes = even | {good_size(times * taps) for times in (2, 3, 4, 5, 6, 8, 12, 16)} | {2**i for i in range(8, 14)}
    framed = sorted(n for n in sizes if 2 * taps <= n < whole)
    return min([whole, *framed], key=lambda n: convolution_cost(length, taps, n))


def convolution_cost(length: int, taps: int, n: int) -> float:
    """Real operations of a row's convolution with FFTs of size n: two real FFTs a frame, and its passes through the cache.

    Grows like L log K where frames are short: `frame_size` takes n in proportion to K.
    """
    frames = 1 if n >= length + taps - 1 else -(-length // (n - taps + 1))
    return frames * n * (5 * math.log2(n) + PASSES) * (1 if n <= IN_CACHE else OUT_OF_CACHE)


def balanced(n: int, p: int) -> tuple[int, ...]:
    """n as p factors of the smallest sum, the largest first.

    >>> balanced(64, 2), balanced(8192, 3), balanced(2000, 2)
    ((8, 8), (32, 16, 16), (50, 40))
    """
    return min(factorizations(n, p), key=lambda factors: (sum(factors), factors))


@functools.lru_cache(256)
def factorizations(n: int, p: int) -> list[tuple[int, ...]]:
    """All ways to write n as p factors, in descending order."""
    if p == 1:
        return [(n,)]
    return [(d, *rest) for d in range(1, n + 1) if n % d == 0 for rest in factorizations(n // d, p - 1) if rest[0] <= d]


def default_factors(n: int, keep: Sequence[int] | None = None) -> tuple[int, ...]:
    """The released factors of a size, else balanced ones; as many as `keep` has entries, where it is given."""
    if keep:
        return balanced(n, len(keep))
    return RELEASED.get(n) or balanced(n, 2 if n <= 2048 else 3)


def stage_seconds(n: int, factors: Sequence[int], constants: Constants, keep: Sequence[int] | None = None, bytes_a_point: int = 8) -> float:
    """Equation 2 for one row: sum_i [16 N N_i / gamma(N_i) + 4 N / omega(i)], skipped entries left out."""
    factors, kept = check_factors(factors, keep)
    seconds, share = 0.0, 1.0
    fits = POINT_BYTES * n <= constants.cache_bytes
    for i, (size, most) in enumerate(zip(factors, kept, strict=True)):
        share *= most / size
        rate = constants.matrix if size >= MATRIX_LEAST else constants.general
        bandwidth = constants.cache if i or fits else constants.memory
        seconds += share * (16 * n * size / rate + 4 * n * bytes_a_point / 4 / bandwidth)
    return seconds


def make_plan(
    n: int,
    rows: int,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    keep: Sequence[int] | None = None,
    *,
    backend: Backend = "auto",
    factors: Sequence[int] | None = None,
) -> Plan:
    """The cheapest way, by the cost model, to convolve rows with FFTs of size n on a device.

    Args:
        n: the FFT's size, at least 1.
        rows: how many there are (batch times channels).
        keep: entries kept of each factor, for frequency-sparse convolutions.
        backend: leave the choice to the model ("auto"), or not.
        factors: of the Monarch form, in place of the model's.

    Raises:
        ValueError: a size below 1, factors that do not make n, or more of `keep` than of factors; RuntimeError: Triton cannot run there.

    Source: arXiv 2311.05908, equation 2.

    Examples:
        >>> plan = make_plan(4096, rows=64)
        >>> plan.backend, plan.n
        ('fft', 4096)
    """
    check_whole(n=n, rows=rows)
    check_choice(BACKENDS, backend=backend)
    kind = torch.device(device).type
    given = tuple(factors) if factors else None
    if given and math.prod(given) != n:
        raise ValueError(f"factors {given} make {math.prod(given)} and n is {n}; expected factors of n, such as {default_factors(n)}")
    chosen = given or default_factors(n, keep)
    check_factors(chosen, keep)
    if backend == "triton":
        check_triton(n, kind, dtype, keep)
    wide = 2.0 if dtype == torch.float64 else 1.0
    machine = calibrate(kind)
    fft = rows * wide * (5 * n * math.log2(max(n, 2)) / machine.fft + 16 * n / machine.cache)
    if not given and not keep:  # the model may take other factors than the released ones where it is cheaper
        chosen = min([chosen, *_candidates(n)], key=lambda each: stage_seconds(n, each, machine))
    monarch = rows * wide * stage_seconds(n, chosen, machine, keep)
    if backend == "auto":
        backend = "fft" if fft <= monarch or (kind == "cuda" and not keep) else "monarch"
        if kind == "cuda" and dtype in (torch.float16, torch.bfloat16) and not keep and is_fused_size(n):
            backend = "triton"
    seconds = fft if backend == "fft" else monarch
    return Plan(n, chosen, backend, block_rows(n, kind, wide), seconds, 2 * multiplications(chosen, keep))


def _candidates(n: int) -> list[tuple[int, ...]]:
    most = 128
    return [each for p in (2, 3, 4) if n >= 4 for each in [balanced(n, p)] if max(each) <= most]


def is_fused_size(n: int) -> bool:
    """Whether the Triton kernel takes it: a power of two from 256 on."""
    return TRITON_LEAST <= n <= TRITON_MOST and n & (n - 1) == 0


def check_triton(n: int, device: str, dtype: torch.dtype, keep: Sequence[int] | None) -> None:
    """Refuse what the Triton kernels cannot do."""
    import os

    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend is 'triton' and the tensors are on {device}; expected a GPU, or Triton's interpreter: move them there, set "
            "TRITON_INTERPRET=1 before Python starts (for tests), or use backend='auto'"
        )
    if not is_fused_size(n):
        raise ValueError(
            f"n is {n}; expected a power of two from {TRITON_LEAST} to {TRITON_MOST} with backend='triton': pad to one, or use 'auto'"
        )
    if dtype == torch.float64:
        raise ValueError("u is float64; expected float16, bfloat16 or float32 with backend='triton': use backend='fft'")
    if keep:
        raise ValueError(f"keep is {tuple(keep)} with backend='triton'; expected None there: use backend='monarch' or 'auto'")


def block_rows(n: int, device: str = "cpu", wide: float = 1.0) -> int:
    """Rows whose working set stays within half of the second-level cache, for each thread, but enough of them to outweigh the calls; many on a GPU."""
    if device == "cuda":
        return max(1, 2**27 // n)
    return max(1, int(_l2_bytes() / 2 / (POINT_BYTES * wide * n)), BLOCK_POINTS // n) * torch.get_num_threads()


@functools.cache
def _l2_bytes() -> int:
    try:
        text = L2.read_text().strip()
        return int(text.removesuffix("K")) * 1024 if text.endswith("K") else int(text.removesuffix("M")) * 2**20
    except (OSError, ValueError):  # another system than Linux
        return 2**20


@functools.cache
def calibrate(device: str = "cpu", *, fresh: bool = False) -> Constants:
    """This machine's constants of the cost model: measured once (a third of a second), then kept in the user's cache.

    Args:
        device: "cpu" or "cuda".
        fresh: measure again.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else platform.node()
    words = {"device": device, "name": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    folder = folder_of("machine", "flash-fft-conv", words)
    return measured_once(folder, lambda kept: Constants(**kept), lambda: _measure(device), fresh=fresh)


def _measure(device: str) -> Constants:
    def rate(work: float, call: Callable[[], object]) -> float:
        def whole() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        whole()
        return work / median_seconds(whole, 5)

    def products(size: int) -> float:
        a, x = torch.randn(size, size, device=device), torch.randn(2**17 // size // size, size, size, device=device)
        return rate(2 * 2**17 * size, lambda: a @ x)

    rows, n = 16, 4096
    real = torch.randn(rows, n, device=device)
    large, small = torch.randn(2**23, device=device), torch.randn(2**16, device=device)
    there = {each: torch.empty_like(each) for each in (large, small)}
    # 5/2 n log2 n operations a real FFT, one there and one back
    return Constants(
        matrix=products(32),
        general=products(8),
        fft=rate(5 * rows * n * math.log2(n), lambda: torch.fft.irfft(torch.fft.rfft(real), n=n)),
        cache=rate(8 * small.numel(), lambda: there[small].copy_(small)),
        memory=rate(8 * large.numel(), lambda: there[large].copy_(large)),
        cache_bytes=_l2_bytes() // 2 if device == "cpu" else 200_000,
    )
