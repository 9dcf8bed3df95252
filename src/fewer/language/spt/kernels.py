"""Which keys are kept, attention over them, and its gradient: on the CPU loops for one head at a time (numba, without the GIL), elsewhere
torch in chunks of query rows, of which a few are held at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 24  # numbers that a chunk of rows may take


@numba.njit(cache=True, nogil=True)
def add_equal(scores, codes, code):  # pragma: no cover - compiled
    for j in range(len(scores)):
        scores[j] += np.uint8(codes[j] == code)


@numba.njit(cache=True, nogil=True)
def count_of(scores, score):  # pragma: no cover - compiled
    total = 0
    for j in range(len(scores)):
        total += scores[j] == score
    return total


@numba.njit(cache=True, nogil=True)
def select_keys(q_codes, k_codes, hidden, first, last, wanted, recent, at, indices):  # pragma: no cover - compiled
    """For each query the `wanted` keys of [first, last] with the most equal codes, in rising order, from `indices[at]` on; of equal ones
    the newest (or oldest).

    Keys' codes lie by subspace [M, t]: bytes of many keys are compared at once, in loops of their own, which the compiler turns into
    vector instructions. A hidden key starts at 128, above every score.
    """
    queries, subspaces = q_codes.shape
    room, passing = np.empty(k_codes.shape[1], np.uint8), np.empty(k_codes.shape[1] + 1, np.int32)
    for i in range(queries):
        if wanted[i] == 0:
            continue
        start, end = first[i], last[i] + 1
        scores = room[: end - start]
        scores[:] = hidden[start:end]
        for m in range(subspaces):
            add_equal(scores, k_codes[m, start:end], q_codes[i, m])
        left, bar, equal = wanted[i], subspaces + 1, 0
        while left > 0 and bar > 0:  # down to the score of which not all may fit
            bar -= 1
            equal = count_of(scores, np.uint8(bar))
            left -= equal
        over = max(0, -left)
        low, high = (over, equal) if recent else (0, equal - over)  # which of that score are kept, by their order
        floor, top, count, seen = np.uint8(bar), np.uint8(subspaces), 0, 0
        for j in range(end - start):  # without a branch, which would be guessed wrong too often
            passing[count] = j
            count += (scores[j] >= floor) & (scores[j] <= top)
        for e in range(count):
            j = passing[e]
            if scores[j] == floor:
                seen += 1
                if seen <= low or seen > high:
                    continue
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


# The same in torch, for other devices


def in_loops(tensor: Tensor) -> bool:
    """Whether the compiled loops can read a tensor: they know the CPU's memory alone."""
    return tensor.is_cpu


def row_chunks(rows: int, numbers_a_row: int) -> list[Tensor]:
    """Numbers of rows, in parts that keep to CHUNK."""
    return list(torch.arange(rows).split(max(1, CHUNK // max(1, numbers_a_row))))


def select_in_chunks(
    q_codes: Tensor, k_codes: Tensor, hidden: Tensor, first: Tensor, last: Tensor, wanted: Tensor, recent: bool, starts: Tensor, total: int
) -> Tensor:
    """The keys that `select_keys` finds, for all heads [B, H, n, M] at once; `starts` [B, H, n] is where a query's begin."""
    (batch, heads, _, subspaces), keys = q_codes.shape, k_codes.shape[2]
    k_codes = k_codes.repeat_interleave(heads // k_codes.shape[1], dim=1)
    place = torch.arange(keys, device=q_codes.device)
    indices = torch.empty(total, dtype=torch.long, device=q_codes.device)
    for rows in row_chunks(q_codes.shape[2], batch * heads * keys):
        score = torch.zeros(batch, heads, len(rows), keys, dtype=torch.long, device=q_codes.device)
        for m in range(subspaces):
            score += q_codes[:, :, rows, None, m] == k_codes[:, :, None, :, m]
        rank = score * keys + (place if recent else keys - 1 - place)  # no two are alike
        unseen = (place < first[rows, None]) | (place > last[rows, None]) | hidden.bool()[:, None, None]
        most = int(wanted[:, rows].max())
        best = rank.masked_fill(unseen, -1).topk(most).indices
        due = (torch.arange(most, device=place.device) < wanted[:, None, rows, None]).expand_as(best)
        best = best.masked_fill(~due, keys).sort().values  # rising, what is not due behind
        indices[(starts[:, :, rows, None] + torch.arange(most, device=place.device))[due]] = best[due]
    return indices


class Chunk(NamedTuple):
    """Kept entries of some query rows of all heads, padded to the longest row."""

    rows: Tensor
    at: Tensor  # [B, H, c, K] where an entry is stored
    key: Tensor  # [B, H, c, K] its key's place among those of all key heads
    due: Tensor  # [B, H, c, K] false for padding


def entry_chunks(q: Tensor, k: Tensor, indptr: Tensor, indices: Tensor) -> Iterator[Chunk]:
    batch, heads, queries, width = q.shape
    starts, counts = (each.view(batch, heads, queries) for each in (indptr[:-1], indptr.diff()))
    of_head = torch.arange(heads, device=q.device) * k.shape[1] // heads + torch.arange(batch, device=q.device)[:, None] * k.shape[1]
    for rows in row_chunks(queries, batch * heads * width * max(1, int(counts.max()))):
        most = max(1, int(counts[:, :, rows].max()))
        due = torch.arange(most, device=q.device) < counts[:, :, rows, None]
        at = (starts[:, :, rows, None] + torch.arange(most, device=q.device)) * due
        yield Chunk(rows, at, indices[at].long() + of_head[:, :, None, None] * k.shape[2], due)


def attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, indptr: Tensor, indices: Tensor, scale: float, clamp: float, out: Tensor, weights: Tensor
) -> None:
    """`attend` for all heads at once."""
    for rows, at, key, due in entry_chunks(q, k, indptr, indices):
        a = torch.einsum("bhcd,bhckd->bhck", q[:, :, rows], k.flatten(0, 2)[key]) * scale
        p = (a.clamp(-clamp, clamp) if clamp > 0 else a).masked_fill(~due, -torch.inf).softmax(-1).nan_to_num()
        out[:, :, rows] = torch.einsum("bhck,bhckd->bhcd", p, v.flatten(0, 2)[key])
        weights[at[due]] = torch.where(a.abs() > clamp, -p, p)[due] if clamp > 0 else p[due]


def attend_backward_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, indptr: Tensor, indices: Tensor, scale: float, weights: Tensor, grad: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """`attend_backward` for all heads at once."""
    for rows, at, key, due in entry_chunks(q, k, indptr, indices):
        signed, g = weights[at] * due, grad[:, :, rows]
        along = torch.einsum("bhcd,bhckd->bhck", g, v.flatten(0, 2)[key])
        ds = signed.clamp_min(0) * (along - (signed.abs() * along).sum(-1, keepdim=True)) * scale
        dq[:, :, rows] = torch.einsum("bhck,bhckd->bhcd", ds, k.flatten(0, 2)[key])
        dk.view(-1, dk.shape[-1]).index_add_(0, key.flatten(), (ds[..., None] * q[:, :, rows, None]).flatten(0, 3))
        dv.view(-1, dv.shape[-1]).index_add_(0, key.flatten(), (signed.abs()[..., None] * g[:, :, :, None]).flatten(0, 3))
