"""The dynamic algorithm: the inverse of the empirical Fisher matrix of the last m gradients, kept up to date as gradients come.

F = lambda I + (1/m) G^T G and M = lambda m I + G G^T give (the paper's dynamic algorithm, said with one factor):

    F^{-1} x = (x - G^T M^{-1} G x) / lambda        F^{-1} g_j = m G^T M^{-1} e_j   for a gradient g_j of the window

The second line follows from the first, as G g_j = M e_j - lambda m e_j; it subtracts nothing, so a small lambda costs no digits.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch import distributed as dist

from fewer.checks import check_choice, check_positive, check_whole
from fewer.optimization.mfac.gradients import check_length, check_memory, wide
from fewer.optimization.mfac.window.factor import as_factor, factorise, last_column_of_inverse, replace_oldest, solve
from fewer.optimization.mfac.window.row_products import combination, put_row, row_products

STORAGE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class SlidingInverseFisher:
    """F^{-1} of the last `window` gradients, F = damping I + (1/m) sum of g g^T.

    A push costs O(d m + m^2), a product O(d m + m^2). The window starts with zeros that count: m is `window` from the first gradient
    on, as in the released code, so that early steps are damped. G is stored in `storage_dtype`, M and its factor in float64.

    Args:
        window: m, gradients kept.
        dim: d, entries of a gradient.
        damping: lambda > 0, the same unit as a squared gradient.
        storage_dtype: of G: float32, float64, bfloat16 or float16. A gradient is rounded to it before anything is computed from it.
        device: where products are returned; default the CPU.
        storage_device: where G is kept; default `device`.
        warm_window: m is the number of gradients seen while that is below `window` (not in the paper); until then every push
            factors M anew.
        process_group: G's columns are split over its members, each of which holds and gives its `dim` columns; m products are summed.

    Attributes:
        seen: gradients pushed so far.

    Raises:
        ValueError: a size, damping or dtype that cannot be used, or a window larger than the free memory.

    Examples:
        >>> window = SlidingInverseFisher(window=2, dim=3, damping=1.0)
        >>> for g in torch.eye(3):
        ...     window.push(g)
        >>> window @ torch.ones(3)  # F = I + diag(0, 1, 1) / 2
        tensor([1.0000, 0.6667, 0.6667])
        >>> window.push_and_apply(torch.tensor([2.0, 0.0, 0.0]))
        tensor([0.6667, 0.0000, 0.0000])
    """

    def __init__(
        self,
        window: int,
        dim: int,
        damping: float = 1e-5,
        storage_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        storage_device: torch.device | str | None = None,
        *,
        warm_window: bool = False,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        check_whole(window=window, dim=dim)
        check_positive(damping=damping)
        check_choice(STORAGE, storage_dtype=storage_dtype)
        self.window, self.dim, self.damping, self.warm_window = window, dim, float(damping), warm_window
        self.device = torch.device(device or "cpu")
        self.process_group = process_group
        place = torch.device(storage_device) if storage_device is not None else self.device
        check_memory(window, dim, storage_dtype, place)
        self.seen = 0
        self._grads = torch.zeros(window, dim, dtype=storage_dtype, device=place)
        self._gram = torch.zeros(window, window, dtype=torch.float64)  # S = G G^T, by place in the ring
        self._replaced = 0  # since the last factorisation
        self._upper = self._factorise()

    @property
    def storage_dtype(self) -> torch.dtype:
        """Of the gradients kept."""
        return self._grads.dtype

    @property
    def bytes(self) -> int:
        """What the window holds: the gradients, their Gram matrix and its factor."""
        return sum(held.numel() * held.itemsize for held in (self._grads, self._gram, self._upper))

    @property
    def m(self) -> int:
        """Gradients that F's mean is taken over."""
        return min(self.seen, self.window) or 1 if self.warm_window else self.window

    @torch.no_grad()
    def push(self, g: Float[Tensor, "d"]) -> None:
        """Put a gradient into the window in place of the oldest.

        Raises:
            ValueError: g has another length.
            FloatingPointError: g has a NaN or infinite entry (or one too large for the storage); the window stays as it was.
        """
        check_length(g, self.dim)
        stored = g.detach().to(self._grads.device, self._grads.dtype)
        row = torch.cat([row_products(self._grads, stored), row_products(stored[None], stored)])
        row = self._sum_over_group(row)
        if not bool(row.isfinite().all()):
            raise FloatingPointError(
                f"the gradient has a NaN or infinite value (in {stored.dtype}); the window is left as it was: skip the step, or lower the loss scale"
            )
        slot = self.seen % self.window
        row[slot] = row[-1]
        put_row(self._grads, slot, stored)
        self._gram[slot] = self._gram[:, slot] = row[:-1]
        self.seen += 1
        self._update_factor(slot)

    @torch.no_grad()
    def __matmul__(self, x: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
        """F^{-1} x, in x's dtype, float32 at least, on `device`.

        Raises:
            ValueError: x has another length.
        """
        check_length(x, self.dim)
        weights = solve(self._upper, self._sum_over_group(row_products(self._grads, x))[self._by_age()])
        rest = x.detach().to(self._grads.device).double() - self._combine(weights)
        return rest.div_(self.damping).to(self.device, wide(x.dtype))

    @torch.no_grad()
    def push_and_apply(self, g: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
        """Push g, then F^{-1} g for g as stored: the products with the window are the new Gram row, so that G is read twice, not thrice.

        Raises:
            ValueError, FloatingPointError: as `push`.
        """
        self.push(g)
        return self._combine(self.m * last_column_of_inverse(self._upper), wide(g.dtype)).to(self.device)

    def _combine(self, weights: Float[Tensor, "m"], dtype: torch.dtype = torch.float64) -> Float[Tensor, "d"]:
        """G^T y for weights by age."""
        by_slot = torch.zeros(self.window, dtype=torch.float64)
        by_slot[self._by_age()] = weights
        return combination(self._grads, by_slot, dtype)

    def _sum_over_group(self, products: Tensor) -> Tensor:
        """The members' parts of the products, summed: the only numbers that travel."""
        if self.process_group is not None:
            dist.all_reduce(products, group=self.process_group)
        return products

    def _by_age(self) -> Tensor:
        """The places of the window's gradients in the ring, oldest first."""
        if self.warm_window and self.seen < self.window:
            return torch.arange(self.m)
        return (torch.arange(self.window) + self.seen) % self.window

    def _factorise(self) -> Tensor:
        """U of M = lambda m I + S, gradients by age, from the Gram matrix kept."""
        self._replaced = 0
        order = self._by_age()
        matrix = self._gram[order][:, order]
        matrix.diagonal().add_(self.damping * self.m)
        return factorise(matrix, floor=self.damping * self.m)

    def _update_factor(self, slot: int) -> None:
        """Bring U up to date after the gradient at `slot` was replaced; anew every m replacements, so that rounding does not pile up."""
        filling = self.warm_window and self.seen <= self.window
        self._replaced += 1
        if not filling and self._replaced < self.window:
            newest = self._gram[slot][self._by_age()]
            newest[-1] += self.damping * self.m
            if replace_oldest(self._upper, newest):
                return
        self._upper = self._factorise()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next product depends on, as tensors and plain numbers."""
        return {
            "window": self.window,
            "dim": self.dim,
            "damping": self.damping,
            "warm_window": self.warm_window,
            "seen": self.seen,
            "replaced": self._replaced,
            "grads": self._grads.clone(),
            "gram": self._gram.clone(),
            "upper": self._upper.clone(),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """ValueError unless the state is of a window of the same size, damping and storage."""
        ours = {"window": self.window, "dim": self.dim, "damping": self.damping, "warm_window": self.warm_window}
        for name, value in ours.items():
            if state[name] != value:
                raise ValueError(f"the state has {name}={state[name]}, this window {name}={value}; build it with the state's own first")
        if state["grads"].dtype != self._grads.dtype:
            raise ValueError(
                f"the state's gradients are {state['grads'].dtype}, this window's {self._grads.dtype}; build it with that storage_dtype"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave, bit for bit.

        Raises:
            ValueError: the state is of another window, dim, damping or storage dtype; nothing is changed.
        """
        self.check_state(state)
        self._grads.copy_(state["grads"])
        self._gram.copy_(state["gram"])
        self._upper = as_factor(state["upper"])
        self.seen, self._replaced = state["seen"], state["replaced"]
