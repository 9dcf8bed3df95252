"""Races: the layer against Mixtral's, forward and backward, at D = 512, I = 1,408 on 2,048 tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewer.language.moe_plus_plus.layer import MoEPlusPlus
from fewer.language.moe_plus_plus.model import MoEPlusPlusConfig
from fewer.language.moe_plus_plus.peers import mixtral_block
from fewer.language.moe_plus_plus.router import select
from fewer.language.moe_plus_plus.study import TIMED, WIDE, forced_layer
from fewer.meters import count_flops, median_seconds
from fewer.study import Bench

bench = Bench("moe-plus-plus")
Work = Callable[[], object]
SHARE = 0.6  # of the assignments go to networks where tau is 0.75 and the balance loss rests


def _input() -> Tensor:
    return torch.randn(1, TIMED, WIDE["hidden_size"], generator=torch.Generator().manual_seed(0))


def _logits(share: float = SHARE) -> Tensor:
    """Router logits of 8 + 4 experts of whose two largest this share are networks: the free ones are raised until it is so."""
    drawn = torch.randn(TIMED, 12, generator=torch.Generator().manual_seed(1))
    low, high = -5.0, 5.0
    for _ in range(40):
        middle = (low + high) / 2
        found = (select(drawn + middle * (torch.arange(12) >= 8), 2) < 8).float().mean()
        low, high = (middle, high) if found > share else (low, middle)
    return drawn + low * (torch.arange(12) >= 8)


def _both_ways(run: Callable[[Tensor], Tensor], module: torch.nn.Module) -> Work:
    x = _input().requires_grad_()

    def work() -> None:
        module.zero_grad()
        run(x).sum().backward()

    return work


@functools.cache
def _quicker_peer() -> str:
    """The quicker of the two ways in which transformers computes experts on this machine."""
    seconds = {}
    for way in ("eager", "grouped_mm"):
        block = mixtral_block(8, **WIDE, way=way)
        seconds[way] = median_seconds(_both_ways(block, block), 5)
    return min(seconds, key=lambda way: seconds[way])


def _peer() -> Work:
    block = mixtral_block(8, **WIDE, way=_quicker_peer())
    return _both_ways(block, block)


def _ours(config: MoEPlusPlusConfig) -> tuple[MoEPlusPlus, Tensor]:
    return forced_layer(config, **WIDE).eval(), _logits()


VANILLA: dict[str, Any] = WIDE | {"num_zero": 0, "num_copy": 0, "num_constant": 0, "gate_residual": False}
PLUS: dict[str, Any] = {"num_ffn_experts": 8, "num_zero": 1, "num_copy": 1, "num_constant": 2}


@bench.race(
    "forward and backward, tau 0.75, 0.6 of the assignments to networks", peer="transformers' Mixtral block, its quicker way", reach=0.8
)
def with_free_experts() -> tuple[Work, Work]:
    layer, logits = _ours(MoEPlusPlusConfig(**PLUS))
    return _both_ways(lambda x: layer(x, logits).hidden_states, layer), _peer()


@bench.race("forward and backward without free experts", peer="transformers' Mixtral block, its quicker way", reach=1 / 0.95)
def without_free_experts() -> tuple[Work, Work]:
    torch.manual_seed(0)
    layer = MoEPlusPlus(**VANILLA, gating="renorm")
    return _both_ways(lambda x: layer(x).hidden_states, layer), _peer()


@bench.quantity("operations of a forward pass, tau 0.75", peer="transformers' Mixtral block", unit="FLOP", reach=0.65)
def operations() -> tuple[float, float]:
    layer, logits = _ours(MoEPlusPlusConfig(**PLUS))
    block, x = mixtral_block(8, **WIDE, way="eager"), _input()
    totals = []
    for run in (lambda: layer(x, logits), lambda: block(x)):
        with count_flops() as flops, torch.no_grad():
            run()
        totals.append(float(flops.total))
    return totals[0], totals[1]


@bench.quantity("seconds of router, sorting and free experts alone", peer="the whole vanilla layer", unit="s", reach=0.15)
def overhead() -> tuple[float, float]:
    layer, logits = _ours(MoEPlusPlusConfig(**PLUS))
    vanilla = MoEPlusPlus(**VANILLA).eval()
    x = _input()
    with torch.no_grad():
        whole = median_seconds(lambda: vanilla(x), 9)
        layer.experts.forward = lambda rows, counts: rows  # what is left when the networks take no time
        return median_seconds(lambda: layer(x, logits), 9), whole
