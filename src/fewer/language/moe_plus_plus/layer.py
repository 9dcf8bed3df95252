"""The layer: experts with a feed-forward network, and experts that cost nothing (a learned vector, a copy of the input, zero).

Source: MoE++, arXiv 2410.07348, section 3 (eq. 3 to 10); order of the experts and layout of the weights as in the released model.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from fewer.checks import check_choice, check_positive, check_whole
from fewer.language._shared.experts import GatedExperts, by_expert
from fewer.language.moe_plus_plus.router import (
    Gating,
    PathwayRouter,
    Priority,
    check_tau,
    gate_values,
    heterogeneous_capacity,
    heterogeneous_load_balance_loss,
    select,
    within_capacity,
)


class MoEPlusPlusStats(NamedTuple):
    """What a layer did with a batch.

    Attributes:
        tokens: that were not masked.
        load: [N] assignments to each expert, before capacity.
        executed: [N] of which were served.
    """

    tokens: int
    load: Int64[Tensor, "N"]
    executed: Int64[Tensor, "N"]
    num_ffn: int

    @property
    def ffn_before(self) -> float:
        """Assignments to feed-forward experts a token, before capacity."""
        return self.load[: self.num_ffn].sum().item() / max(1, self.tokens)

    @property
    def ffn_after(self) -> float:
        """Assignments to feed-forward experts a token that were computed."""
        return self.executed[: self.num_ffn].sum().item() / max(1, self.tokens)

    @property
    def drop_rate(self) -> float:
        """The share of all assignments that found no room."""
        return 1 - self.executed.sum().item() / max(1, self.load.sum().item())


class MoEPlusPlusOutput(NamedTuple):
    """What the layer gives: the output in the input's shape and dtype, the logits for the next layer [T, N], the balance loss, counts."""

    hidden_states: Tensor
    router_logits: Float[Tensor, "T N"]
    aux_loss: Float[Tensor, ""]
    stats: MoEPlusPlusStats


