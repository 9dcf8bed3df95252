"""The nearest other window of every window: motifs and discords of a text."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fewer.checks import check_whole
from fewer.signals.hamming_distances.counting import kernels
from fewer.signals.hamming_distances.counting.letters import Alphabet, read_letters
from fewer.signals.hamming_distances.counting.matches import choose_threads

BAND = 256  # diagonals at a time


def hamming_profile(text: Any, m: int, exclusion: int | None = None, *, threads: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The smallest distance of each window of m letters from another one, and where that begins (ties to the lowest index).

    All pairs of windows are compared, along diagonals: O(n^2) whatever m.

    Args:
        text: [n] as `hamming_distances` takes it.
        m: letters of a window.
        exclusion: windows that begin within so many letters of each other are no pair; m // 2 by default.
        threads: by default those of the machine for long texts.

    Returns:
        distance int32 [n - m + 1] and index int64 [n - m + 1]; -1 in both where every other window is too near.

    Examples:
        >>> hamming_profile("abcdefabcxef", 6, exclusion=3)[0].tolist()
        [1, 6, 6, -1, 6, 6, 1]
    """
    letters, _ = read_letters(text, "text")
    check_whole(m=m)
    check_whole(0, exclusion=exclusion, optional=["exclusion"])
    check_whole(threads=threads, optional=["threads"])
    if letters.ndim != 1 or m > len(letters):
        raise ValueError(f"text has shape {letters.shape} and m is {m}; expected one dimension of at least m letters")
    codes = Alphabet(letters).codes(letters).astype(np.int32)
    windows, nearest = len(codes) - m + 1, (m // 2 if exclusion is None else exclusion) + 1
    threads = choose_threads(threads, 1e-9 * windows**2)
    none = np.iinfo(np.int64).max

    def work(share: int) -> np.ndarray:
        best = np.full(windows, none)
        for low in range(nearest + share * BAND, windows, threads * BAND):
            kernels.diagonals(codes, m, low, min(low + BAND, windows), best)
        return best

    with ThreadPoolExecutor(threads) as pool:
        best = np.minimum.reduce(list(pool.map(work, range(threads))))
    lonely = best == none
    return np.where(lonely, -1, best >> 32).astype(np.int32), np.where(lonely, -1, best & 0xFFFF_FFFF)
