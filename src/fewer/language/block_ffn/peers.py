"""What BlockFFN is held against: other routers over the same experts, trained alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewer.language._shared.mixture import mean_over_layers
from fewer.language.block_ffn.layer import BlockFFN
from fewer.language.block_ffn.model import BlockFFNConfig, BlockFFNForCausalLM

BALANCE = 0.01  # of the load-balancing loss, as Mixtral's
STEP, FIRST = 1.2, 1e-8  # by which ReMoE's factor rises or falls at each step, and what it is at first


class TopKFFN(BlockFFN):
    """The same experts behind a top-K softmax router (Mixtral's rule: the K gates add up to 1)."""

    top_k = 1

    def active(self, logits: Tensor) -> Tensor:
        return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(self.top_k).indices, True)

    def gates(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(~self.active(logits), -math.inf).softmax(-1)


class ReMoEFFN(BlockFFN):
    """The same experts behind ReLU gates without a norm."""

    def gates(self, logits: Tensor) -> Tensor:
        return logits.relu()


class DenseFFN(BlockFFN):
    """One network of the same width: every expert at a gate of 1."""

    def active(self, logits: Tensor) -> Tensor:
        return torch.ones_like(logits, dtype=torch.bool)

    def gates(self, logits: Tensor) -> Tensor:
        return torch.ones_like(logits)


class DenseForCausalLM(BlockFFNForCausalLM):
    """A model of dense networks."""

    layer_class: type[BlockFFN] = DenseFFN

    @classmethod
    def feed_forward(cls, config: Any) -> BlockFFN:
        return cls.layer_class(config.hidden_size, config.num_experts, config.expert_size, activation=config.hidden_act)

    def auxiliary_loss(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None, doc_ids: Tensor | None) -> Tensor:
        return router_logits[0].new_zeros(())


class TopKForCausalLM(DenseForCausalLM):
    """With the load-balancing loss that such a router needs: E sum_i f_i P_i, f the share of assignments, P the mean probability."""

    layer_class = TopKFFN

    def __init__(self, config: BlockFFNConfig, top_k: int) -> None:
        super().__init__(config)
        for layer in self.feed_forwards():
            layer.top_k = top_k

    def auxiliary_loss(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None, doc_ids: Tensor | None) -> Tensor:
        def unbalance(layer: Any, logits: Tensor) -> Tensor:
            share = layer.active(logits).float().mean((0, 1)) / layer.top_k
            return len(share) * (share * logits.softmax(-1).mean((0, 1))).sum()

        return BALANCE * mean_over_layers(map(unbalance, self.feed_forwards(), router_logits))


class ReMoEForCausalLM(DenseForCausalLM):
    """With ReMoE's L1 loss on the gates, whose factor rises while fewer experts than `sparsity` (a share) stay inactive, and falls above."""

    layer_class = ReMoEFFN

    def __init__(self, config: BlockFFNConfig, sparsity: float) -> None:
        super().__init__(config)
        self.sparsity, self.l1_factor = sparsity, FIRST

    def auxiliary_loss(self, router_logits: Sequence[Tensor], attention_mask: Tensor | None, doc_ids: Tensor | None) -> Tensor:
        gates = torch.stack(list(router_logits)).relu()
        loss = self.l1_factor * gates.mean()
        if self.training:
            self.l1_factor *= STEP if (gates == 0).float().mean().item() < self.sparsity else 1 / STEP
        return loss
