"""Races: masked weights that are made once beside masks in every call, one Fourier operator beside a convolution, and bytes of files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from fewer.signals.pfnr.archive import VideoArchive
from fewer.signals.pfnr.net.network import PFNR
from fewer.signals.pfnr.net.subnetworks import FourierSubneuralOperator, SubnetConv2d
from fewer.signals.pfnr.problems import SMALL, Recipe, dense, study_clips, weigh
from fewer.study import Bench

bench = Bench("pfnr")
Call = Callable[[], Any]
FRAMES = 64


@bench.race("decoding 64 frames of 48 x 64, masked weights made once", peer="masks in every call, as released", reach=1.0)
def decoding() -> tuple[Call, Call]:
    net = PFNR(SMALL, torch.Generator().manual_seed(0)).eval()
    net.record(net.current_masks())
    masks, times = net.masks(0), (torch.arange(FRAMES) / FRAMES).split(1)

    @torch.no_grad()
    def once() -> None:
        weights = net.effective(masks)
        for t in times:
            net.render(t, 0, weights)

    @torch.no_grad()
    def every_call() -> None:
        for t in times:
            net.render(t, 0, net.effective(masks))

    return once, every_call


@bench.race("one Fourier operator, 16 to 24 channels, 12 x 16 to 24 x 32", peer="a 3 x 3 convolution with PixelShuffle")
def one_block() -> tuple[Call, Call]:
    x = torch.rand(2, 16, 12, 16)
    spectral, plain = FourierSubneuralOperator(16, 24, (6, 8), 2), SubnetConv2d(16, 24, 2)
    weights, kernels = spectral.effective(spectral.masks()), plain.effective(plain.masks())

    @torch.no_grad()
    def ours() -> None:
        spectral.run(x, weights)

    @torch.no_grad()
    def theirs() -> None:
        plain.run(x, kernels)

    return ours, theirs


@bench.quantity("bytes of four clips at 8 bits", peer="a network each, saved the same way", unit="bytes", reach=0.6)
def file_bytes() -> tuple[float, float]:
    clips = study_clips(SMALL)
    archive = VideoArchive(SMALL, torch.Generator().manual_seed(0))
    for number, clip in enumerate(clips):
        archive.add(clip, f"clip {number}", **dataclasses.asdict(Recipe()))
    each = PFNR(dataclasses.replace(dense(SMALL), max_sessions=1), torch.Generator().manual_seed(0))
    each.record(each.current_masks())  # all weights, so that training changes no byte count
    return float(weigh(archive.net, clips).bytes), float(4 * weigh(each, clips[:1]).bytes)
