"""How far a cast model's next-token distribution lies from the model's own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_whole
from fewer.fitting import evaluating

Batch = Tensor | Mapping[str, Any]


@dataclass(frozen=True)
class Divergence:
    """Attributes:
    kl: KL(reference || cast) over the reference's most likely tokens, renormalised: nats a token, mean over tokens.
    kl_released: kl / top_k x 10^6, as the released script prints it (it averages over the entries too), and the paper's tables.
    perplexity_ref, perplexity: exp of the mean loss of the next token, of the reference and of the cast model.
    """

    kl: float
    kl_released: float
    perplexity_ref: float
    perplexity: float


@dataclass(frozen=True)
class Reference:
    """What the divergence needs of the reference model, so that it need not be kept or passed again.

    Attributes:
        batches: input_ids [B, T] with attention_mask [B, T] (or None).
        tokens, log_p: of each unpadded token, [N, top_k]: the most likely next tokens, and their renormalised log-probabilities.
        perplexity: the model's own.
    """

    batches: list[tuple[Tensor, Tensor | None]]
    tokens: list[Tensor]
    log_p: list[Tensor]
    perplexity: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, batches: Iterable[Batch], top_k: int = 25) -> Reference:
        """One forward pass over the batches: tensors of input_ids, or mappings with input_ids and maybe attention_mask."""
        check_whole(top_k=top_k)
        kept, tokens, log_p, losses = [], [], [], _Mean()
        with evaluating(model):
            for ids, mask in map(_inputs, batches):
                logits = _logits(model, ids, mask)
                if top_k > logits.shape[-1]:
                    raise ValueError(f"top_k is {top_k} and the vocabulary has {logits.shape[-1]} tokens; expected at most that many")
                top = logits.topk(top_k, dim=-1)
                kept.append((ids, mask))
                tokens.append(top.indices)
                log_p.append(top.values.double().log_softmax(-1))
                _add_losses(losses, model, ids, mask, logits)
        if not kept:
            raise ValueError("there is no batch to compare on; expected at least one: give more text")
        return cls(kept, tokens, log_p, losses.perplexity)

    @property
    def top_k(self) -> int:
        return self.tokens[0].shape[-1]


@torch.no_grad()
def divergence(model_ref: nn.Module | Reference, model_q: nn.Module, batches: Iterable[Batch] = (), top_k: int = 25) -> Divergence:
    """Both models on the same text, token by token; padded tokens do not count.

    Args:
        model_ref: the model as it was, or what `Reference.of` kept of it (with its batches).
        model_q: the cast model; may be the same object converted since, where a `Reference` is given.
        batches: tensors of input_ids [B, T], or mappings with input_ids and maybe attention_mask.
        top_k: how many of the reference's most likely tokens are compared.

    Raises:
        ValueError: top_k is above the vocabulary's size, no batch, or a model_ref that is model_q.

    Source: arXiv 2510.25602, section 5.1.
    """
    if isinstance(model_ref, nn.Module):
        if model_ref is model_q:
            raise ValueError(
                "model_ref and model_q are one object; expected two: keep Reference.of(model, batches) before `convert`, or copy the model"
            )
        model_ref = Reference.of(model_ref, batches, top_k)
    total, losses = _Mean(), _Mean()
    with evaluating(model_q):
        for (ids, mask), tokens, log_p in zip(model_ref.batches, model_ref.tokens, model_ref.log_p, strict=True):
            logits = _logits(model_q, ids, mask)
            log_q = logits.gather(-1, tokens).double().log_softmax(-1)
            total.add((log_p.exp() * (log_p - log_q)).sum(-1))
            _add_losses(losses, model_q, ids, mask, logits)
    kl = total.value
    return Divergence(kl, kl / model_ref.top_k * 1e6, model_ref.perplexity, losses.perplexity)


class _Mean:
    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.value, 700.0)) if not math.isnan(self.value) else math.nan


def _inputs(batch: Batch) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Mapping):
        return batch["input_ids"], batch.get("attention_mask")
    return batch, None


def _logits(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """[unpadded tokens, vocabulary]."""
    device = next(model.parameters()).device
    words = {"input_ids": ids.to(device)} | ({} if mask is None else {"attention_mask": mask.to(device)})
    logits = model(**words).logits.float()
    return logits.flatten(0, 1) if mask is None else logits[mask.to(device).bool()]


def _add_losses(losses: _Mean, model: nn.Module, ids: Tensor, mask: Tensor | None, logits: Tensor) -> None:
    """The loss of each token that follows an unpadded one."""
    there = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    following = ids.roll(-1, 1)
    counts = there & there.roll(-1, 1)
    counts[:, -1] = False
    chosen = counts[there].to(logits.device)
    losses.add(F.cross_entropy(logits[chosen], following[counts].to(logits.device), reduction="none"))
