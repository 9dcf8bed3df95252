"""How long a language model takes to read a prompt and to write on, one token after the other."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from fewer.meters import median_seconds


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread inside the block, where processor time is taken: a second thread's waiting would count as work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def read(model: Any, prompt: Int64[Tensor, "B T"]) -> None:
    """Pass a prompt through the model (prefill)."""
    model(input_ids=prompt)


def write(model: Any, prompt: Int64[Tensor, "B T"], tokens: int) -> None:
    """Write exactly so many tokens after a prompt, greedily (decode)."""
    pad = model.config.pad_token_id or 0
    words = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": pad}
    model.generate(prompt, attention_mask=torch.ones_like(prompt), **words)


def reading_seconds(model: Any, prompt: Int64[Tensor, "B T"], repeats: int = 5) -> float:
    """Processor seconds to read a prompt on one thread, the median of some repeats (on a GPU seconds)."""
    with one_thread():
        return median_seconds(functools.partial(read, model, prompt), repeats, processor=not prompt.is_cuda)


def writing_seconds(model: Any, prompt: Int64[Tensor, "B T"], tokens: int = 32, repeats: int = 3) -> float:
    """Processor seconds to write tokens after a prompt on one thread, the median of some repeats (on a GPU seconds)."""
    with one_thread():
        return median_seconds(functools.partial(write, model, prompt, tokens), repeats, processor=not prompt.is_cuda)
