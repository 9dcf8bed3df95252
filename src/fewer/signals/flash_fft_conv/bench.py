"""Races over lengths, B H L = 4 M in float32: against torch.fft's expression, scipy's oaconvolve, and on memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewer.errors import require
from fewer.meters import tensor_memory
from fewer.signals.flash_fft_conv import blocks
from fewer.signals.flash_fft_conv.conv import fft_conv
from fewer.signals.flash_fft_conv.plan import make_plan
from fewer.signals.flash_fft_conv.study import MEASURED, blocks_gated, gated, torch_conv, torch_gated
from fewer.study import Bench

bench = Bench("flash-fft-conv")
Call = Callable[[], Any]
POINTS = 2**22
LENGTHS = (256, 1024, 2048, 8192, 16384, 65536, 262144)
NEVER_SLOWER, FORWARD, BOTH, GATED, PARTIAL, SCIPY = 1 / 0.95, 1 / 1.3, 1 / 1.4, 1 / 1.6, 1 / 3, 1 / 1.5
PEER = "irfft(rfft(u, 2L) rfft(k, 2L))"


def _given(length: int) -> list[Tensor]:
    batch = 4 if length <= 2**16 else 2
    return gated((batch, POINTS // batch // length, length), "cpu")


def _forward(length: int) -> tuple[Call, Call]:
    u, k, *_ = (each.detach() for each in _given(length))
    return lambda: fft_conv(u, k), lambda: torch_conv(u, k)


def _gated_forward(length: int) -> tuple[Call, Call]:
    given = [each.detach() for each in _given(length)]
    return lambda: blocks_gated(*given), lambda: torch_gated(*given)


def _both(length: int) -> tuple[Call, Call]:
    u, k, *_ = _given(length)
    dout = torch.randn_like(u)
    return lambda: torch.autograd.grad(fft_conv(u, k), (u, k), dout), lambda: torch.autograd.grad(torch_conv(u, k), (u, k), dout)


def _gated_both(length: int) -> tuple[Call, Call]:
    given = _given(length)
    dout = torch.randn_like(given[0])
    return lambda: torch.autograd.grad(blocks_gated(*given), given, dout), lambda: torch.autograd.grad(torch_gated(*given), given, dout)


for told, make, reach in (
    ("forward", _forward, FORWARD), ("forward and backward", _both, BOTH), ("gated forward", _gated_forward, GATED),
    ("gated forward and backward", _gated_both, GATED),
):  # fmt: skip
    for length in LENGTHS if make is _forward else LENGTHS[1::2]:
        bound = reach if 1024 <= length <= 2**16 else NEVER_SLOWER
        bench.race(f"{told}, L = {length:,}", peer=PEER, reach=bound)(functools.partial(make, length))


@bench.race("filter of L/16, L = 65,536", peer=PEER, reach=PARTIAL)
def partial_filter() -> tuple[Call, Call]:
    u, k, *_ = (each.detach() for each in _given(2**16))
    short = k[:, : 2**12].contiguous()
    return lambda: fft_conv(u, short), lambda: torch_conv(u, short)


@bench.race("filter of L/16, L = 65,536, against oaconvolve", peer="scipy.signal.oaconvolve", reach=SCIPY)
def against_scipy() -> tuple[Call, Call]:
    signal = require("scipy.signal", "signals")
    u, k, *_ = (each.detach() for each in _given(2**16))
    short = k[:, : 2**12].contiguous()
    x, taps = u.numpy(), short.numpy()[None]
    return lambda: fft_conv(u, short), lambda: signal.oaconvolve(x, taps, axes=-1)[..., : x.shape[-1]]


@bench.race("low pass of a quarter of the bins, L = 8,192", peer="our dense convolution")
def low_pass() -> tuple[Call, Call]:
    u, k, *_ = (each.detach() for each in _given(8192))
    return lambda: fft_conv(u, k, low_pass=2049), lambda: fft_conv(u, k)


@bench.quantity("bytes that a gated forward pass adds, (4, 64, 8192)", peer=PEER, unit="bytes", reach=1 / 3)
def added_bytes() -> tuple[float, float]:
    given = [each.detach() for each in gated(MEASURED, "cpu")]
    size = 2 * MEASURED[2]
    job = blocks.Job(make_plan(size, MEASURED[0] * MEASURED[1], backend="fft", factors=(size,)))
    u, k, pre, post = given
    with torch.no_grad(), tensor_memory() as ours:
        _ = blocks.convolve(u, k, pre, post, None, job)
    with torch.no_grad(), tensor_memory() as theirs:
        _ = torch_gated(u, k, pre, post)
    return ours.total, theirs.total
