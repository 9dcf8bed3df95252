"""What BlockFFN is held against: other routers over the same experts, trained alike, and transformers' own mixture to race with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewer.language.block_ffn.layer.block_ffn import BlockFFN
from fewer.language.block_ffn.model import BlockFFNConfig, BlockFFNForCausalLM

BALANCE = 0.01  # of the load-balancing loss, as Mixtral's
STEP = 1.2  # by which ReMoE's factor rises or falls at each step
FIRST = 1e-8  # that factor at first


class TopKFFN(BlockFFN):
    """The same experts behind a top-K softmax router (Mixtral's rule: the K gates add up to 1)."""

    top_k = 1

    def active(self, logits: Float[Tensor, "... E"]) -> Bool[Tensor, "... E"]:
        return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(self.top_k).indices, True)

    def gates(self, logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
        return logits.masked_fill(~self.active(logits), -math.inf).softmax(-1)


class TopKForCausalLM(BlockFFNForCausalLM):
    """With the load-balancing loss that such a router needs: E sum_i f_i P_i, f the share of assignments, P the mean probability."""

    def __init__(self, config: BlockFFNConfig, top_k: int) -> None:
        super().__init__(config)
        for layer in self.feed_forwards():
            layer.top_k = top_k

    @staticmethod
    def feed_forward(config: Any) -> BlockFFN:
        return TopKFFN(config.hidden_size, config.num_experts, config.expert_size, activation=config.hidden_act)

    def auxiliary_loss(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None, doc_ids: Tensor | None) -> Tensor:
        losses = []
        for layer, logits in zip(self.feed_forwards(), router_logits, strict=True):
            flat = logits.flatten(0, 1)
            share = layer.active(flat).float().mean(0) / layer.top_k  # pyright: ignore[reportOperatorIssue]
            losses.append(flat.shape[-1] * (share * flat.softmax(-1).mean(0)).sum())
        return BALANCE * torch.stack(losses).mean()


class ReMoEFFN(BlockFFN):
    """The same experts behind ReLU gates without a norm."""

    def gates(self, logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
        return logits.relu()


class ReMoEForCausalLM(BlockFFNForCausalLM):
    """With ReMoE's L1 loss on the gates, whose factor rises while tokens activate more experts than they shall, and falls below that.

    Args:
        sparsity: the share of the experts that shall stay inactive.
    """

    def __init__(self, config: BlockFFNConfig, sparsity: float) -> None:
        super().__init__(config)
        self.sparsity, self.l1_factor = sparsity, FIRST

    @staticmethod
    def feed_forward(config: Any) -> BlockFFN:
        return ReMoEFFN(config.hidden_size, config.num_experts, config.expert_size, activation=config.hidden_act)

    def auxiliary_loss(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None, doc_ids: Tensor | None) -> Tensor:
        gates = torch.stack([logits.relu() for logits in router_logits])
        loss = self.l1_factor * gates.mean()
        if self.training:
            inactive = (gates == 0).float().mean().item()
            self.l1_factor *= STEP if inactive < self.sparsity else 1 / STEP
        return loss


class DenseFFN(BlockFFN):
    """One network of the same width: every expert at a gate of 1."""

    def active(self, logits: Float[Tensor, "... E"]) -> Bool[Tensor, "... E"]:
        return torch.ones_like(logits, dtype=torch.bool)

    def gates(self, logits: Float[Tensor, "... E"]) -> Float[Tensor, "... E"]:
        return torch.ones_like(logits)


class DenseForCausalLM(BlockFFNForCausalLM):
    """A model of dense networks."""

    @staticmethod
    def feed_forward(config: Any) -> BlockFFN:
        return DenseFFN(config.hidden_size, config.num_experts, config.expert_size, activation=config.hidden_act)

    def auxiliary_loss(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None, doc_ids: Tensor | None) -> Tensor:
        return router_logits[0].new_zeros(())


def mixtral_experts(hidden_size: int, num_experts: int, expert_size: int, active: int, way: str = "eager") -> Any:
    """transformers' Mixtral block with as many experts, of as many weights each (they have a gate: two thirds of the channels)."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config: Any = MixtralConfig(
        hidden_size=hidden_size, intermediate_size=round(expert_size * 2 / 3), num_local_experts=num_experts, num_experts_per_tok=active
    )
    config._experts_implementation = way
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config).eval().requires_grad_(False)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return block
