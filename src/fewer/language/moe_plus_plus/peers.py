"""What the layer is held against: the sparse block of transformers' Mixtral."""

from __future__ import annotations

from typing import Any

import torch


def mixtral_block(experts: int, hidden_size: int, intermediate_size: int, *, way: str, top_k: int = 2) -> Any:
    """A MixtralSparseMoeBlock with small random weights, in eval mode; `way` is how it computes experts ("eager", "grouped_mm")."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=hidden_size, intermediate_size=intermediate_size, num_local_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = way
    block = MixtralSparseMoeBlock(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in block.parameters():
            weight.normal_(std=weight.shape[-1] ** -0.5)
    return block
