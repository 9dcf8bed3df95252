"""Other ways to choose keys, to hold codes against: the truly largest scores (which takes the matrix that codes avoid), the newest keys."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fewer.language.spt.quantizer import CSR, kept_counts, lookup


def true_keys(q: Tensor, k: Tensor, mask: Tensor | None, window: int | None = None, keep: int = 8) -> CSR:
    """The keys with the truly largest scores, as many as codes would keep."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    visible = torch.ones(batch, keys, dtype=torch.bool) if mask is None else mask.bool()
    wanted = kept_counts(visible, queries, keep, "sequence")
    scores = q @ k.repeat_interleave(heads // k.shape[1], dim=1).transpose(2, 3)
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if window is not None:
        seen &= ~torch.ones_like(seen).tril(keys - queries - window)
    scores = scores.masked_fill(~(seen & visible[:, None, None, :]), -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(3, order, (torch.arange(keys) < wanted[:, None, :, None]).expand_as(scores))
    kept &= scores > -torch.inf
    rows = kept.flatten(0, 2)
    indptr = torch.nn.functional.pad(rows.sum(-1).cumsum(0), (1, 0))
    return CSR(indptr, rows.nonzero()[:, 1].int(), (batch, heads, queries))


def newest_keys(q: Tensor, k: Tensor, mask: Tensor | None, window: int | None = None, keep: int = 8) -> CSR:
    """As many keys as codes would keep, the newest: where all codes agree, ties decide."""
    one, other = (each.new_zeros(*each.shape[:-1], 1, dtype=torch.uint8) for each in (q, k))
    return lookup(one, other, keep, True, mask, window=window)


@contextlib.contextmanager
def chosen_by(model: Any, choose: Callable[..., CSR]) -> Iterator[None]:
    """A model whose attention keeps what another rule chooses, inside the block."""
    layers = model.attentions
    try:
        for each in layers:
            each.choose = choose
        yield
    finally:
        for each in layers:
            del each.choose
