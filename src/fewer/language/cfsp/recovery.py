"""Recovery after pruning: low-rank adapters whose ranks follow block importance (IG-LoRA, section 3.4 of the paper), merged at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from fewer.checks import check_choice, check_positive, check_whole
from fewer.errors import require
from fewer.fitting import fit_steps
from fewer.language._shared.lora import adapted
from fewer.tasks.lm_training import check_window, draw_windows

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
    check_choice(get_args(Guide), ig=ig)
    check_whole(r_mean=r_mean)
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
    tell: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train adapters on windows of a stream of tokens and merge them, in place; shapes stay as they are.

    Args:
        model: as `prune` left it, of any floating point dtype (the adapters are float32).
        token_ids: training text, its documents one after the other.
        steps: optimiser steps (AdamW).
        scores: S_l, `PruneReport.scores`.
        r_mean: mean rank; each adapter's alpha is twice its rank, its dropout 0.05.
        ig: what ranks follow.
        lr, batch, window, seed: of the training.
        tell: called with the step (from 1) and its loss.

    Returns:
        The training loss of each step, nats a token.

    Raises:
        ValueError: a number that cannot be, or a text shorter than one window.
        FloatingPointError: a loss is not finite; the adapters of the step before are merged.
    """
    check_whole(steps=steps, batch=batch)
    check_positive(lr=lr)
    check_window(token_ids, window)
    place, draw, was_training = next(model.parameters()).device, torch.Generator().manual_seed(seed), model.training
    batches = (draw_windows(token_ids, batch, window, draw).to(place) for _ in range(steps))
    with torch.random.fork_rng(), adapted(model, peft_config(scores, r_mean, ig), seed) as wrapped:  # dropout is drawn from the seed too
        optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=lr)
        wrapped.train()
        try:
            return fit_steps(optimizer, lambda ids: wrapped(input_ids=ids, labels=ids, use_cache=False).loss, batches, steps, tell=tell)
        finally:
            wrapped.train(was_training)


def peft_config(scores: Float64[Any, "L"], r_mean: int = 8, ig: Guide = "importance") -> Any:
    """The same adapters as a peft `LoraConfig`: ranks by `rank_pattern`, alphas by `alpha_pattern`."""
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
