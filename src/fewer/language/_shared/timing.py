"""How long a language model takes to read a prompt and to write on, one token after the other."""

from __future__ import annotations

import functools
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from fewer.devices import one_thread
from fewer.meters import median_seconds


@torch.no_grad()
def read(model: Any, prompt: Int64[Tensor, "B T"]) -> None:
    """Pass a prompt through the model (prefill)."""
    model(input_ids=prompt)


def write(model: Any, prompt: Int64[Tensor, "B T"], tokens: int) -> Int64[Tensor, "B N"]:
    """Write exactly so many tokens after a prompt, greedily (decode): these tokens."""
    pad = model.config.pad_token_id or 0
    words = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": pad}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **words)[:, prompt.shape[1] :]


def reading_seconds(model: Any, prompt: Int64[Tensor, "B T"], repeats: int = 5) -> float:
    """Processor seconds to read a prompt on one thread, the median of some repeats (on a GPU seconds)."""
    with one_thread():
        return median_seconds(functools.partial(read, model, prompt), repeats, processor=not prompt.is_cuda)


def writing_seconds(model: Any, prompt: Int64[Tensor, "B T"], tokens: int = 32, repeats: int = 3) -> float:
    """Processor seconds to write tokens after a prompt on one thread, the median of some repeats (on a GPU seconds)."""
    with one_thread():
        return median_seconds(functools.partial(write, model, prompt, tokens), repeats, processor=not prompt.is_cuda)


def wide_llama(layers: int, seed: int = 0) -> Any:
    """A LlamaForCausalLM of hidden width 2,048 and random weights, float32: two thirds of a layer's bytes are its feed-forward network's.

    A layer takes 0.2 GB.
    """
    shape = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": layers, "num_attention_heads": 16}
    return random_llama(seed, vocab_size=2048, eos_token_id=None, **shape)


def random_llama(seed: int = 0, **config: Any) -> Any:
    """A LlamaForCausalLM of random weights, float32, in eval mode; the words are those of LlamaConfig."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**config)).eval()
