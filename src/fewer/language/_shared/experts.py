"""Experts of a mixture: each one's tokens, and each one's weights, lie one after the other, so that it multiplies contiguous slices."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.errors import require


def by_expert(expert: Int64[Tensor, "A"], experts: int) -> tuple[Int64[Tensor, "A"], list[int]]:
    """(the places of the assignments expert by expert, in their order within each; how many each expert has).

    >>> order, counts = by_expert(torch.tensor([2, 0, 2, 0]), 3)
    >>> order.tolist(), counts
    ([1, 3, 0, 2], [2, 0, 2])
    """
    return torch.argsort(expert, stable=True), torch.bincount(expert, minlength=experts).tolist()


class GatedExperts(nn.Module):
    """SwiGLU experts of one size: E_e(x) = W_down_e (SiLU(W_gate_e x) * W_value_e x).

    An expert without rows takes part with none: its gradient is zero, and not absent, as data-parallel training needs it.

    Args:
        experts, hidden_size, intermediate_size: E, D and I.

    Attributes:
        up_proj: [E, 2I, D], the gate's rows first.
        down_proj: [E, D, I].
    """

    def __init__(self, experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as torch's Linear would be."""
        for weight in (self.up_proj, self.down_proj):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, rows: Float[Tensor, "A D"], counts: Sequence[int]) -> Float[Tensor, "A D"]:
        """Rows that are sorted by expert, `counts` of them for each.

        The weights are taken apart once (`unbind`): a select for each expert would give a gradient of all experts' size each time.
        """
        if rows.is_cuda and rows.dtype == torch.bfloat16:
            return self.grouped(rows, counts)
        return torch.cat(
            [
                self._expert(part, up, down)
                for part, up, down in zip(rows.split(list(counts)), self.up_proj.unbind(), self.down_proj.unbind(), strict=True)
            ]
        )

    def grouped(self, rows: Float[Tensor, "A D"], counts: Sequence[int]) -> Float[Tensor, "A D"]:
        """The same by torch's grouped products: one launch for all experts, on a GPU that has them."""
        ends = torch.tensor(counts, device=rows.device).cumsum(0).int()
        gate, value = F.grouped_mm(rows, self.up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        return F.grouped_mm(F.silu(gate) * value, self.down_proj.transpose(1, 2), offs=ends)

    @staticmethod
    def _expert(rows: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gate, value = F.linear(rows, up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, down)

    def extra_repr(self) -> str:
        experts, double, hidden = self.up_proj.shape
        return f"{experts} x ({hidden} -> {double // 2} -> {hidden})"


def over_active_experts(
    x: Float[Tensor, "T d"],
    gates: Float[Tensor, "T E"],
    active: Bool[Tensor, "T E"],
    hidden: Callable[[Tensor, int], Tensor],
    down: Float[Tensor, "E e d"],
) -> Float[Tensor, "T d"]:
    """y_t = sum_i gates_ti hidden_i(x_t) down_i, over the experts that any of the tokens activates; the weights of others are not read.

    All tokens pass each of these experts in one product (a few tokens cost what one does: the weights are what takes time); a gate of zero
    takes out what a token did not ask for.

    Args:
        hidden: (x, expert) -> [T, e], what the expert holds between its two maps.
        down: [E, e, d], each expert's rows contiguous.
    """
    y = torch.zeros_like(x)
    for expert in active.any(0).nonzero().flatten().tolist():
        y.addmm_(hidden(x, expert) * gates[:, expert, None], down[expert])
    return y


def of_one_token(
    x: Float[Tensor, "1 d"],
    gates: Float[Tensor, "1 E"],
    active: Bool[Tensor, "1 E"],
    up: Float[Tensor, "E e d"],
    act: Callable[[Tensor], Tensor],
    down: Float[Tensor, "E e d"],
) -> Float[Tensor, "1 d"]:
    """`over_active_experts` for a single token on a CPU, hidden_i(x) = act(up_i x), without a gradient: at the pace of memory.

    Both maps are read row by row: dot products with the rows of up, and a weighted sum of the rows of down.
    """
    from fewer.language._shared.row_kernels import row_products

    size, threads = down.shape[1], torch.get_num_threads()
    chosen = active[0].nonzero()[:, 0]
    hidden = act(row_products(up, chosen, x[0])) * gates[0, chosen, None]
    rows = (size * chosen[:, None] + torch.arange(size)).flatten()
    shares = torch.arange(threads) * len(rows) // threads  # a bag is a thread's
    return F.embedding_bag(rows, down.flatten(0, 1), shares, mode="sum", per_sample_weights=hidden.flatten()).sum(0, keepdim=True)


def triton_kernel(weight: Tensor) -> Callable[..., Tensor]:
    """`expert_kernels.union_experts`; RuntimeError where Triton cannot run on a weight's device."""
    if not (weight.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        raise RuntimeError(
            f"kernel is 'triton' and the weights are on {weight.device}; expected a GPU (or Triton's interpreter): "
            "move the model there, or use kernel='auto'"
        )
    require("triton", "language")
    from fewer.language._shared.expert_kernels import union_experts

    return union_experts
