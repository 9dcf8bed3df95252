"""Races: networks of TinyLlama's sizes with 2 of 4 experts, against the dense one and against Mixtral's block with the same slices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fewer.language.factor_llm.peers import mixtral_block
from fewer.language.factor_llm.study import TOP_K, WIDE, wide_pair
from fewer.meters import count_flops, median_seconds
from fewer.study import Bench

bench = Bench("factor-llm")
Work = Callable[[], object]
READ = 128  # tokens of a prompt


def _pair(tokens: int, peer: Callable[..., Any] | None = None) -> tuple[Work, Work]:
    ours, dense = wide_pair(TOP_K, **WIDE)
    theirs = peer(ours) if peer else dense
    x = torch.randn(1, tokens, WIDE["hidden_size"], generator=torch.Generator().manual_seed(0))
    run = lambda module: torch.no_grad()(lambda: module(x))  # noqa: E731
    return run(ours), run(theirs)


@functools.cache
def _quicker_way() -> str:
    """The quicker of the two ways in which transformers computes experts on this machine."""
    seconds = {way: median_seconds(_pair(READ, functools.partial(mixtral_block, way=way))[1], 3) for way in ("eager", "grouped_mm")}
    return min(seconds, key=lambda way: seconds[way])


@bench.race("one token, H = 2,048, I = 5,632, 2 of 4 experts", peer="the dense LlamaMLP", reach=0.625)
def one_token() -> tuple[Work, Work]:
    return _pair(1)


@bench.race("128 tokens of a prompt, the same network", peer="the dense LlamaMLP", reach=0.77)
def a_prompt() -> tuple[Work, Work]:
    return _pair(READ)


@bench.race("one token, the same slices", peer="transformers' Mixtral block, its quicker way", reach=1.0)
def one_token_against_mixtral() -> tuple[Work, Work]:
    return _pair(1, functools.partial(mixtral_block, way=_quicker_way()))


@bench.race("128 tokens, the same slices", peer="transformers' Mixtral block, its quicker way", reach=1.0)
def a_prompt_against_mixtral() -> tuple[Work, Work]:
    return _pair(READ, functools.partial(mixtral_block, way=_quicker_way()))


@bench.quantity("operations of a token", peer="the dense LlamaMLP", unit="FLOP", reach=0.51)
def operations() -> tuple[float, float]:
    totals = []
    for work in _pair(READ):  # one token's products, of vectors, are not counted
        with count_flops() as flops:
            work()
        totals.append(flops.total / READ)
    return totals[0], totals[1]
