"""Races against FNOs of the same width and modes: training steps over resolution, answers, and memory at 128 x 128."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewer.meters import tensor_memory
from fewer.signals.transform_once.model import T1
from fewer.signals.transform_once.peers import neuralop_fno
from fewer.signals.transform_once.problems import Pairs
from fewer.signals.transform_once.study import SIZES, both_steps, fno_for, t1_for
from fewer.signals.transform_once.transforms import dct
from fewer.study import Bench

bench = Bench("transform-once")
Call = Callable[[], Any]
BATCH = 8
OWN, PEER = "our FNO, lifted by one map", "neuralop's FNO"


def _given(n: int, batch: int = BATCH) -> tuple[T1, Tensor, Tensor, Pairs]:
    torch.manual_seed(0)
    x, y = torch.randn(batch, 1, n, n), torch.randn(batch, 1, n, n)
    pairs = Pairs(x, y, x, y)
    return t1_for(pairs, SIZES), x, y, pairs


def _rival(name: str, pairs: Pairs) -> nn.Module:
    return (
        fno_for(pairs, SIZES)
        if name == OWN
        else neuralop_fno((SIZES["modes"],) * 2, SIZES["width"], in_channels=1, out_channels=1, n_layers=SIZES["layers"])
    )


def _step(n: int, name: str) -> tuple[Call, Call]:
    t1, x, y, pairs = _given(n)
    return both_steps(t1, _rival(name, pairs), x, y)


def _answer(n: int, name: str) -> tuple[Call, Call]:
    t1, x, _, pairs = _given(n)
    rival = _rival(name, pairs)

    def quietly(model: nn.Module) -> Call:
        @torch.no_grad()
        def answer() -> Tensor:
            return model(x)

        return answer

    return quietly(t1), quietly(rival)


for name in (OWN, PEER):
    for n, reach in ((32, 1.0), (64, 1 / 5), (128, 1 / 15)):
        bench.race(f"a training step at {n} x {n}, against {name}", peer=name, reach=reach)(functools.partial(_step, n, name))
    bench.race(f"{BATCH} answers at 64 x 64, transforms included, against {name}", peer=name, reach=1 / 5)(
        functools.partial(_answer, 64, name)
    )


@bench.quantity("peak bytes of a training step at 128 x 128", peer=OWN, unit="bytes", reach=1 / 10)
def peak_bytes() -> tuple[float, float]:
    t1, x, y, pairs = _given(128)
    fno = fno_for(pairs, SIZES)
    ours, theirs = both_steps(t1, fno, x, y)
    found = []
    for model, step in ((t1, ours), (fno, theirs)):
        step()
        with tensor_memory(model) as memory:
            step()
        found.append(memory.total)
    return found[0], found[1]


@bench.race("the DCT of 64 fields of 64 x 64", peer="scipy.fft.dctn", reach=None)
def transforms() -> tuple[Call, Call]:
    from scipy.fft import dctn

    x = torch.randn(64, 64, 64)
    array = x.numpy()
    return lambda: dct(x, (1, 2)), lambda: dctn(array, axes=(1, 2), norm="ortho")
