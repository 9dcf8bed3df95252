"""Rows of tokens [batch, tokens]: which are padding, which document each is of, which neighbours belong together, and which go in circles."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Integer
from torch import Tensor


def rows_of(router_logits: Tensor) -> tuple[int, int]:
    """(batch, tokens) of what a router gave for rows of tokens; ValueError where it is none."""
    if router_logits.ndim != 3:
        raise ValueError(f"router_logits is {tuple(router_logits.shape)}; expected [batch, tokens, experts]")
    return (router_logits.shape[0], router_logits.shape[1])


def valid_tokens(rows: tuple[int, int], attention_mask: Integer[Tensor, "B S"] | None) -> Bool[Tensor, "B S"]:
    """Which tokens are no padding: all, where there is no mask; ValueError where a mask is of other rows."""
    if attention_mask is None:
        return torch.ones(rows, dtype=torch.bool)
    _check_like(rows, attention_mask=attention_mask)
    return attention_mask.bool()


def neighbours(
    rows: tuple[int, int], doc_ids: Integer[Tensor, "B S"] | None = None, attention_mask: Integer[Tensor, "B S"] | None = None
) -> Bool[Tensor, "B S-1"]:
    """Which tokens t and t + 1 belong together: both no padding, and of one document.

    >>> neighbours((1, 5), torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1, 0]]))
    tensor([[ True, False,  True, False]])
    """
    valid = valid_tokens(rows, attention_mask)
    together = valid[:, :-1] & valid[:, 1:]
    if doc_ids is not None:
        _check_like(rows, doc_ids=doc_ids)
        together = together & (doc_ids[:, :-1] == doc_ids[:, 1:]).to(together.device)
    return together


def documents_of(tokens: Integer[Tensor, "B S"], end: int | None) -> Integer[Tensor, "B S"]:
    """A number for each document of rows of text in which the token `end` ends one.

    >>> documents_of(torch.tensor([[5, 0, 7, 8, 0]]), end=0)
    tensor([[0, 0, 1, 1, 1]])
    """
    if end is None:
        return torch.zeros_like(tokens)
    ended = (tokens == end).long()
    return ended.cumsum(1) - ended


def repeating(rows: Integer[Tensor, "B S"], length: int = 8) -> float:
    """The share of rows in which some run of tokens of that length stands twice: text that goes in circles.

    >>> repeating(torch.tensor([[1, 2, 3, 1, 2], [1, 2, 3, 4, 5]]), length=2)
    0.5
    """
    runs = [[tuple(run) for run in row.unfold(0, length, 1).tolist()] for row in rows]
    return sum(len(set(row)) < len(row) for row in runs) / len(runs)


def _check_like(rows: tuple[int, int], **given: Tensor) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor) or tuple(value.shape) != rows or value.is_floating_point():
            was = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name} is {was}; expected integers {rows}: one for each token")
