"""Rows side by side in one model, of prompts of any length: what it has read of each (the cache), and what it expects next."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F


class Batch:
    """Rows in a model. The shorter ones are filled up on their left, where a mask leaves it out and no position is counted.

    Attributes:
        logits: of each row's next token [R, V], float32, or float64 as the model.
        mask: which columns of the cache are a row's own [R, C].
        lengths: how many those are [R], the position of the next token.
    """

    def __init__(self, model: Any, ids: Int64[Tensor, " T"]) -> None:
        """One row: the prompt is passed through the model."""
        from transformers import DynamicCache

        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model, self.taken = model, inspect.signature(inner.forward).parameters
        self.cache = DynamicCache(config=model.config)
        self.mask = torch.zeros(1, 0, dtype=torch.long, device=ids.device)
        self.lengths = torch.zeros(1, dtype=torch.long, device=ids.device)
        self.padded = False
        self.feed(ids[None])
        _check_cache(self.cache)

    def __len__(self) -> int:
        return len(self.mask)

    def feed(self, tokens: Int64[Tensor, "R T"]) -> None:
        """Pass the next tokens of all rows through the model."""
        self.mask = F.pad(self.mask, (0, tokens.shape[1]), value=1)
        positions = self.lengths[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        may = {"position_ids": positions, "logits_to_keep": 1, "cache": self.cache}
        words: dict[str, Any] = {name: value for name, value in may.items() if name in self.taken}
        if "cache" not in words:  # transformers' name for it until 5.2x
            words["past_key_values"] = self.cache
        mask = self.mask if self.padded else None
        output = self.model(input_ids=tokens, attention_mask=mask, use_cache=True, **words)
        last = output.logits[:, -1]
        self.logits: Float[Tensor, "R V"] = last if last.dtype == torch.float64 else last.float()
        self.lengths = self.lengths + tokens.shape[1]

    def repeat(self, rows: int) -> None:
        """As many copies of a single row."""
        self.cache.batch_repeat_interleave(rows)
        self.mask, self.lengths, self.logits = (each.repeat_interleave(rows, 0) for each in (self.mask, self.lengths, self.logits))

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows, and no columns that none of them has."""
        index = torch.tensor(rows, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask, self.lengths, self.logits = self.mask[index], self.lengths[index], self.logits[index]
        columns = int(self.lengths.max())
        if columns < self.mask.shape[1]:
            self.mask = self.mask[:, -columns:]
            for layer in cast(Any, self.cache).layers:
                _set(layer, layer.keys[:, :, -columns:], layer.values[:, :, -columns:], columns)
        self.padded = bool((self.lengths < columns).any())

    def join(self, other: Batch) -> None:
        """Other rows of the same model, below these."""
        columns = max(self.mask.shape[1], other.mask.shape[1])
        self.padded = self.padded or other.padded or self.mask.shape[1] != other.mask.shape[1]
        for mine, theirs in zip(cast(Any, self.cache).layers, cast(Any, other.cache).layers, strict=True):
            # a sliding window's layer keeps the last columns alone, in both batches counted from the right end
            width = max(mine.keys.shape[2], theirs.keys.shape[2])
            keys, values = (
                torch.cat([F.pad(each, (0, 0, width - each.shape[2], 0)) for each in pair])
                for pair in ((mine.keys, theirs.keys), (mine.values, theirs.values))
            )
            _set(mine, keys, values, columns)
        self.mask = torch.cat([F.pad(each.mask, (columns - each.mask.shape[1], 0)) for each in (self, other)])
        self.lengths, self.logits = torch.cat([self.lengths, other.lengths]), torch.cat([self.logits, other.logits])


def _set(layer: Any, keys: Tensor, values: Tensor, columns: int) -> None:
    layer.keys, layer.values = keys, values
    if layer.is_sliding:
        layer.cumulative_length = columns


def _check_cache(cache: Any) -> None:
    """ValueError where a layer keeps something else than keys and values of each column."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    odd = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)})
    if odd or not cache.get_seq_length():
        raise ValueError(
            f"the model keeps {', '.join(odd) or 'no cache'}; expected keys and values of every token, from which rows can be taken: "
            "use a causal language model with attention in all layers"
        )
