"""Constant sparse matrices (adjacencies, bags of words) times dense ones, with the transpose at hand for the gradient."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """A constant matrix [rows, columns] in compressed rows (torch's sparse CSR)."""

    csr: Tensor

    @classmethod
    def of_entries(
        cls, rows: Int[Tensor, "entries"], columns: Int[Tensor, "entries"], values: Float[Tensor, "entries"], shape: tuple[int, int]
    ) -> SparseMatrix:
        """The matrix with these entries; those at one place are summed."""
        coordinates = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, shape, check_invariants=False).coalesce()
        return cls(_compressed(coordinates))

    @classmethod
    def of_dense(cls, dense: Float[Tensor, "rows columns"]) -> SparseMatrix:
        """The same matrix without its zeros."""
        return cls(_compressed(dense))

    @functools.cached_property
    def transposed(self) -> Tensor:
        """The transpose in compressed rows: what a gradient is multiplied with."""
        return _compressed(self.csr.to_sparse_coo().t().coalesce())

    def select(self, rows: Int[Tensor, "chosen"]) -> SparseMatrix:
        """The matrix of these rows, in this order."""
        starts, columns, values = self.csr.crow_indices(), self.csr.col_indices(), self.csr.values()
        counts = (starts[1:] - starts[:-1])[rows]
        new_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        entries = torch.repeat_interleave(starts[rows] - new_starts[:-1], counts) + torch.arange(int(new_starts[-1]), device=rows.device)
        shape = (len(rows), self.csr.shape[1])
        return SparseMatrix(_quietly(torch.sparse_csr_tensor, new_starts, columns[entries], values[entries], shape, check_invariants=False))


def sparse_product(matrix: SparseMatrix, dense: Float[Tensor, "columns width"]) -> Float[Tensor, "rows width"]:
    """matrix @ dense; the gradient with respect to `dense` is matrix^T @ that of the product. Nothing dense is kept for it."""
    return _SparseProduct.apply(matrix, dense)  # pyright: ignore[reportReturnType] - torch's stubs say Any | None


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: SparseMatrix, dense: Tensor) -> Tensor:
        ctx.matrix = matrix
        return matrix.csr @ dense

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, ctx.matrix.transposed @ gradients[0]


def _compressed(matrix: Tensor) -> Tensor:
    return _quietly(matrix.to_sparse_csr)


def _quietly(make: Any, *arguments: Any, **settings: Any) -> Tensor:
    """Without torch's notice that compressed rows are in beta state: what is used here is tested here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)", UserWarning)
        return make(*arguments, **settings)
