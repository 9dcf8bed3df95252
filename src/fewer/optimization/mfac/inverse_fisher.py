"""The static algorithm: the inverse of the empirical Fisher matrix F = lambda I + (1/m) G^T G of m gradients that stay as they are.

By Woodbury's identity everything needs one Cholesky factor of M = lambda m I + G G^T only:

    F^{-1} x = (x - G^T M^{-1} G x) / lambda          diag F^{-1} = (1 - columnwise |L^{-1} G|^2) / lambda

which is the same as the paper's recursion (`method="recursion"`), but made of matrix products. Blocks of consecutive weights are
independent; where a block has fewer weights than there are gradients, its own b x b matrix is the smaller one to factor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.checks import check_choice, check_positive, check_whole
from fewer.optimization.mfac.gradients import check_gradients, check_length, wide
from fewer.optimization.mfac.recursion import Recursion
from fewer.optimization.mfac.window.factor import factorise, too_close_to_singular

ROWS = 64  # of a symmetric product that are multiplied at a time
METHODS = ("cholesky", "recursion")
PIECE = 1 << 21  # entries in float64 at a time: 16 MB, which the allocator hands out again and caches hold in part


class BlockInverse(Protocol):
    """F^{-1} of all blocks of one size."""

    def product(self, x: Float[Tensor, "blocks b k"]) -> Float[Tensor, "blocks b k"]: ...
    def diagonal(self) -> Float[Tensor, "blocks b"]: ...
    def element(self, block: int, i: int, j: int) -> float: ...


def split_blocks(x: Float[Tensor, "rows d"], block_size: int) -> list[Float[Tensor, "blocks rows b"]]:
    """The columns as blocks of one size, and the last, smaller one; views, nothing is copied.

    Examples:
        >>> [tuple(part.shape) for part in split_blocks(torch.zeros(3, 11), 4)]
        [(2, 3, 4), (1, 3, 3)]
    """
    d = x.shape[1]
    whole = d // block_size
    head = x[:, : whole * block_size].unflatten(1, (whole, block_size)).transpose(0, 1) if whole else None
    tail = x[None, :, whole * block_size :] if d % block_size else None
    return [part for part in (head, tail) if part is not None]


def tiles(grads: Float[Tensor, "blocks m b"], chunk: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of at most `chunk` columns that are worked on at a time: several whole blocks, or part of one."""
    blocks, _, b = grads.shape
    at_once = max(1, chunk // b)
    for first in range(0, blocks, at_once):
        for start in range(0, b, chunk):
            yield slice(first, first + at_once), slice(start, start + chunk)


def self_products(rows: Float[Tensor, "blocks m k"]) -> Float[Tensor, "blocks m m"]:
    """R R^T of every block: only the lower half is multiplied out, the upper one is its mirror."""
    m = rows.shape[1]
    out = rows.new_empty(len(rows), m, m)
    for start in range(0, m, ROWS):
        end = min(m, start + ROWS)
        out[:, start:end, :end] = rows[:, start:end] @ rows[:, :end].mT
        out[:, :start, start:end] = out[:, start:end, :start].mT
    return out


def gram(grads: Float[Tensor, "blocks m b"], chunk: int) -> Float[Tensor, "blocks m m"]:
    """G G^T of every block in float64."""
    blocks, m, _ = grads.shape
    total = torch.zeros(blocks, m, m, dtype=torch.float64, device=grads.device)
    for which, columns in tiles(grads, min(chunk, max(1, PIECE // m))):
        total[which] += self_products(grads[which, :, columns].double())
    return total


def cholesky(matrices: Float[Tensor, "blocks n n"], shift: float) -> Float[Tensor, "blocks n n"]:
    """L of (matrix + shift I) for each, in place of the matrices."""
    matrices.diagonal(dim1=1, dim2=2).add_(shift)
    lower, failed = torch.linalg.cholesky_ex(matrices)
    for block in ((failed != 0) | too_close_to_singular(lower)).nonzero()[:, 0].tolist():
        lower[block] = factorise(matrices[block], floor=shift).T
    return lower


class GradientFactor:
    """F^{-1} by the m x m factors of M, for blocks of at least m weights."""

    def __init__(self, grads: Float[Tensor, "blocks m b"], damping: float, chunk: int) -> None:
        self.grads, self.damping, self.chunk = grads, damping, chunk
        self.lower = cholesky(gram(grads, chunk), damping * grads.shape[1])

    def product(self, x: Float[Tensor, "blocks b k"]) -> Float[Tensor, "blocks b k"]:
        """F^{-1} x = (x - G^T M^{-1} G x) / lambda."""
        blocks, m, _ = self.grads.shape
        products = torch.zeros(blocks, m, x.shape[2], dtype=torch.float64, device=x.device)
        for which, columns in tiles(self.grads, self.chunk):
            products[which] += self.grads[which, :, columns].double() @ x[which, columns].double()
        weights = torch.cholesky_solve(products, self.lower)
        out = x.double()
        out = out.clone() if out is x else out
        for which, columns in tiles(self.grads, self.chunk):
            out[which, columns] -= self.grads[which, :, columns].double().mT @ weights[which]
        return out.div_(self.damping)

    def diagonal(self) -> Float[Tensor, "blocks b"]:
        """(1 - columnwise |L^{-1} G|^2) / lambda."""
        blocks, _, b = self.grads.shape
        out = torch.empty(blocks, b, dtype=torch.float64, device=self.grads.device)
        for which, columns in tiles(self.grads, self.chunk):
            out[which, columns] = 1 - self._half(which, columns).square().sum(1)
        return out.div_(self.damping)

    def element(self, block: int, i: int, j: int) -> float:
        """[F^{-1}]_ij = ([i = j] - (L^{-1} G)_i . (L^{-1} G)_j) / lambda, O(m^2)."""
        which = slice(block, block + 1)
        left, right = (self._half(which, slice(index, index + 1))[0, :, 0] for index in (i, j))
        return ((i == j) - float(left @ right)) / self.damping

    def _half(self, which: slice, columns: slice) -> Tensor:
        """L^{-1} G for some columns."""
        return torch.linalg.solve_triangular(self.lower[which], self.grads[which, :, columns].double(), upper=False)


class WeightFactor:
    """F^{-1} = m (lambda m I + G^T G)^{-1} by the b x b factors of blocks with fewer weights than gradients."""

    def __init__(self, grads: Float[Tensor, "blocks m b"], damping: float, chunk: int) -> None:
        self.m = grads.shape[1]
        self.lower = cholesky(gram(grads.mT, chunk), damping * self.m)

    def product(self, x: Float[Tensor, "blocks b k"]) -> Float[Tensor, "blocks b k"]:
        return self.m * torch.cholesky_solve(x.double(), self.lower)

    def diagonal(self) -> Float[Tensor, "blocks b"]:
        unit = torch.eye(self.lower.shape[1], dtype=torch.float64, device=self.lower.device)
        parts = [self.m * torch.linalg.solve_triangular(lower, unit, upper=False).square().sum(0) for lower in self.lower]
        return torch.stack(parts)

    def element(self, block: int, i: int, j: int) -> float:
        unit = torch.zeros(self.lower.shape[1], 1, dtype=torch.float64, device=self.lower.device)
        unit[j] = self.m
        return float(torch.cholesky_solve(unit, self.lower[block])[i])


class InverseFisher:
    """F^{-1} of F = damping I + (1/m) sum of g g^T over the rows of `grads`: products, diagonal, elements; F itself is never formed.

    Args:
        grads: float tensor [m, d], a flattened gradient per row. Kept, not copied: leave it unchanged.
        damping: lambda > 0, in the unit of a squared gradient.
        block_size: b, consecutive weights that F couples; None couples all (b = d).
        method: "cholesky" (one factor per block, in float64), or "recursion" (the paper's, in the gradients' dtype, float32 at least).
        chunk: columns of G that are converted to float64 at a time.

    Attributes:
        m: gradients.
        d: weights.
        damping: lambda.

    Raises:
        ValueError: gradients that are not 2-d, empty or not finite (the row is named), or a setting that cannot be used.

    Examples:
        >>> fisher = InverseFisher(torch.tensor([[2.0, 0.0, 0.0]]), damping=1.0)
        >>> fisher @ torch.ones(3)  # F = diag(5, 1, 1)
        tensor([0.2000, 1.0000, 1.0000])
        >>> fisher.diagonal()
        tensor([0.2000, 1.0000, 1.0000])
        >>> round(fisher.element(0, 0), 6)
        0.2

    Source: arXiv 2107.03356, static algorithm; the factor in its place is not in the paper.
    """

    def __init__(
        self,
        grads: Float[Tensor, "m d"],
        damping: float = 1e-5,
        *,
        block_size: int | None = None,
        method: Literal["cholesky", "recursion"] = "cholesky",
        chunk: int = 65536,
    ) -> None:
        check_gradients(grads)
        check_positive(damping=damping)
        check_choice(METHODS, method=method)
        self.m, self.d = grads.shape
        self.damping, self.grads = float(damping), grads.detach()
        self.block_size = self.d if block_size is None else block_size
        check_whole(chunk=chunk, block_size=self.block_size)
        parts = split_blocks(self.grads, min(self.block_size, self.d))
        with torch.no_grad():
            self._parts: list[BlockInverse] = [self._inverse(part, method, chunk) for part in parts]
        sizes = [part.shape[0] * part.shape[2] for part in parts]
        self._shapes = [(part.shape[0], part.shape[2]) for part in parts]
        self._ends = [0, *itertools.accumulate(sizes)]

    def _inverse(self, part: Float[Tensor, "blocks m b"], method: str, chunk: int) -> BlockInverse:
        if method == "recursion":
            return Recursion(part, self.damping, chunk)
        return (GradientFactor if part.shape[2] >= self.m else WeightFactor)(part, self.damping, chunk)

    @torch.no_grad()
    def __matmul__(self, x: Float[Tensor, "d"] | Float[Tensor, "d k"]) -> Tensor:
        """F^{-1} x for a vector [d] or columns [d, k], in x's dtype, float32 at least; O(d m) a column.

        Raises:
            ValueError: x has another length.
        """
        check_length(x, self.d, columns=True)
        columns = x if x.ndim == 2 else x[:, None]
        done = [
            part.product(columns[start:end].unflatten(0, shape)).flatten(0, 1)
            for part, shape, start, end in zip(self._parts, self._shapes, self._ends[:-1], self._ends[1:], strict=True)
        ]
        return torch.cat(done).to(wide(x.dtype)).view(x.shape)

    def solve(self, right: Float[Tensor, "d k"]) -> Float[Tensor, "d k"]:
        """F^{-1} X for many right-hand sides at once, by matrix products; the same as `self @ X`."""
        return self @ right

    @torch.no_grad()
    def diagonal(self) -> Float[Tensor, "d"]:
        """The diagonal of F^{-1}, in the gradients' dtype, float32 at least; O(d m^2) by the factor, O(d m) by the recursion."""
        return torch.cat([part.diagonal().flatten() for part in self._parts]).to(wide(self.grads.dtype))

    @torch.no_grad()
    def element(self, i: int, j: int) -> float:
        """[F^{-1}]_ij; 0 where i and j lie in different blocks.

        Raises:
            ValueError: an index outside 0..d-1.
        """
        for index in (i, j):
            if not 0 <= index < self.d:
                raise ValueError(f"element ({i}, {j}): index {index} is out of range; expected 0..{self.d - 1}")
        if i // self.block_size != j // self.block_size:
            return 0.0
        part = 0 if i < self._ends[1] else 1
        b = self._shapes[part][1]
        block = (i - self._ends[part]) // b
        return self._parts[part].element(block, (i - self._ends[part]) % b, (j - self._ends[part]) % b)
