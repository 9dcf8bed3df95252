"""Small models whose layers turn the state by very different angles, so that thresholds tell tokens apart."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fewer.language.ffn_skip import FFNSkipConfig

LAYERS, VOCABULARY = 6, 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
}


def planted(seed: int = 0, family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A model with large weights: similarities spread from about 0.5 to 1."""
    model_class, config_class = FAMILIES[family]
    torch.manual_seed(seed)
    extra = {"head_dim": 8} if family == "qwen3" else {}
    model = model_class(config_class(**SHAPE, **extra)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj, layer.self_attn.o_proj, layer.self_attn.v_proj):
                linear.weight.mul_(10 + 5 * torch.rand(1))
    return model.to(dtype)


def text(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def settings(**given: Any) -> FFNSkipConfig:
    """A window of four layers and no warm-up, where nothing else is said."""
    return FFNSkipConfig(**{"cold_start": 1, "cold_end": 5, "threshold": THETA, "warmup_tokens": 0} | given)


THETA = 0.9  # about half of the tokens meet it in some layer
WAYS: dict[str, dict[str, Any]] = {
    "all": {},
    "k=1": {"max_skips": 1},
    "k=2": {"max_skips": 2},
    "k=1, rearmed": {"max_skips": 1, "rearm": True, "threshold": 0.5},
    "static": {"mode": "static", "static_layers": (2, 4)},
    "random": {"mode": "random", "p": 0.5, "seed": 3},
    "layers": {"mode": "layers", "static_layers": (2, 3)},
}


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **words: Any) -> torch.Tensor:
    return model(ids, use_cache=False, **words).logits


def written(model: Any, prompt: torch.Tensor, tokens: int, **words: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(prompt and greedy continuation, the logits of each step [B, tokens, V])."""
    told = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(prompt, **({"attention_mask": torch.ones_like(prompt)} | told | words))
    return out.sequences, torch.stack(out.logits, dim=1)
