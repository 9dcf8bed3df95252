"""Small random decoders of the families of transformers, for the tests of methods that drop into them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "max_position_embeddings": "n_positions"}
NAMES = {  # what a family calls what Llama's config has
    "gpt2": GPT2 | {"intermediate_size": "n_inner"},
    "opt": {"intermediate_size": "ffn_dim", "initializer_range": "init_std"},
}


def small_decoder(family: str, **words: Any) -> Any:
    """A decoder of `family` (a model type of transformers) of SIZES, or as `words` say, in the names of Llama's config or the family's own."""
    sizes = SIZES | words
    if family == "opt":
        sizes["word_embed_proj_dim"] = sizes["hidden_size"]
    names = NAMES.get(family, {})
    config = AutoConfig.for_model(family, **{names.get(name, name): value for name, value in sizes.items()})
    return AutoModelForCausalLM.from_config(config)
