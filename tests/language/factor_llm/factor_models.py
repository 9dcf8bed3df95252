"""Small dense models for the tests of FactorLLM."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip
MADE: dict[str, Any] = {
    "llama": lambda **words: LlamaForCausalLM(LlamaConfig(**SIZES | words)),
    "mistral": lambda **words: MistralForCausalLM(MistralConfig(**SIZES | words)),
    "qwen2": lambda **words: Qwen2ForCausalLM(Qwen2Config(**SIZES | words)),
}
IDS = torch.randint(3, 40, (3, 11), generator=torch.Generator().manual_seed(1))


def make(family: str = "llama", **words: Any) -> Any:
    torch.manual_seed(0)
    return MADE[family](**words).eval()
