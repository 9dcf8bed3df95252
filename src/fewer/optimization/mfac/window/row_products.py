"""The two products that everything rests on: G x and G^T y for a matrix G of m gradients as rows, with all sums in float64.

G may be stored in float32, bfloat16 or float16; a float32 product is exact in float64, so nothing is lost beyond the storage. On a
CPU the loops are numba's, over tiles of columns that a cache holds, in as many threads as torch uses; the sums are taken tile by
tile in one order, so the result does not depend on the number of threads. On a GPU a Triton kernel reads G (float32 sums in a tile).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

TILE = 16384  # columns at most: 128 KB of float64, which a second-level cache holds while all rows pass by
QUICK = 1 << 21  # entries of G below which waking a second thread costs more than it saves
HAS_TRITON = importlib.util.find_spec("triton") is not None


def row_products(grads: Float[Tensor, "m d"], x: Float[Tensor, "d"]) -> Float[Tensor, "m"]:
    """G x, in float64 on the CPU.

    Examples:
        >>> row_products(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([1.0, 1.0]))
        tensor([3., 3.], dtype=torch.float64)
    """
    if _in_numba(grads):
        rows, vector, width = grads.numpy(), _as_floats(x), _width(grads)
        partial = np.empty((_tiles(grads), len(grads)))
        _over_tiles(lambda tile: _products_of_tile(rows, vector, tile, width, partial), grads)
        return torch.from_numpy(partial.sum(0))
    if _in_triton(grads):
        from fewer.optimization.mfac.window.kernels import fused_products

        return fused_products(grads, x=x)[0].cpu()
    total = torch.zeros(len(grads), dtype=torch.float64, device=grads.device)
    for tile, part in zip(grads.split(TILE, dim=1), x.to(grads.device).split(TILE), strict=True):
        total += tile.double() @ part.double()
    return total.cpu()


def combination(grads: Float[Tensor, "m d"], y: Float[Tensor, "m"], dtype: torch.dtype = torch.float64) -> Float[Tensor, "d"]:
    """G^T y, on G's device, in `dtype` (summed in float64, where Triton reads G in float32).

    Examples:
        >>> combination(torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([1.0, 1.0]))
        tensor([1., 5.], dtype=torch.float64)
    """
    if _in_numba(grads):
        rows, weights, width = grads.numpy(), y.detach().to("cpu", torch.float64).contiguous().numpy(), _width(grads)
        out = np.empty(grads.shape[1], np.float32 if dtype == torch.float32 else np.float64)
        _over_tiles(lambda tile: _combine_tile(rows, weights, tile, width, out), grads)
        return torch.from_numpy(out).to(dtype)
    if _in_triton(grads):
        from fewer.optimization.mfac.window.kernels import fused_products

        return fused_products(grads, y=y)[1].to(dtype)
    weights = y.to(grads.device, torch.float64)
    return torch.cat([tile.double().T @ weights for tile in grads.split(TILE, dim=1)]).to(dtype)


def put_row(grads: Float[Tensor, "m d"], place: int, row: Float[Tensor, "d"]) -> None:
    """Write one gradient, of G's dtype and device, over another."""
    if _in_numba(grads):
        grads.numpy()[place] = row.numpy()  # one thread: torch's would go on turning beside those of the products (see `_over_tiles`)
    else:
        grads[place] = row


def _in_numba(grads: Tensor) -> bool:
    return grads.device.type == "cpu" and grads.dtype in (torch.float32, torch.float64) and grads.stride(1) == 1


def _in_triton(grads: Tensor) -> bool:
    return grads.device.type == "cuda" and grads.dtype != torch.float64 and HAS_TRITON


def _width(grads: Tensor) -> int:
    """Columns of a tile: the number of tiles is a multiple of 8, so that threads get equal shares."""
    d = grads.shape[1]
    return -(-d // (8 * -(-d // (8 * TILE))))


def _tiles(grads: Tensor) -> int:
    return -(-grads.shape[1] // _width(grads))


@functools.cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="mfac")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.cache_clear)  # a forked child has none of its parent's threads


def _over_tiles(work: Callable[[int], None], grads: Tensor) -> None:
    """Call `work(tile)` for every tile, in this thread and in others beside it, which take tile after tile from one list.

    Waking a thread takes longer than a tile, so this one does not wait for it; and no loop of torch runs before or between, whose
    OpenMP threads go on turning for a while and would hold the other cores.
    """
    left = iter(range(_tiles(grads)))
    helpers = min(torch.get_num_threads(), _tiles(grads)) - 1 if grads.numel() >= QUICK else 0

    def work_off() -> None:
        for tile in left:
            work(tile)

    waiting = [_workers(helpers).submit(work_off) for _ in range(helpers)]
    work_off()
    for helper in waiting:
        if not helper.cancel():  # where it never came to begin, nothing is left to wait for
            helper.result()


def _as_floats(x: Tensor) -> np.ndarray:
    """x as it is where it is float32 or float64: tiles of it become float64 where they are used."""
    x = x.detach()
    return (x if x.dtype in (torch.float32, torch.float64) else x.double()).cpu().contiguous().numpy()


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _products_of_tile(rows, x, tile, width, partial):  # pragma: no cover - compiled
    """partial[tile, k] = the part of (G x)_k that the tile's columns give; four rows at a time."""
    m, d = rows.shape
    start, end = tile * width, min(d, (tile + 1) * width)
    part = x[start:end].astype(np.float64)
    k = 0
    while k + 4 <= m:
        a, b, c, e = rows[k, start:end], rows[k + 1, start:end], rows[k + 2, start:end], rows[k + 3, start:end]
        sa, sb, sc, se = 0.0, 0.0, 0.0, 0.0
        for i in range(end - start):
            xi = part[i]
            sa += np.float64(a[i]) * xi
            sb += np.float64(b[i]) * xi
            sc += np.float64(c[i]) * xi
            se += np.float64(e[i]) * xi
        partial[tile, k], partial[tile, k + 1], partial[tile, k + 2], partial[tile, k + 3] = sa, sb, sc, se
        k += 4
    while k < m:
        a = rows[k, start:end]
        total = 0.0
        for i in range(end - start):
            total += np.float64(a[i]) * part[i]
        partial[tile, k] = total
        k += 1


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
def _combine_tile(rows, y, tile, width, out):  # pragma: no cover - compiled
    """out[i] = (G^T y)_i for the tile's columns, summed in float64; four rows at a time."""
    m, d = rows.shape
    start, end = tile * width, min(d, (tile + 1) * width)
    total = np.zeros(end - start)
    k = 0
    while k + 4 <= m:
        a, b, c, e = rows[k, start:end], rows[k + 1, start:end], rows[k + 2, start:end], rows[k + 3, start:end]
        ya, yb, yc, ye = y[k], y[k + 1], y[k + 2], y[k + 3]
        for i in range(end - start):
            total[i] += ya * np.float64(a[i]) + yb * np.float64(b[i]) + yc * np.float64(c[i]) + ye * np.float64(e[i])
        k += 4
    while k < m:
        a = rows[k, start:end]
        yk = y[k]
        for i in range(end - start):
            total[i] += yk * np.float64(a[i])
        k += 1
    for i in range(end - start):
        out[start + i] = total[i]
