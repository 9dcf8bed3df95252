"""What each way of counting costs on this machine, measured once, and which letters are counted by which: the choice.

The cost of a way is a constant times what it does: pairs, words of 64 shifts a position, butterflies of transforms, letters compared.
The H letters with the most pairs go by bits or by transforms and the others by pairs, for the H of least cost (for sqrt(m) letters of
equal frequency that is the O(n sqrt(m log m)) algorithm).
"""

from __future__ import annotations

import functools
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from fewer.data import folder_of, measured_once
from fewer.signals.hamming_distances.counting import kernels
from fewer.signals.hamming_distances.counting.letters import NOWHERE
from fewer.signals.hamming_distances.counting.spectra import SINGLE, Transforms, bit_vectors, frame_size

Way = Literal["pairs", "bits", "fft", "direct"]
WAYS: tuple[Way, ...] = ("pairs", "bits", "fft", "direct")
GROUP = 256  # letters whose bit vectors stand beside each other
SIZES = (2**13, 2**15, 2**17, 2**19)  # of the transforms that are timed
VERSION = 2  # of the constants' meaning


@dataclass(frozen=True)
class Constants:
    """Seconds on one thread of this machine.

    Attributes:
        pair: of a pair of equal letters; walk: of a letter that is walked over for it.
        bit: of one position of the pattern and a word of 64 shifts; vector: of a letter of the text for one letter's bit vector;
            read: of a window whose counter is read back.
        single, double: of a number of a frame, as (size, seconds of one more letter, seconds whatever the letters), by size.
        product: of a number of a frame whose spectrum is kept.
        window: of a window that is begun, summed up and checked.
        byte, word: of one comparison in a whole window, for codes of one and of four bytes.
        early_byte, early_word: of one comparison that may stop early; start: of a window that is begun.
        roll: of one letter of a rolling hash.
    """

    pair: float
    walk: float
    bit: float
    vector: float
    read: float
    single: tuple[tuple[int, float, float], ...]
    double: tuple[tuple[int, float, float], ...]
    product: float
    window: float
    byte: float
    word: float
    early_byte: float
    early_word: float
    start: float
    roll: float

    def transform(self, size: int, double: bool) -> tuple[float, float]:
        """Seconds for each number of a frame: of one more letter, and of the way back."""
        sizes, letter, back = np.log2(self.double if double else self.single).T
        at = math.log2(size)
        return 2.0 ** np.interp(at, sizes, letter), 2.0 ** np.interp(at, sizes, back)


@dataclass(frozen=True)
class Plan:
    """How distances are counted.

    Attributes:
        letters_by_method: way -> how many letters it counts.
        predicted_seconds: on one thread.
        method: "exact", "early stop", "seeds", "hash" or "sample".
        measured_seconds: what it took, where it was carried out.
        comparisons, budget: letters compared by what stops early, and how many it may compare.
        rounding: the largest distance of a transform's numbers from whole ones.
        ways: the way of each letter of the alphabet, as an index into WAYS.
        repetitions: how often an approximation was repeated.
    """

    letters_by_method: dict[str, int]
    predicted_seconds: float
    method: str = "exact"
    measured_seconds: float | None = None
    comparisons: int = 0
    budget: int = 0
    rounding: float = 0.0
    repetitions: int = 1
    ways: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int8), repr=False, compare=False)


def costs(in_text: np.ndarray, in_pattern: np.ndarray, n: int, m: int, constants: Constants, kept: bool = False) -> dict[str, np.ndarray]:
    """Seconds [sigma + 1] of counting the first H letters (H = 0..sigma, in the order given) by each way, those of "pairs" all the rest.

    Args:
        kept: the text's bit vectors and spectra are there already.
    """
    windows = n - m + 1
    cumulated = lambda values: np.concatenate([[0.0], np.cumsum(values, dtype=float)])  # noqa: E731
    pairs = cumulated(in_text * in_pattern.astype(float))
    letters, positions = np.arange(len(in_text) + 1), cumulated(in_pattern)
    some = letters > 0
    rest = (pairs[-1] - pairs) * constants.pair + (letters < len(in_text)) * n * constants.walk
    vectors = 0 if kept else letters * n * constants.vector
    bits = vectors + positions * (windows / 64) * constants.bit + np.ceil(letters / GROUP) * windows * constants.read
    size = frame_size(m)
    numbers = size * max(2, math.ceil(windows / (size - m + 1)))
    letter, back = constants.transform(size, m > SINGLE)
    fft = letters * (numbers * (constants.product if kept else letter) + size * letter) + some * numbers * back
    return {"pairs": rest, "bits": bits, "fft": fft}


def choose(
    in_text: np.ndarray, in_pattern: np.ndarray, n: int, m: int, constants: Constants, method: str = "auto", kept: bool = False
) -> Plan:
    """The plan of least predicted time, or that of one way for all letters."""
    sigma = len(in_text)
    ways = np.full(sigma, WAYS.index("pairs"), dtype=np.int8)
    shared = np.flatnonzero((in_text > 0) & (in_pattern > 0))
    order = shared[np.argsort(-(in_text[shared] * in_pattern[shared].astype(float)), kind="stable")]
    by = costs(in_text[order], in_pattern[order], n, m, constants, kept)
    compared = float(n - m + 1) * m * (constants.byte if sigma < NOWHERE - 1 else constants.word)
    if method == "auto":
        seconds, way, first = min(
            (float((by[way] + by["pairs"]).min()), way, int((by[way] + by["pairs"]).argmin())) for way in ("bits", "fft")
        )
        if compared < seconds:
            seconds, way, first = compared, "direct", len(order)
    elif method == "direct":
        seconds, way, first = compared, "direct", len(order)
    else:
        first = 0 if method == "pairs" else len(order)
        way, seconds = method, float((by[method][first] if method != "pairs" else 0) + by["pairs"][first])
    ways[order[:first]] = WAYS.index(way)
    told = {way: first, "pairs": len(order) - first} if way != "pairs" else {"pairs": len(order)}
    return Plan({name: count for name, count in told.items() if count}, seconds + (n - m + 1) * constants.window, ways=ways)


