"""How sparse a router is: for a token (TLS), for windows of tokens (CLS), and how much of it a token shares with the next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Integer
from torch import Tensor

from fewer.checks import check_whole
from fewer.fitting import evaluating
from fewer.language._shared.token_rows import documents_of, neighbours, valid_tokens

WINDOWS = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class SparsityStats:
    """What `sparsity_stats` found; NaN where there was nothing to measure.

    Attributes:
        tls: mean share of the experts that a token leaves inactive.
        cls: window length -> mean share of the experts that no token of a window activates.
        reuse: mean share of a token's active experts that the next token activates too.
        tokens: how many tokens were counted.
    """

    tls: float
    cls: dict[int, float]
    reuse: float
    tokens: int


def sparsity_stats(
    active: Bool[Tensor, "B S E"],
    doc_ids: Integer[Tensor, "B S"] | None = None,
    attention_mask: Integer[Tensor, "B S"] | None = None,
    windows: Sequence[int] = WINDOWS,
) -> SparsityStats:
    """The sparsity of a router on consecutive tokens.

    Windows lie one after the other from the start of each document (or of each row's piece of it), never across two, and a last one that
    is not full is left out. (The released statistic runs all documents together.)

    Args:
        active: which experts each token activates.
        doc_ids: a number for each document; all of a row is one, where they are not given.
        attention_mask: 0 for padding, which is not counted.
        windows: their lengths.

    Raises:
        ValueError: a shape or a length does not fit.

    Examples:
        >>> active = torch.tensor([[[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]]]).bool()
        >>> sparsity_stats(active, windows=[2, 4])
        SparsityStats(tls=0.6875, cls={2: 0.625, 4: 0.25}, reuse=0.5, tokens=4)
    """
    if active.ndim != 3 or active.dtype != torch.bool:
        raise ValueError(f"active is {tuple(active.shape)} {active.dtype}; expected booleans [batch, tokens, experts]")
    for window in windows:
        check_whole(window=window)
    batch, length, experts = active.shape
    valid = valid_tokens((batch, length), attention_mask).to(active.device)
    together = neighbours((batch, length), doc_ids, attention_mask).to(active.device)
    unions: dict[int, list[Tensor]] = {window: [] for window in windows}
    for piece in _pieces(active, valid, together):
        for window in windows:
            whole = len(piece) // window * window
            unions[window].append(piece[:whole].view(-1, window, experts).any(1).double().mean(-1))
    shared = (active[:, :-1] & active[:, 1:])[together].sum(-1)
    own = active[:, :-1][together].sum(-1)
    return SparsityStats(
        tls=1 - _mean(active[valid].double().mean(-1)),
        cls={window: 1 - _mean(torch.cat(found)) if found else math.nan for window, found in unions.items()},
        reuse=_mean(shared[own > 0].double() / own[own > 0]),
        tokens=int(valid.sum()),
    )


def _pieces(active: Tensor, valid: Tensor, together: Tensor) -> Iterator[Tensor]:
    """Runs of tokens of one document, [tokens, experts] each."""
    for row, counted, joined in zip(active, valid, together, strict=True):
        starts = [0, *((~joined).nonzero().flatten() + 1).tolist(), len(row)]
        for first, end in itertools.pairwise(starts):
            if end > first and bool(counted[first]):
                yield row[first:end]


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else math.nan


@torch.no_grad()
def model_sparsity(model: Any, input_ids: Integer[Tensor, "B S"], end: int | None = None, batch: int = 8) -> list[SparsityStats]:
    """The sparsity of each layer of a model, in eval mode, on rows of text whose documents end with the token `end`."""
    place = next(model.parameters()).device
    layers = model.feed_forwards()
    found: list[list[Tensor]] = [[] for _ in layers]
    with evaluating(model):
        for rows in input_ids.split(batch):
            router_logits = model(input_ids=rows.to(place), output_router_logits=True, use_cache=False).router_logits
            for active, layer, logits in zip(found, layers, router_logits, strict=True):
                active.append(layer.active(logits).cpu())
    return [sparsity_stats(torch.cat(active), documents_of(input_ids.cpu(), end)) for active in found]


def mean_stats(layers: Sequence[SparsityStats]) -> SparsityStats:
    """The mean over layers of one text."""

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    cls = {window: mean([each.cls[window] for each in layers]) for window in layers[0].cls}
    return SparsityStats(mean([each.tls for each in layers]), cls, mean([each.reuse for each in layers]), layers[0].tokens)
