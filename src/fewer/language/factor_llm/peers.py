"""What the networks are held against: transformers' dense one, and Mixtral's block with the same slices."""

from __future__ import annotations

from typing import Any

import torch

from fewer.language.factor_llm.model import FactorizedMLP


def llama_mlp(hidden_size: int, intermediate_size: int) -> Any:
    """A LlamaMLP with random weights, in eval mode."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=hidden_size, intermediate_size=intermediate_size)).eval()


def mixtral_block(experts: FactorizedMLP, way: str = "eager") -> Any:
    """A MixtralSparseMoeBlock with the same slices and router (it weighs its experts, so its numbers are others; its work is the same)."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    count, double, hidden = experts.gate_up.shape
    config = MixtralConfig(hidden_size=hidden, intermediate_size=double // 2, num_local_experts=count, num_experts_per_tok=experts.top_k)
    config._experts_implementation = way
    block: Any = MixtralSparseMoeBlock(config).eval()
    with torch.no_grad():
        block.gate.weight.copy_(experts.router.weight)
        block.experts.gate_up_proj.copy_(experts.gate_up)
        block.experts.down_proj.copy_(experts.down)
    return block