# Measuring


def calibrate(fresh: bool = False) -> Constants:
    """The constants of this machine: from the cache, or measured in under two seconds and kept there.

    Args:
        fresh: measure again.
    """
    if fresh:
        _constants.cache_clear()
    return _constants(fresh)


@functools.cache
def _constants(fresh: bool) -> Constants:
    import numba
    import torch

    machine = [platform.node(), platform.machine(), platform.processor(), np.__version__, numba.__version__, torch.__version__, VERSION]
    folder = folder_of("machine", "hamming-distances", {"machine": machine})

    def read(kept: dict[str, Any]) -> Constants:
        tables: dict[str, Any] = {name: tuple(tuple(each) for each in kept[name]) for name in ("single", "double")}
        return Constants(**kept | tables)

    return measured_once(folder, read, _measure, fresh=fresh)


def _seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The least time of a call, after one that compiles or warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _measure() -> Constants:
    import torch

    from fewer.devices import one_thread

    rng = np.random.default_rng(0)
    n, m, sigma = 1 << 17, 1 << 10, 64
    text, pattern = rng.integers(0, sigma, n).astype(np.int32), rng.integers(0, sigma, m).astype(np.int32)
    small, out = text.astype(np.uint8), np.zeros(n - m + 1, dtype=np.int32)
    pairs = {}
    for length in (m, 8 * m):  # a letter's positions, few and many: what is left without pairs is the walk
        longer = rng.integers(0, sigma, length).astype(np.int32)
        counts = np.bincount(longer, minlength=sigma + 2)
        first, positions = np.concatenate([[0], np.cumsum(counts)]), np.argsort(longer, kind="stable")
        taken = _seconds(lambda f=first, p=positions, k=length: kernels.add_pairs(text, f, p, k, out[: n - k + 1]))
        pairs[length] = taken, float(counts @ np.bincount(text, minlength=sigma + 2))
    (short, few_pairs), (long, many_pairs) = pairs.values()
    pair = max(long - short, 1e-12) / (many_pairs - few_pairs)
    walk = max(short - pair * few_pairs, 1e-12) / n
    build = _seconds(lambda: bit_vectors(text.astype(np.uint8), np.arange(sigma), m))
    vectors = bit_vectors(small, np.arange(sigma), m)
    rows, shifts = pattern.astype(np.int64), np.arange(m)
    few = _seconds(lambda: kernels.add_bits(vectors, rows[:8], shifts[:8], out))
    bit = (_seconds(lambda: kernels.add_bits(vectors, rows, shifts, out)) - few) / (m - 8)
    direct = [_seconds(lambda t=t: kernels.add_direct(t, t[:256], out[: n - m])) / 256 / (n - m) for t in (small, text)]
    at, order = np.arange(n - m), np.arange(m // 64)
    early = [
        _seconds(lambda t=t: kernels.stop_early(t, t[:m], at, order, 64, 10**9, math.inf, out), 1) / m / (n - m) for t in (small, text)
    ]
    once = _seconds(lambda: kernels.stop_early(small, small[:m], at, order, 64, 0, math.inf, out)) / (n - m)
    found = np.empty(n, dtype=np.int64)
    roll = _seconds(lambda: kernels.seeds(text, text[:m], at[:1], 64, np.uint64(12345), found)) / n
    window = _seconds(lambda: (np.zeros(1 << 20, dtype=np.int32) + 1).sum(dtype=np.int64)) / (1 << 20)
    with one_thread():
        tables = [tuple((size, *_transform(size, double)) for size in SIZES) for double in (False, True)]
        spectrum = torch.randn(64, 4097, dtype=torch.complex64)
        product = _seconds(lambda: torch.zeros_like(spectrum).addcmul_(spectrum, spectrum[0])) / (64 * 8192)
    return Constants(
        pair,
        walk, max(bit, 1e-12) / (out.size / 64), build / n / sigma, few / out.size, tables[0], tables[1], product, window,
        direct[0], direct[1], early[0], early[1], max(0.0, once - 64 * early[0]), roll,
    )  # fmt: skip


def _transform(size: int, double: bool) -> tuple[float, float]:
    """Seconds a number of one more letter, and of the way back, for frames of a size."""
    m = size // 4
    codes = np.zeros(max(1 << 18, 2 * size), dtype=np.uint8)
    transforms, out = Transforms(codes, m, double, np.zeros(3)), np.zeros(len(codes) - m + 1, dtype=np.int32)
    one, three = (_seconds(lambda k=k: transforms.add_matches(codes[:m] + 9, np.arange(k), out), 2) for k in (1, 3))
    numbers, letter = transforms.frames * size, max(three - one, 1e-9) / 2
    return letter / (numbers + size), max(one - letter, 1e-9) / numbers
