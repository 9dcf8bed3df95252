"""Small BlockFFN models for tests."""

from __future__ import annotations

from typing import Any

import torch

from fewer.language import BlockFFNConfig, BlockFFNForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 48, "hidden_size": 16, "num_experts": 6, "expert_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 256, "chunk_len": 4, "eos_token_id": 1, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
IDS = torch.randint(2, 48, (2, 12), generator=torch.Generator().manual_seed(1))


def make(dtype: torch.dtype = torch.float32, seed: int = 0, **words: Any) -> BlockFFNForCausalLM:
    torch.manual_seed(seed)
    return BlockFFNForCausalLM(BlockFFNConfig(**SIZES | words)).to(dtype).eval()
