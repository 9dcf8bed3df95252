"""Loops over kept entries, for one head at a time: which keys are kept, attention over them, and its gradient. numba, without the GIL."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch


@numba.njit(cache=True, nogil=True)
def select_keys(q_codes, k_codes, hidden, first, last, wanted, recent, at, indices):  # pragma: no cover - compiled
    """For each query the `wanted` keys of [first, last] with the most equal codes, in rising order, from `indices[at]` on; of equal ones
    the newest (or oldest).

    Keys' codes lie by subspace [M, t], so that bytes of many keys are compared at once; a hidden key starts at 128, above every score.
    """
    queries, subspaces = q_codes.shape
    scores = np.empty(k_codes.shape[1], np.uint8)
    for i in range(queries):
        left, bar, equal = wanted[i], subspaces + 1, 0
        if left == 0:
            continue
        row, start = scores[first[i] : last[i] + 1], first[i]
        row[:] = hidden[first[i] : last[i] + 1]
        for m in range(subspaces):
            code, codes = q_codes[i, m], k_codes[m, first[i] : last[i] + 1]
            for j in range(len(row)):
                row[j] += np.uint8(code == codes[j])
        while left > 0 and bar > 0:  # down to the score of which not all may fit
            bar -= 1
            equal = 0
            for j in range(len(row)):
                equal += row[j] == bar
            left -= equal
        passed = max(0, -left) if recent else 0  # of that score, how many to pass over first
        fits = equal - max(0, -left)
        for j in range(len(row)):
            if row[j] < bar or row[j] > subspaces:
                continue
            if row[j] == bar:
                if passed > 0:
                    passed -= 1
                    continue
                if fits == 0:
                    continue
                fits -= 1
            indices[at] = start + j
            at += 1


@numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def attend(q, k, v, indptr, indices, scale, clamp, out, weights):  # pragma: no cover - compiled
    """Softmax over the kept keys of each query, and the values' mean by it. A weight whose score was clamped is stored negative.

    clamp <= 0: none, and the largest score is subtracted instead.
    """
    start = indptr[0]
    for i in range(q.shape[0]):
        low, high = indptr[i] - start, indptr[i + 1] - start
        largest = -np.inf
        for e in range(low, high):
            j = indices[e]
            a = q[i, 0] * 0
            for c in range(q.shape[1]):
                a += q[i, c] * k[j, c]
            weights[e] = a * scale
            largest = max(largest, weights[e])
        total = 0.0
        for e in range(low, high):
            a = weights[e]
            if clamp > 0:
                p = np.exp(min(max(a, -clamp), clamp))
                weights[e] = -p if a > clamp or a < -clamp else p
            else:
                p = np.exp(a - largest)
                weights[e] = p
            total += p
        for c in range(v.shape[1]):
            out[i, c] = 0
        for e in range(low, high):
            weights[e] /= total
            p, j = abs(weights[e]), indices[e]
            for c in range(v.shape[1]):
                out[i, c] += p * v[j, c]


@numba.njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def attend_backward(q, k, v, indptr, indices, scale, weights, grad, dq, dk, dv):  # pragma: no cover - compiled
    """Adds the gradients of one head; kept entries alone are touched, and nothing goes through a score that was clamped."""
    start = indptr[0]
    width = v.shape[1]
    along = np.empty(k.shape[0], q.dtype)
    for i in range(q.shape[0]):
        low, high = indptr[i] - start, indptr[i + 1] - start
        mean = 0.0
        for e in range(low, high):
            j, p = indices[e], abs(weights[e])
            a = q[i, 0] * 0
            for c in range(width):
                a += grad[i, c] * v[j, c]
                dv[j, c] += p * grad[i, c]
            along[e - low] = a
            mean += p * a
        for e in range(low, high):
            if weights[e] <= 0:
                continue
            j = indices[e]
            ds = weights[e] * (along[e - low] - mean) * scale
            for c in range(q.shape[1]):
                dq[i, c] += ds * k[j, c]
                dk[j, c] += ds * q[i, c]


def each_of(tasks: Iterable[Callable[[], None]]) -> None:
    """Run tasks that hold no lock on as many threads as torch has."""
    if torch.get_num_threads() == 1:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()
