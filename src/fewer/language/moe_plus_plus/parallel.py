"""Expert parallelism: each process holds some of the feed-forward experts, and only assignments to those travel.

Free experts, constants too, are on every process: what they get costs no message. Source: MoE++, arXiv 2410.07348, section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.language._shared.experts import GatedExperts, by_expert


class _AllToAll(torch.autograd.Function):
    """Rows to the other processes and from them; their gradients go the way back."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchange(gradient.contiguous(), ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    import torch.distributed as dist

    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class ParallelExperts(nn.Module):
    """This process' share of a mixture's feed-forward experts, in place of all of them.

    Attributes:
        bytes_sent: of rows, to other processes in forward passes so far (there and back).
    """

    def __init__(self, experts: GatedExperts, group: Any = None) -> None:
        import torch.distributed as dist

        super().__init__()
        count, double, hidden = experts.up_proj.shape
        self.group, self.rank, self.world = group, dist.get_rank(group), dist.get_world_size(group)
        if count % self.world:
            raise ValueError(f"{count} experts do not divide among {self.world} processes; expected a multiple: use another number of them")
        self.local = GatedExperts(count // self.world, hidden, double // 2).to(experts.up_proj)
        mine = slice(self.rank * count // self.world, (self.rank + 1) * count // self.world)
        with torch.no_grad():
            self.local.up_proj.copy_(experts.up_proj[mine])
            self.local.down_proj.copy_(experts.down_proj[mine])
        self.bytes_sent = 0

    def forward(self, rows: Float[Tensor, "A D"], counts: Sequence[int]) -> Float[Tensor, "A D"]:
        """As `GatedExperts`: rows sorted by expert, over all processes' experts."""
        asked = torch.tensor(counts, device=rows.device).reshape(self.world, -1)
        given = _exchange(asked, [1] * self.world, [1] * self.world, self.group)  # [from, my experts]
        sent, received = asked.sum(1).tolist(), given.sum(1).tolist()
        here: Any = _AllToAll.apply(rows, sent, received, self.group)
        expert = torch.arange(given.shape[1], device=rows.device).repeat(self.world).repeat_interleave(given.flatten())
        order, local = by_expert(expert, given.shape[1])
        out = self.local(here[order], local)[order.argsort()]
        away = len(rows) - sent[self.rank] + len(here) - received[self.rank]
        self.bytes_sent += away * rows.shape[1] * rows.element_size()
        return _AllToAll.apply(out, received, sent, self.group)  # pyright: ignore[reportReturnType]


def expert_parallel(model: nn.Module, group: Any = None) -> nn.Module:
    """Let each process of a torch.distributed group keep its share of the experts of every mixture in a model; changed in place.

    Raises:
        ValueError: the experts of a layer do not divide among the processes.
    """
    for module in model.modules():
        if isinstance(getattr(module, "experts", None), GatedExperts):
            module.experts = ParallelExperts(module.experts, group)  # pyright: ignore[reportArgumentType]
    return model
