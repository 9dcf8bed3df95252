"""Small models with random weights whose samples end after some tokens, and a tokenizer of characters."""

from __future__ import annotations

import functools
from typing import Any

import torch

VOCABULARY, EOS = 16, 1


def make(dtype: torch.dtype = torch.float64, eos: Any = EOS, kind: str = "llama", positions: int = 128) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    words: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_positions=positions, n_embd=16, n_layer=2, n_head=2, **words)).to(dtype).eval()
    words |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    words["max_position_embeddings"] = positions
    if kind == "sliding":
        return MistralForCausalLM(MistralConfig(sliding_window=6, **words)).to(dtype).eval()
    return LlamaForCausalLM(LlamaConfig(**words)).to(dtype).eval()


@functools.cache
def tokenizer() -> Any:
    """A character a token: tokens 2 to 15 are the letters c to p; two letters that follow each other are never one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1} | {chr(97 + number): number for number in range(2, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 9 tokens."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (count,), generator=draw).tolist()
    return [torch.randint(2, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
