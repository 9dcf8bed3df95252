"""Loops over kept entries, for one head at a time: which keys are kept, attention over them, and its gradient. numba, without the GIL."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch


@numba.njit(cache=True, nogil=True)
def select_keys(q_codes, k_codes, visible, first, last, wanted, recent, indptr, indices):  # pragma: no cover - compiled
    """For each query the `wanted` keys of [first, last] with the most equal codes, in rising order; of equal ones the newest (or oldest).

    A row of scores is all that is held beside the result. `indptr` [n + 1] is filled as rows come; `indices` has room for all.
    """
    queries, subspaces = q_codes.shape
    scores = np.empty(k_codes.shape[0], np.uint8)
    count = np.empty(subspaces + 1, np.int64)
    at = indptr[0]
    for i in range(queries):
        count[:] = 0
        for j in range(first[i], last[i] + 1):
            if visible[j]:
                same = np.uint8(0)
                for m in range(subspaces):
                    same += q_codes[i, m] == k_codes[j, m]
                scores[j] = same
                count[same] += 1
        left, bar, fits = wanted[i], subspaces + 1, 0
        if left == 0:
            indptr[i + 1] = at
            continue
        while bar > 0 and left > 0:  # down to the score of which not all may fit
            bar -= 1
            fits = min(count[bar], left)
            left -= fits
        passed = count[bar] - fits if recent else 0  # of that score, how many to pass over first
        for j in range(first[i], last[i] + 1):
            if not visible[j] or scores[j] < bar:
                continue
            if scores[j] == bar:
                if passed > 0:
                    passed -= 1
                    continue
                if fits == 0:
                    continue
                fits -= 1
            indices[at] = j
            at += 1
        indptr[i + 1] = at


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
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()
