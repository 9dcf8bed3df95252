"""What study and bench are about: texts to read and to go on from, the ways of skipping at equal shares, and a Llama whose FFNs dominate."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from fewer.language._shared.speculative import CACHE
from fewer.language._shared.timing import write
from fewer.language.ffn_skip.calibration import CalibrationReport
from fewer.language.ffn_skip.config import FFNSkipConfig
from fewer.language.ffn_skip.skipping import ffn_skip, read, reading
from fewer.language.ffn_skip.stats import FFNSkipStats

PROMPT, WRITTEN, WARMUP = 64, 128, 25  # tokens
WINDOW = PROMPT + WRITTEN
THREE_OF_EIGHT = FFNSkipConfig(2, 6, threshold=-1.0, warmup_tokens=0)  # of 8 layers, for every token
Work = Callable[[], Any]


def way_of(mode: str, config: FFNSkipConfig, report: CalibrationReport, share: float, seed: int) -> FFNSkipConfig:
    """A way of leaving out a share of the FFNs for each token in the window of an adaptive one.

    "static" takes the FFNs of the largest mean similarity, "random" each with the same probability, and "layers" whole layers, those of
    the smallest influence, as ShortGPT ranks them.
    """
    window, blocks = range(config.cold_start, config.cold_end), max(1, round(share * len(report.similarity)))
    rank = report.similarity if mode == "static" else -report.influence
    chosen = tuple(sorted(window, key=lambda layer: -float(rank[layer]))[:blocks])
    if mode == "adaptive":
        return config
    if mode == "random":
        return dataclasses.replace(config, mode="random", p=blocks / len(window), seed=seed)
    return dataclasses.replace(config, mode=mode, static_layers=chosen)  # pyright: ignore[reportArgumentType]


class Reading(NamedTuple):
    """How well texts are predicted after the warm-up: nats a token, share of next tokens right, share told as the full model tells them."""

    loss: float
    accuracy: float
    agreement: float
    stats: FFNSkipStats


def read_texts(model: Any, texts: Tensor, config: FFNSkipConfig, warmup: int = WARMUP, batch: int = 8) -> Reading:
    """Texts [N, 192] read as if all but their first 64 tokens were decoded; the same tokens are judged whatever the warm-up is."""
    parts, judged = texts.split(batch), slice(PROMPT + WARMUP, -1)
    with torch.no_grad():
        full = [model(input_ids=part, use_cache=False).logits[:, judged].argmax(-1) for part in parts]
    loss = right = same = 0.0
    with reading(model, config, PROMPT + warmup) as stats:
        for part, as_full in zip(parts, full, strict=True):
            logits, following = read(model, part).logits[:, judged], part[:, PROMPT + WARMUP + 1 :]
            loss += F.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="sum").item()
            right += (logits.argmax(-1) == following).sum().item()
            same += (logits.argmax(-1) == as_full).sum().item()
    tokens = len(texts) * (WRITTEN - WARMUP - 1)
    return Reading(loss / tokens, right / tokens, same / tokens, stats)


def write_on(model: Any, texts: Tensor, config: FFNSkipConfig, tokens: int = WRITTEN) -> tuple[Tensor, FFNSkipStats]:
    """(what is written greedily after the texts' first 64 tokens, of so many tokens those after the warm-up; the counts)."""
    with ffn_skip(model, config) as stats:
        return write(model, texts[:, :PROMPT], tokens)[:, WARMUP:], stats


def decoding(model: Any, tokens: int, config: FFNSkipConfig | None = None) -> Work:
    """A call that decodes so many tokens, one a pass, on from what was read before; transformers' own where no settings are given.

    They leave the cache again: each call does the same work, and no time goes into copying what earlier calls decoded.
    """
    cache = {CACHE: DynamicCache(config=model.config)}
    with torch.no_grad():
        model(torch.tensor([[1, 2]], device=model.device), use_cache=True, **cache)

    @torch.no_grad()
    def work() -> FFNSkipStats | None:
        with ffn_skip(model, config) if config else contextlib.nullcontext() as stats:
            for token in torch.ones(tokens, 1, 1, dtype=torch.long, device=model.device):
                model(token, use_cache=True, **cache)
        cache[CACHE].crop(-tokens)
        return stats

    return work
