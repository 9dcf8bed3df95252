"""Experts on two processes: the same numbers, and messages only for the assignments to networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moe_plus_plus_models import D, make

from fewer.language.moe_plus_plus.parallel import expert_parallel
from fewer.language.moe_plus_plus.router import heterogeneous_load_balance_loss, select
from house import on_two_processes


def shares_of_experts(rank: int, _: Path) -> None:
    x = torch.randn(20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    layer = make().eval()
    whole = layer(x)
    (expected,) = torch.autograd.grad(whole.hidden_states.square().sum(), x)
    shared: Any = expert_parallel(make().eval())
    out = shared(x)
    torch.testing.assert_close(out.hidden_states, whole.hidden_states, atol=1e-10, rtol=0)
    (gradient,) = torch.autograd.grad(out.hidden_states.square().sum(), x)
    torch.testing.assert_close(gradient, expected, atol=1e-9, rtol=0)
    # what went out: the rows for the other's experts, and the other's rows that were computed here
    asked = whole.stats.executed[: layer.num_ffn].reshape(2, -1).sum(1)
    both = [torch.zeros_like(asked) for _ in range(2)]
    dist.all_gather(both, asked)
    assert shared.experts.bytes_sent == int(both[rank][1 - rank] + both[1 - rank][rank]) * D * 8
    assert 0 < shared.experts.bytes_sent < 2 * 20 * 2 * D * 8  # not every assignment travels
    logits = whole.router_logits.detach()
    everywhere = [torch.zeros_like(logits) for _ in range(2)]
    dist.all_gather(everywhere, logits)
    joint = torch.cat(everywhere)
    together = heterogeneous_load_balance_loss(logits, select(logits, 2), 4, 0.75, group=dist.group.WORLD)
    torch.testing.assert_close(together, heterogeneous_load_balance_loss(joint, select(joint, 2), 4, 0.75))
    torch.testing.assert_close(make(global_balance=True).eval()(x).aux_loss, together)


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    on_two_processes(shares_of_experts, tmp_path)
