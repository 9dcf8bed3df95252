"""Races on one thread: against one scipy convolution a letter, plain comparison that is vectorised, and an index against starting anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fewer.devices import one_thread
from fewer.meters import median_seconds
from fewer.signals.hamming_distances.counting import kernels
from fewer.signals.hamming_distances.distances import hamming_distances
from fewer.signals.hamming_distances.problems import LENGTH, LETTERS, addresses, by_correlation, dna
from fewer.signals.hamming_distances.text_index import TextIndex
from fewer.study import Bench

bench = Bench("hamming-distances")
Call = Callable[[], Any]
PEER = "scipy.signal.oaconvolve, a letter at a time"
PLACE = 123_456  # of the pattern in the text
FAST = 1e10  # comparisons a second that make a plain comparison a peer


def on_dna(m: int, reach: float) -> None:
    @bench.race(f"a million windows of DNA, m = {m:,}", peer=PEER, reach=reach)
    def race() -> tuple[Call, Call]:
        text = dna()
        pattern = text[PLACE : PLACE + m]
        if not np.array_equal(hamming_distances(text, pattern, threads=1), by_correlation(text, pattern)):
            raise RuntimeError(f"the distances at m = {m} are not those of the peer")
        return lambda: hamming_distances(text, pattern, threads=1), lambda: by_correlation(text, pattern)


for length, bound in ((64, 1 / 5), (512, 1 / 3), (4096, 1 / 1.2), (32_768, 1 / 1.2)):
    on_dna(length, bound)


@bench.quantity("seconds of a million windows of words, m = 4,096", peer=f"{PEER}, extrapolated from {LETTERS}", unit="s", reach=1 / 100)
def words() -> tuple[float, float]:
    text = np.concatenate(addresses())[:LENGTH]
    pattern = text[PLACE : PLACE + 4096]
    letters = np.unique(pattern)
    with one_thread():
        ours = median_seconds(lambda: hamming_distances(text, pattern, threads=1), 7)
        theirs = median_seconds(lambda: by_correlation(text, pattern, letters[:LETTERS]), 1)
    return ours, theirs * len(letters) / LETTERS


@bench.race("a million windows of DNA, m = 4,096 (plain)", peer="every window compared, vectorised")
def against_direct() -> tuple[Call, Call]:
    text = dna()
    pattern = text[PLACE : PLACE + 4096]
    return lambda: hamming_distances(text, pattern, threads=1), lambda: hamming_distances(text, pattern, threads=1, method="direct")


@bench.quantity("seconds of 10^10 comparisons by the plain way", peer="10^10 a second, below which it is no peer", unit="s", reach=1.0)
def plain_is_a_peer() -> tuple[float, float]:
    text, out = dna(), np.zeros(LENGTH - 255, dtype=np.int32)
    return FAST / (out.size * 256) * median_seconds(lambda: kernels.add_direct(text, text[:256], out), 7), 1.0


@bench.race("the next pattern of an index, DNA, m = 4,096", peer="a call that starts anew", reach=1 / 1.5)
def next_pattern() -> tuple[Call, Call]:
    text = dna()
    index, pattern = TextIndex(text), text[PLACE : PLACE + 4096]
    index.distances(text[:4096], threads=1)
    return lambda: index.distances(pattern, threads=1), lambda: hamming_distances(text, pattern, threads=1)
