"""The Cholesky factor of M = lambda m I + G G^T while the oldest gradient is replaced by a new one, in O(m^2). Not in the paper.

M is ordered by age. Deleting its first row and column leaves C = L22 L22^T + l21 l21^T, whose factor comes from L22 by a rank-one
update with l21 (Givens rotations, each of which can only raise a pivot); the new row is appended at the end by one triangular solve.
The factor is kept as its transpose U (upper triangular, M = U^T U), so that the loops run along rows.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

SMALLEST_PIVOT = 1e-10  # of the largest, as squares on the diagonal of U: below it an update has too few digits left
TOLD_APART = 1e-12  # of the largest: below it a factorisation has too few, too


def factorise(matrix: Float[Tensor, "m m"], floor: float) -> Float[Tensor, "m m"]:
    """U with U^T U = M, for a symmetric float64 matrix whose eigenvalues are known to be at least `floor` > 0.

    Eigenvalues that float64 cannot tell well from 0 beside the largest are raised to the least that it can (and to the floor): M is then
    that of a larger damping. It happens where damping * m is below about 1e-12 of the largest squared gradient.

    Examples:
        >>> upper = factorise(torch.tensor([[4.0, 2.0], [2.0, 5.0]]).double(), floor=1e-3)
        >>> upper
        tensor([[2., 1.], [0., 2.]], dtype=torch.float64)
    """
    upper, failed = torch.linalg.cholesky_ex(matrix, upper=True)
    if not failed and not bool(too_close_to_singular(upper[None])):
        return upper.contiguous()
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    raised = eigenvalues.clamp(min=max(floor, TOLD_APART * float(eigenvalues[-1])))
    triangle = torch.linalg.qr(raised.sqrt()[:, None] * vectors.T, mode="r").R
    return (triangle * torch.where(triangle.diagonal() < 0, -1.0, 1.0)[:, None]).contiguous()


def too_close_to_singular(factors: Float[Tensor, "k m m"]) -> Bool[Tensor, "k"]:
    """Which of several triangular factors have a pivot that float64 cannot tell well from 0 beside the largest."""
    pivots = factors.diagonal(dim1=1, dim2=2).square()
    return pivots.amin(1) <= TOLD_APART * pivots.amax(1)


def replace_oldest(upper: Float[Tensor, "m m"], newest: Float[Tensor, "m"]) -> bool:
    """Change U in place: M loses its first row and column and gets `newest` (products with those that stay, by age, then its own) as its last.

    Returns:
        Whether the new pivot can be trusted; False asks for a fresh `factorise`.

    Examples:
        >>> upper = torch.tensor([[2.0, 1.0], [0.0, 2.0]]).double()  # of [[4, 2], [2, 5]]
        >>> replace_oldest(upper, torch.tensor([1.0, 3.0]).double())
        True
        >>> upper.T @ upper
        tensor([[5.0000, 1.0000], [1.0000, 3.0000]], dtype=torch.float64)
    """
    pivot = _replace_oldest(upper.numpy(), newest.numpy())
    largest = float(upper.diagonal().square().max())
    return math.isfinite(pivot) and pivot > SMALLEST_PIVOT * largest


@numba.njit(cache=True, fastmath={"contract"})
def _replace_oldest(upper, newest):  # pragma: no cover - compiled
    m = len(upper)
    spike = upper[0, 1:].copy()  # l21
    for k in range(m - 1):
        below = upper[k + 1]
        radius = math.sqrt(below[k + 1] ** 2 + spike[k] ** 2)
        cosine, sine = below[k + 1] / radius, spike[k] / radius
        row = upper[k]
        row[k] = radius
        for i in range(k + 1, m - 1):
            held = below[i + 1]
            row[i] = cosine * held + sine * spike[i]
            spike[i] = cosine * spike[i] - sine * held
    last = newest.copy()  # U^T last = newest, solved row by row
    for k in range(m - 1):
        last[k] /= upper[k, k]
        for i in range(k + 1, m - 1):
            last[i] -= last[k] * upper[k, i]
    pivot = newest[m - 1]
    for k in range(m - 1):
        pivot -= last[k] ** 2
        upper[k, m - 1] = last[k]
        upper[m - 1, k] = 0.0
    upper[m - 1, m - 1] = math.sqrt(pivot) if pivot > 0 else 0.0
    return pivot


def solve(upper: Float[Tensor, "m m"], right: Float[Tensor, "m"]) -> Float[Tensor, "m"]:
    """M^{-1} b by the two triangular solves with U.

    Examples:
        >>> solve(torch.tensor([[2.0, 1.0], [0.0, 2.0]]).double(), torch.tensor([8.0, 8.0]).double())
        tensor([1.5000, 1.0000], dtype=torch.float64)
    """
    return torch.cholesky_solve(right[:, None], upper, upper=True)[:, 0]


def last_column_of_inverse(upper: Float[Tensor, "m m"]) -> Float[Tensor, "m"]:
    """M^{-1} e_m: as U^{-T} e_m = e_m / U_mm, one triangular solve is left.

    Examples:
        >>> last_column_of_inverse(torch.tensor([[2.0, 1.0], [0.0, 2.0]]).double())
        tensor([-0.1250,  0.2500], dtype=torch.float64)
    """
    return torch.from_numpy(_last_column(upper.numpy()))


@numba.njit(cache=True, fastmath={"reassoc", "contract"})
def _last_column(upper):  # pragma: no cover - compiled
    m = len(upper)
    column = np.zeros(m)
    column[m - 1] = 1 / upper[m - 1, m - 1] ** 2
    for k in range(m - 2, -1, -1):
        rest = 0.0
        for i in range(k + 1, m):
            rest += upper[k, i] * column[i]
        column[k] = -rest / upper[k, k]
    return column


def as_factor(matrix: np.ndarray | Tensor) -> Tensor:
    """A matrix as a contiguous float64 tensor on the CPU, in memory of its own."""
    return torch.as_tensor(matrix, dtype=torch.float64, device="cpu").clone().contiguous()
