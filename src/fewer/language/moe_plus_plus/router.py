"""MoE++'s router and the rules around it: gating residuals, gate values, the heterogeneous balance loss and capacity.

Source: MoE++, arXiv 2410.07348, section 3. N = N_FFN + N_ZC experts, those with a feed-forward network first; K are selected for a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_positive, check_whole

Gating = Literal["paper", "renorm", "released"]
Priority = Literal["position", "score"]
HALF = (torch.float16, torch.bfloat16)


class PathwayRouter(nn.Module):
    """G^j = W^j x + W_g^j G^(j-1): the logits of a layer, which know those of the layer before.

    Logits are float32 (float64 in a float64 model), under autocast too, and the weights keep that precision when a model is made half:
    in bfloat16 the second and third expert of a token change places.

    Args:
        kind: "linear" is the paper's W; "mlp" is W2 tanh(W1 x) with 8 N hidden units, which the released model uses.
        gate_residual: whether there is a W_g; the first mixture of a model has none.
    """

    def __init__(self, hidden_size: int, experts: int, kind: Literal["linear", "mlp"] = "linear", gate_residual: bool = True) -> None:
        super().__init__()
        if kind == "linear":
            self.wg: nn.Module = nn.Linear(hidden_size, experts, bias=False)
        else:
            self.wg = nn.Sequential(nn.Linear(hidden_size, 8 * experts, bias=False), nn.Tanh(), nn.Linear(8 * experts, experts, bias=False))
        self.gate_map = nn.Linear(experts, experts, bias=False) if gate_residual else None
        if self.gate_map is not None:
            nn.init.normal_(self.gate_map.weight, std=0.02)  # the paper names none; as the other matrices of a model

    def forward(self, x: Float[Tensor, "T D"], residual: Float[Tensor, "T N"] | None) -> Float[Tensor, "T N"]:
        with torch.autocast(x.device.type, enabled=False):
            own = self.wg(x.to(next(self.parameters()).dtype))
            if self.gate_map is None or residual is None:
                return own
            return own + self.gate_map(residual.to(own.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PathwayRouter:
        def whole(weight: Tensor) -> Tensor:
            made = fn(weight)
            return weight.to(made.device) if made.dtype in HALF else made

        return super()._apply(whole, recurse)


def select(logits: Float[Tensor, "T N"], top_k: int) -> Int64[Tensor, "T K"]:
    """The K experts of each token, the largest logit first; of equal ones the lower index.

    >>> select(torch.tensor([[1.0, 2.0, 2.0]]), 2).tolist()
    [[1, 2]]
    """
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]


def gate_values(
    logits: Float[Tensor, "T N"], selected: Int64[Tensor, "T K"], gating: Gating, zeros: int, floor: float = 1e-9
) -> Float[Tensor, "T K"]:
    """What each selected expert's output is multiplied by; `zeros` of the last experts are zero experts.

    "paper": softmax over all experts, not renormalised. "renorm": divided by the K values' sum, as Mixtral does. "released": the zero
    experts' values are set to 0 before that, so that a zero expert's partner gets all of the weight.
    """
    values = logits.softmax(-1).gather(-1, selected)
    if gating == "paper":
        return values
    if gating == "released":
        values = values.masked_fill(selected >= logits.shape[-1] - zeros, 0.0)
    return values / values.sum(-1, keepdim=True).clamp_min(floor)


def heterogeneous_capacity(num_assignments: int, num_ffn: int, num_zc: int, tau: float, gamma: float) -> tuple[int, int]:
    """(C_FFN, C_ZC): how many assignments an expert of each kind takes in training, of `num_assignments` in the batch.

    The paper prints the tokens T in place of the assignments K T, which would drop almost half of them at K = 2.

    >>> heterogeneous_capacity(2048, 8, 4, 0.75, 1.1)
    (169, 226)
    """
    check_whole(0, num_assignments=num_assignments, num_zc=num_zc)
    check_whole(num_ffn=num_ffn)
    check_tau(tau)
    check_positive(capacity_factor=gamma)
    share = gamma * num_assignments / (tau * num_ffn + num_zc)
    return tuple(math.ceil(part - 1e-9) for part in (tau * share, share))  # 165.00000000000003 is 165  # pyright: ignore[reportReturnType]


def check_tau(tau: float) -> None:
    if not 0 < tau <= 1:
        raise ValueError(f"tau is {tau}; expected a number above 0 and at most 1: 1 treats all experts alike")


def within_capacity(
    selected: Int64[Tensor, "T K"],
    values: Float[Tensor, "T K"],
    capacity: Int64[Tensor, "N"],
    priority: Priority,
    token_mask: Bool[Tensor, "T"],
) -> Bool[Tensor, "T K"]:
    """Which assignments are served: of each expert the first `capacity`, by the token's position or by the gate value, larger first."""
    experts = len(capacity)
    expert = selected.masked_fill(~token_mask[:, None], experts).flatten()  # what is masked asks nobody
    first = (
        values.detach().flatten().argsort(descending=True, stable=True)
        if priority == "score"
        else torch.arange(len(expert), device=expert.device)
    )
    order = first[expert[first].argsort(stable=True)]
    sorted_expert = expert[order]
    counts = torch.bincount(sorted_expert, minlength=experts + 1)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[sorted_expert]
    served = rank < F.pad(capacity, (0, 1))[sorted_expert]
    return torch.empty_like(served).index_copy_(0, order, served).reshape(selected.shape)


def heterogeneous_load_balance_loss(
    router_logits: Float[Tensor, "T N"],
    selected: Int64[Tensor, "T K"],
    num_ffn: int,
    tau: float,
    token_mask: Bool[Tensor, "T"] | None = None,
    group: Any = None,
) -> Float32[Tensor, ""]:
    """L_b = sum_i eta_i f_i P_i with eta_i = 1 for experts with a network and tau for those without.

    f_i is the share of tokens that select i, before any of them is dropped (a constant for autograd; they sum to K), P_i the mean of
    softmax(G)_i. Descending it drives the assignments towards 1/eta_i: a share tau N_FFN / (tau N_FFN + N_ZC) of them to networks.

    Args:
        router_logits: G, float32 or float64.
        selected: the experts of each token.
        token_mask: True for tokens that count; without any the loss is 0.
        group: a torch.distributed group over which f and P are taken together; None keeps them local.
    """
    experts = router_logits.shape[-1]
    valid = torch.ones(len(selected), dtype=torch.bool, device=selected.device) if token_mask is None else token_mask
    load = F.one_hot(selected, experts).sum(1).to(router_logits.dtype).mul(valid[:, None]).sum(0)
    probability = router_logits.softmax(-1).masked_fill(~valid[:, None], 0.0).sum(0)
    tokens = valid.sum().to(router_logits.dtype)
    if group is not None:
        load, probability, tokens = (_Sum.apply(part, group) for part in (load, probability, tokens))  # pyright: ignore[reportAssignmentType]
    eta = torch.full((experts,), tau, dtype=router_logits.dtype, device=router_logits.device)
    eta[:num_ffn] = 1.0
    tokens = tokens.clamp_min(1.0)
    return (eta * (load / tokens).detach() * (probability / tokens)).sum()


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs, so that a mean over processes of all gradients is the joint loss's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.group = group
        return _summed(part, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _summed(gradient, ctx.group), None


def _summed(part: Tensor, group: Any) -> Tensor:
    import torch.distributed as dist

    total = part.detach().clone()
    dist.all_reduce(total, group=group)
    return total
