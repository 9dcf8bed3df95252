"""Other ways to choose keys, to hold codes against: the truly largest scores (which takes the matrix that codes avoid), the newest keys."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fewer.language.spt.quantizer import CSR, kept_counts, lookup, visible_scores


def true_keys(q: Tensor, k: Tensor, mask: Tensor | None, window: int | None = None, keep: int = 8) -> CSR:
    """The keys with the truly largest scores, as many as codes would keep."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    visible = torch.ones(batch, keys, dtype=torch.bool) if mask is None else mask.bool().cpu()
    wanted = kept_counts(visible, queries, keep, "sequence")
    rows = []
    for b, h in itertools.product(range(batch), range(heads)):
        scores = visible_scores(q[b, h], k[b, h * k.shape[1] // heads], visible[b].to(q.device), window).cpu()
        order = scores.argsort(dim=-1, descending=True, stable=True)
        rows.append(torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, torch.arange(keys) < wanted[b][:, None]))
        rows[-1] &= scores > -torch.inf
    kept = torch.cat(rows)
    return CSR(torch.nn.functional.pad(kept.sum(-1).cumsum(0), (1, 0)), kept.nonzero()[:, 1].int(), (batch, heads, queries))


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
