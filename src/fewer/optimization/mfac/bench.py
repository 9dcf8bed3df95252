"""Races: the window against the two matrix-vector products it cannot do without, the factor against the recursion and a dense solve."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fewer.optimization.mfac.inverse_fisher import InverseFisher
from fewer.optimization.mfac.optimizer import MFAC
from fewer.optimization.mfac.recursion import precompute
from fewer.optimization.mfac.window.sliding_window import SlidingInverseFisher
from fewer.study import Bench
from fewer.tasks import resnet20

bench = Bench("mfac")
Call = Callable[[], object]


def _gradients(m: int, d: int) -> torch.Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(0))


def _push_and_apply(m: int, d: int) -> tuple[Call, Call]:
    """Pushing and applying a gradient on a full window; one G x and one G^T y in float32."""
    grads = _gradients(m, d)
    window = SlidingInverseFisher(m, d, 1e-4)
    for g in grads:
        window.push(g)
    fresh, x, y = itertools.cycle(_gradients(8, d) + 1), grads[0].clone(), torch.randn(m)
    return lambda: window.push_and_apply(next(fresh)), lambda: (grads @ x, grads.T @ y)


@bench.race("push and apply, m = 128, d = 100,000", peer="the two plain matrix-vector products", reach=1.3)
def push_128() -> tuple[Call, Call]:
    return _push_and_apply(128, 100_000)


@bench.race("push and apply, m = 256, d = 300,000", peer="the two plain matrix-vector products", reach=1.3)
def push_256() -> tuple[Call, Call]:
    return _push_and_apply(256, 300_000)


@bench.race("push and apply, m = 512, d = 100,000", peer="the two plain matrix-vector products", reach=1.3)
def push_512() -> tuple[Call, Call]:
    return _push_and_apply(512, 100_000)


@bench.race("static precomputation, m = 256, d = 100,000", peer="the paper's recursion in float32", reach=0.2)
def precomputation() -> tuple[Call, Call]:
    grads = _gradients(256, 100_000)
    return lambda: InverseFisher(grads, 1e-3), lambda: precompute(grads[None], 1e-3)


@bench.race("a product with its precomputation, m = 256, d = 2,000", peer="a dense numpy solve", reach=1.0)
def dense() -> tuple[Call, Call]:
    grads, x = _gradients(256, 2000), torch.randn(2000)
    g64, x64 = grads.double().numpy(), x.double().numpy()
    return (
        lambda: InverseFisher(grads, 1e-3) @ x,
        lambda: np.linalg.solve(1e-3 * np.eye(2000) + g64.T @ g64 / 256, x64),
    )


def _step(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Call:
    """A whole training step of the study's network, the gradient included."""
    torch.manual_seed(0)
    model, x, y = resnet20((1, 28, 28), 10, (4, 8, 16), stem_stride=2), torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
    optimizer = make(model)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    for _ in range(140):  # the window is full
        step()
    return step


@bench.race("a training step with its gradient, ResNet-20 of 17,254 weights, batch 64, m = 128", peer="AdamW(fused=True)", reach=2.0)
def training_step() -> tuple[Call, Call]:
    ours = _step(lambda model: MFAC(model.parameters(), lr=1e-6, window=128, damping=1e-4))
    return ours, _step(lambda model: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True))