class ConstantExperts(nn.Module):
    """E_c(x) = a1 x + a2 v_c with [a1, a2] = softmax(W_c x).

    Attributes:
        wg: [C, 2, D]; constant: [C, D].
    """

    def __init__(self, experts: int, hidden_size: int) -> None:
        super().__init__()
        self.wg = nn.Parameter(torch.empty(experts, 2, hidden_size))
        self.constant = nn.Parameter(torch.empty(experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.wg.shape[-1] ** -0.5
        nn.init.uniform_(self.wg, -bound, bound)
        nn.init.normal_(self.constant)

    def mix(self, x: Float[Tensor, "T D"], gates: Float[Tensor, "T C"]) -> tuple[Float[Tensor, "T 1"], Float[Tensor, "T D"]]:
        """(what x is multiplied by, what is added) for all tokens at once: sum_c g_c a1_c and sum_c g_c a2_c v_c."""
        kept, replaced = (x @ self.wg.flatten(0, 1).T).unflatten(-1, (-1, 2)).softmax(-1).unbind(-1)
        return (gates * kept).sum(-1, keepdim=True), (gates * replaced) @ self.constant


class MoEPlusPlus(nn.Module):
    """A mixture of experts of which some cost nothing, so that a token uses 0, 1 or 2 feed-forward networks.

    Args:
        hidden_size, intermediate_size: D and I, of each feed-forward expert (SwiGLU, no bias).
        num_ffn_experts, num_zero, num_copy: how many of each kind.
        num_constant: max(num_ffn_experts // 4 - num_zero - num_copy, 1) where it is None (the paper's own 8-expert model has 2).
        top_k: experts of a token.
        tau: above 0, at most 1; below 1 it draws assignments to the free experts, in the balance loss and in the capacities.
        capacity_factor: gamma, in training alone; None drops nothing.
        router: "linear", or "mlp" as in the released model.
        gating: see `gate_values`; with "released" every expert's input is multiplied by K.
        gate_residual: whether there is a map for the logits of the mixture before.
        capacity_base: "assignments" (K T), or "tokens" (T) as the paper prints it.
        capacity_priority: who is served first, "position" in the batch or "score", the larger gate value.
        global_balance: take the balance loss over all processes of torch.distributed together, not over each one's tokens.
        layer_idx: its number in a model, for messages.

    Raises:
        ValueError: a number that cannot be; in `forward` shapes that do not fit, or logits that are not finite.

    Examples:
        >>> layer = MoEPlusPlus(16, 32, num_ffn_experts=8, num_constant=2)
        >>> out = layer(torch.randn(2, 5, 16))
        >>> out.hidden_states.shape, out.router_logits.shape, out.stats.load.sum().item()
        (torch.Size([2, 5, 16]), torch.Size([10, 12]), 20)
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_ffn_experts: int = 8,
        num_zero: int = 1,
        num_copy: int = 1,
        num_constant: int | None = None,
        top_k: int = 2,
        tau: float = 0.75,
        capacity_factor: float | None = 1.1,
        router: Literal["linear", "mlp"] = "linear",
        gating: Gating = "paper",
        gate_residual: bool = True,
        capacity_base: Literal["assignments", "tokens"] = "assignments",
        capacity_priority: Priority = "position",
        global_balance: bool = False,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__()
        check_whole(hidden_size=hidden_size, intermediate_size=intermediate_size, num_ffn_experts=num_ffn_experts)
        check_whole(0, optional=("num_constant",), num_zero=num_zero, num_copy=num_copy, num_constant=num_constant)
        check_choice(("linear", "mlp"), router=router)
        check_choice(get_args(Gating), gating=gating)
        check_choice(("assignments", "tokens"), capacity_base=capacity_base)
        check_choice(get_args(Priority), capacity_priority=capacity_priority)
        check_tau(tau)
        if capacity_factor is not None:
            check_positive(capacity_factor=capacity_factor)
        if num_constant is None:
            num_constant = max(num_ffn_experts // 4 - num_zero - num_copy, 1)
        self.hidden_size, self.num_ffn, self.num_constant = hidden_size, num_ffn_experts, num_constant
        self.num_copy, self.num_zero = num_copy, num_zero
        if not 1 <= top_k <= self.num_experts:
            raise ValueError(f"top_k is {top_k} and there are {self.num_experts} experts; expected 1 to {self.num_experts}")
        check_whole(top_k=top_k)
        self.top_k, self.tau, self.capacity_factor, self.layer_idx = top_k, tau, capacity_factor, layer_idx
        self.gating: Gating = gating
        self.capacity_base = capacity_base
        self.capacity_priority: Priority = capacity_priority
        self.global_balance = global_balance
        self.router = PathwayRouter(hidden_size, self.num_experts, router, gate_residual)
        self.experts = GatedExperts(num_ffn_experts, hidden_size, intermediate_size)
        self.constants = ConstantExperts(num_constant, hidden_size) if num_constant else None

    @property
    def num_zc(self) -> int:
        """Experts that cost nothing."""
        return self.num_constant + self.num_copy + self.num_zero

    @property
    def num_experts(self) -> int:
        return self.num_ffn + self.num_zc

    def forward(
        self, hidden_states: Float[Tensor, "... D"], gate_residual: Float[Tensor, "T N"] | None = None, token_mask: Tensor | None = None
    ) -> MoEPlusPlusOutput:
        """Route all tokens of a batch.

        Args:
            hidden_states: [B, S, D] or [T, D], any float dtype; it is not changed.
            gate_residual: the router logits [T, N] of the mixture before in this very pass.
            token_mask: [B, S] or [T], false for padding, which gets zeros and counts nowhere.
        """
        x = self._tokens(hidden_states)
        valid = self._mask(token_mask, x)
        self._check_residual(gate_residual, x)
        logits = self.router(x, gate_residual)
        self._check_finite(logits)
        selected = select(logits, self.top_k)
        values = gate_values(logits, selected, self.gating, self.num_zero)
        served = self._served(selected, values, valid)
        inputs = x * self.top_k if self.gating == "released" else x
        y = self._free(inputs, selected, values * served)
        y = self._networks(y, inputs, selected, values, served)
        aux = heterogeneous_load_balance_loss(logits, selected, self.num_ffn, self.tau, valid, self._group())
        stats = self._stats(selected, served, valid)
        return MoEPlusPlusOutput(y.reshape(hidden_states.shape), logits, aux, stats)

    def _served(self, selected: Tensor, values: Tensor, valid: Tensor) -> Bool[Tensor, "T K"]:
        """The assignments that are computed: of tokens that count, in training within the experts' capacity."""
        if not self.training or self.capacity_factor is None:
            return valid[:, None].expand(selected.shape)
        base = int(valid.sum()) * (self.top_k if self.capacity_base == "assignments" else 1)
        ffn, free = heterogeneous_capacity(base, self.num_ffn, self.num_zc, self.tau, self.capacity_factor)
        capacity = torch.tensor([ffn] * self.num_ffn + [free] * self.num_zc, device=selected.device)
        return within_capacity(selected, values, capacity, self.capacity_priority, valid)

    def _free(self, x: Float[Tensor, "T D"], selected: Tensor, gates: Tensor) -> Float[Tensor, "T D"]:
        """All free experts in closed form, for all tokens at once: s x + B V. Zero experts cost nothing at all."""
        if not self.num_constant + self.num_copy:
            return torch.zeros_like(x)
        dense = x.new_zeros(len(x), self.num_experts).scatter(1, selected, gates.to(x.dtype))
        copies = self.num_ffn + self.num_constant
        scale = dense[:, copies : copies + self.num_copy].sum(-1, keepdim=True)
        if self.constants is None:
            return scale * x
        kept, added = self.constants.mix(x, dense[:, self.num_ffn : copies])
        return (scale + kept) * x + added.to(x.dtype)

    def _networks(self, y: Tensor, x: Tensor, selected: Tensor, values: Tensor, served: Tensor) -> Float[Tensor, "T D"]:
        """Add the feed-forward experts' part: the served assignments sorted by expert, computed, weighted, scattered back."""
        places = ((selected < self.num_ffn) & served).flatten().nonzero().squeeze(1)
        order, counts = by_expert(selected.flatten()[places], self.num_ffn)
        places = places[order]
        tokens = places // self.top_k
        out = self.experts(x.index_select(0, tokens), counts)
        return y.index_add(0, tokens, (out * values.flatten()[places, None]).to(y.dtype))

    def _group(self) -> Any:
        """The processes over which the balance loss is taken; None is this one."""
        return torch.distributed.group.WORLD if self.global_balance and torch.distributed.is_initialized() else None

    def _stats(self, selected: Tensor, served: Tensor, valid: Tensor) -> MoEPlusPlusStats:
        load = torch.bincount(selected[valid].flatten(), minlength=self.num_experts)
        return MoEPlusPlusStats(int(valid.sum()), load, torch.bincount(selected[served], minlength=self.num_experts), self.num_ffn)

    # What is refused

    @property
    def _name(self) -> str:
        return "the layer" if self.layer_idx is None else f"layer {self.layer_idx}"

    def _tokens(self, hidden_states: Tensor) -> Float[Tensor, "T D"]:
        if hidden_states.ndim < 2 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states are {tuple(hidden_states.shape)}; expected [..., {self.hidden_size}], the hidden_size of {self._name}"
            )
        return hidden_states.reshape(-1, self.hidden_size)

    def _mask(self, token_mask: Tensor | None, x: Tensor) -> Bool[Tensor, "T"]:
        if token_mask is None:
            return torch.ones(len(x), dtype=torch.bool, device=x.device)
        if token_mask.numel() != len(x):
            raise ValueError(f"token_mask is {tuple(token_mask.shape)} and there are {len(x)} tokens; expected one value for each")
        return token_mask.reshape(-1).bool()

    def _check_residual(self, residual: Tensor | None, x: Tensor) -> None:
        if residual is not None and (residual.shape != (len(x), self.num_experts) or residual.device != x.device):
            raise ValueError(
                f"gate_residual is {tuple(residual.shape)} on {residual.device}; expected the logits [{len(x)}, {self.num_experts}] of the "
                f"mixture before, on {x.device}"
            )

    def _check_finite(self, logits: Tensor) -> None:
        if not logits.isfinite().all():
            raise ValueError(
                f"router logits of {self._name} are not finite; expected numbers: look at its input, or lower the learning rate"
            )
