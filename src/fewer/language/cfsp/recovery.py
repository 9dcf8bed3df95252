"""Recovery after pruning: low-rank adapters whose ranks follow block importance (IG-LoRA, section 3.4 of the paper), merged at the end."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from fewer.language.cfsp.gated_mlp import decoder_layers

Guide = Literal["importance", "inverse", "uniform"]
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DROPOUT = 0.05


def lora_ranks(scores: Float64[Any, "L"], r_mean: int = 8, ig: Guide = "importance") -> list[int]:
    """r_l in proportion to S_l with sum L r_mean, by the largest remainder, at least 1.

    That more important blocks get more is our reading; "inverse" gives them less, "uniform" all the same.

    Examples:
        >>> lora_ranks([0.2, 0.3, 0.5], r_mean=4), lora_ranks([0.2, 0.3, 0.5], r_mean=4, ig="inverse")
        ([2, 4, 6], [6, 4, 2])
    """
    if ig not in get_args(Guide):
        raise ValueError(f"ig {ig!r}; expected one of {', '.join(get_args(Guide))}")
    if r_mean < 1:
        raise ValueError(f"r_mean is {r_mean}; expected at least 1")
    scores = np.asarray(scores, dtype=np.float64)
    weight = {"importance": scores, "inverse": 1 / scores, "uniform": np.ones_like(scores)}[ig]
    total = len(weight) * r_mean
    wanted = total * weight / weight.sum()
    ranks = np.maximum(np.floor(wanted), 1).astype(int)
    while ranks.sum() < total:
        ranks[int((wanted - ranks).argmax())] += 1
    while ranks.sum() > total:  # where several were raised to 1
        ranks[int(np.where(ranks > 1, ranks - wanted, -np.inf).argmax())] -= 1
    return ranks.tolist()


class LoRALinear(nn.Module):
    """A frozen linear map with a trained low-rank addition: W x + (alpha / r) B A dropout(x)."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, 2.0  # alpha_l = 2 r_l
        bound = math.sqrt(3 / base.in_features)  # Kaiming's, as LoRA draws A
        drawn = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(drawn.to(base.weight))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank).to(base.weight))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        return self.base(x) + self.scale * (self.dropout(x) @ self.a.T) @ self.b.T

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The linear map alone, the addition taken into its weight."""
        self.base.weight += self.scale * self.b @ self.a
        return self.base


def add_adapters(model: nn.Module, ranks: list[int], seed: int = 0) -> list[LoRALinear]:
    """Put an adapter on all seven linear maps of each layer and freeze the rest; the adapters."""
    model.requires_grad_(False)
    draw, adapters = torch.Generator().manual_seed(seed), []
    for layer, rank in zip(decoder_layers(model), ranks, strict=True):
        for block in (cast(Any, layer).self_attn, cast(Any, layer).mlp):
            for name in ADAPTED:
                if hasattr(block, name):
                    adapter = LoRALinear(getattr(block, name), rank, draw)
                    setattr(block, name, adapter)
                    adapters.append(adapter)
    return adapters


def merge_adapters(model: nn.Module) -> None:
    """Take every adapter into its weight and out of the model; everything may be trained again."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.merged())
    model.requires_grad_(True)


def recover(
    model: nn.Module,
    token_ids: Int64[Tensor, "N"],
    steps: int,
    *,
    scores: Float64[Any, "L"],
    r_mean: int = 8,
    ig: Guide = "importance",
    lr: float = 1e-4,
    batch: int = 8,
    window: int = 256,
    seed: int = 0,
    tell: Callable[[int, int, float], None] | None = None,
) -> list[float]:
    """Train adapters on windows of a stream of tokens and merge them, in place; shapes stay as they are.

    Args:
        model: as `prune` left it.
        token_ids: training text, its documents one after the other.
        steps: optimiser steps (AdamW).
        scores: S_l, `PruneReport.scores`.
        r_mean: mean rank; each adapter's alpha is twice its rank, its dropout 0.05.
        ig: what ranks follow.
        lr, batch, window, seed: of the training.
        tell: called with (step, steps, loss).

    Returns:
        The training loss of each step, nats a token.

    Raises:
        ValueError: steps below 1, or a text shorter than one window.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1")
    if len(token_ids) < window:
        raise ValueError(f"the text has {len(token_ids)} tokens; expected at least {window}, one window")
    ranks = lora_ranks(scores, r_mean, ig)
    adapters = add_adapters(model, ranks, seed)
    draw, losses, was_training = torch.Generator().manual_seed(seed), [], model.training
    optimizer = torch.optim.AdamW([parameter for each in adapters for parameter in (each.a, each.b)], lr=lr)
    model.train()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # dropout
            for step in range(steps):
                starts = torch.randint(len(token_ids) - window + 1, (batch, 1), generator=draw)
                ids = token_ids[starts + torch.arange(window)]
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                if tell:
                    tell(step + 1, steps, losses[-1])
    finally:
        model.train(was_training)
        merge_adapters(model)
    return losses


def peft_config(scores: Float64[Any, "L"], r_mean: int = 8, ig: Guide = "importance") -> Any:
    """The same adapters as a peft `LoraConfig`: ranks by `rank_pattern`, alphas by `alpha_pattern`."""
    from fewer.errors import require

    ranks = lora_ranks(scores, r_mean, ig)
    places = {rf"layers\.{number}\..*": rank for number, rank in enumerate(ranks)}
    return require("peft", "language").LoraConfig(
        r=r_mean,
        lora_alpha=2 * r_mean,
        lora_dropout=DROPOUT,
        target_modules=list(ADAPTED),
        rank_pattern=places,
        alpha_pattern={place: 2 * rank for place, rank in places.items()},
        task_type="CAUSAL_LM",
    )
