"""Distances up to k: windows are left as soon as they differ too often, with a budget, or never looked at where no piece of the pattern stands."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from fewer.signals.hamming_distances.counting import kernels
from fewer.signals.hamming_distances.counting.costs import Constants, Plan, choose
from fewer.signals.hamming_distances.counting.letters import Pair, count_letters
from fewer.signals.hamming_distances.counting.matches import exact

BLOCK = 64  # letters that are compared at a time
SEED = 16  # letters of a piece at least, for pieces to be looked up
PROBED = 256  # windows that are compared to see how soon they stop
FEW = 16  # pieces are looked up where at most one window in so many is predicted to have one


def bounded(
    pair: Pair, most: int, constants: Constants, seed: int = 0, threads: int | None = None, block: int = BLOCK
) -> tuple[np.ndarray, Plan]:
    """min(D, most + 1), int32 [n - m + 1].

    (a) Blocks of the pattern are compared in one random order until more than `most` letters differ. (b) When that has cost more than
    the exact way is predicted to cost for what is left, the exact way does the rest: at most twice the better of the two on any data.
    (c) `most` = 0 and (d) long patterns: the pattern is cut into most + 1 pieces, one of which must stand unchanged; only windows where
    a rolling hash finds one are compared. With wildcards the exact way does all.
    """
    start, m = time.perf_counter(), len(pair.pattern)
    if most >= m or pair.has_wildcards:
        distances, plan = exact(pair, constants, threads=threads)
        return np.minimum(distances, most + 1, out=distances), plan
    plan = choose(pair.in_text, pair.in_pattern, len(pair.text), m, constants)
    small = pair.text.dtype == np.uint8
    letter = constants.early_byte if small else constants.early_word
    budget = (plan.predicted_seconds / pair.windows - constants.start) / letter  # letters a window
    rng = np.random.default_rng(seed)
    order = rng.permutation(-(-m // block))
    out = np.full(pair.windows, most + 1, dtype=np.int32)
    positions = candidates(pair, most, rng) if constants.roll * len(pair.text) < plan.predicted_seconds else None
    method = "seeds"
    if positions is None:
        positions, method = np.arange(pair.windows), "early stop"
    found = np.empty(len(positions), dtype=np.int32)
    share = budget * pair.windows / max(1, len(positions))  # fewer windows share the same budget
    probed = 0
    if len(positions) > 16 * PROBED:  # a few windows tell whether it is worth beginning
        few = rng.choice(positions, PROBED, replace=False)
        _, probed = kernels.stop_early(pair.text, pair.pattern, few, order, block, most, np.inf, found)
        if probed > share * PROBED:
            share = 0.0
    done, spent = kernels.stop_early(pair.text, pair.pattern, positions, order, block, most, max(share, 0.0), found)
    out[positions[:done]] = found[:done]
    predicted = (spent + probed) * letter + done * constants.start
    letters, rounding = {}, 0.0
    if done < len(positions):
        at = int(positions[done])
        rest = Pair(pair.text[at:], pair.pattern, pair.letters, count_letters(pair.text[at:], pair.letters))
        distances, told = exact(rest, constants, threads=threads)
        np.minimum(distances, most + 1, out=out[at:])
        predicted, letters, rounding = predicted + told.predicted_seconds, told.letters_by_method, told.rounding
    return out, replace(
        plan,
        method=method,
        letters_by_method=letters,
        predicted_seconds=predicted,
        measured_seconds=time.perf_counter() - start,
        comparisons=int(spent + probed),
        budget=int(max(budget, 0.0) * pair.windows),
        rounding=rounding,
    )


def candidates(pair: Pair, most: int, rng: np.random.Generator) -> np.ndarray | None:
    """The windows in which one of most + 1 pieces of the pattern stands unchanged, ascending; None where looking them up does not pay."""
    m = len(pair.pattern)
    length = m // (most + 1)
    if (most > 0 and length < SEED) or pair.has_wildcards:
        return None
    starts = np.arange(most + 1) * length
    shares = np.append(pair.in_text / len(pair.text), [0.0, 0.0])  # of a letter that the text lacks: nothing
    with np.errstate(divide="ignore"):
        logs = np.concatenate([[0.0], np.cumsum(np.maximum(np.log(shares[pair.pattern]), -1e3))])
    expected = np.exp(logs[starts + length] - logs[starts]).sum() * pair.windows
    if expected > pair.windows / FEW:
        return None
    found = np.empty(pair.windows // FEW + most + 16, dtype=np.int64)
    factor = np.uint64(int(rng.integers(2**62)) * 2 + 1)
    count = kernels.seeds(pair.text.astype(np.int32), pair.pattern.astype(np.int32), starts, length, factor, found)
    return None if count < 0 else np.unique(found[:count])
