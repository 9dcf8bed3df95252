"""Races: a layer's step beside nn.Linear's, what it keeps beside it, and torchao's 8-bit training layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fewer.errors import require
from fewer.lowbit.fp4_training.linear import FP4Linear
from fewer.lowbit.fp4_training.recipe import FP4Recipe
from fewer.meters import saved_bytes
from fewer.study import Bench

bench = Bench("fp4-training")
Work = Callable[[], object]
M, K, N = 1024, 512, 512
NEAREST = FP4Recipe.preset("nvfp4").replace(stochastic=frozenset())
ROTATED = FP4Recipe.preset("nvfp4").replace(hadamard="backward")


def _layer(recipe: FP4Recipe | None) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    return FP4Linear.from_linear(linear, recipe) if recipe else linear


def _step(layer: nn.Module) -> Work:
    """Forward and backward pass of a layer, on inputs that want a gradient."""
    draw = torch.Generator().manual_seed(0)
    x, dy = torch.randn(M, K, generator=draw, requires_grad=True), torch.randn(M, N, generator=draw)

    def step() -> None:
        layer(x).backward(dy)
        layer.zero_grad()
        x.grad = None

    return step


SHAPE = f"forward and backward, {M} x {K} x {N}"


@bench.race(f"{SHAPE}, NVFP4 to nearest", peer="torch.nn.Linear, float32", reach=1.8)
def nearest() -> tuple[Work, Work]:
    return _step(_layer(NEAREST)), _step(_layer(None))


@bench.race(f"{SHAPE}, NVFP4, stochastic dY, Hadamard backward", peer="torch.nn.Linear, float32", reach=2.3)
def rotated() -> tuple[Work, Work]:
    return _step(_layer(ROTATED)), _step(_layer(None))


@bench.race(f"{SHAPE}, NVFP4 to nearest", peer="torchao int8_mixed_precision_training")
def against_int8() -> tuple[Work, Work]:
    """torchao's training layer that a CPU runs: int8 products, scales by row."""
    quantization = require("torchao.quantization", "peers")
    prototype = require("torchao.prototype.quantized_training", "peers")
    peer = nn.Sequential(_layer(None))
    quantization.quantize_(peer, prototype.int8_mixed_precision_training())
    return _step(_layer(NEAREST)), _step(peer)


@bench.quantity(f"kept for the backward pass, {M} x {K}", peer="torch.nn.Linear, float32", unit="bytes", reach=0.16)
def kept() -> tuple[float, float]:
    found = []
    for recipe in (NEAREST, None):
        layer = _layer(recipe)
        x = torch.randn(M, K, requires_grad=True)
        with saved_bytes(layer) as saved:
            layer(x)
        found.append(saved.total)
    return found[0], found[1]
