"""Four real clips, one after the other, in one network: against the same without the Fourier layer, fine-tuning, and a network each.

Encoding is the task, so there are no held-out data. The quality told is that of the file whose bytes are told: weights of 8 bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewer.devices import one_thread
from fewer.signals.pfnr.archive import VideoArchive
from fewer.signals.pfnr.encoding import fit
from fewer.signals.pfnr.net.network import PFNR, PFNRConfig
from fewer.signals.pfnr.problems import LARGE, SMALL, Recipe, dense, read_clips, rendered_now, study_clips, weigh
from fewer.signals.pfnr.quality import psnr
from fewer.study import Bars, Difference, Figure, Groups, NotTestable, Results, Scale, Study, Tradeoff, Trial

SAME_WEIGHTS = 192  # the stem with which the network without the Fourier operator has as many weights
THIN = 16  # the stem of four small networks that take fewer bytes than the archive

study = Study(
    "pfnr",
    question="How good are four videos in one growing network, and in how many bytes, beside a network each?",
    baseline="separate",
    figures=[
        Figure("psnr", "PSNR at the end, 8 bits", "dB", "higher"),
        Figure("backward_transfer", "change of earlier clips", "dB", "higher"),
        Figure("bytes", "file at 8 bits", "bytes"),
        Figure("mask_bytes", "masks of it", "bytes"),
        Figure("bits_per_pixel", "bits a pixel"),
        Figure("free_fraction", "weights still free", "%", ""),
        Figure("parameters", "masked weights"),
        Figure("seconds", "encoding", "s"),
        Figure("frames_per_second", "frames decoded a second", "", "higher"),
        Figure("psnr_right_after", "PSNR right after its session", "dB", "higher", detail=True),
        Figure("psnr_float", "PSNR at the end, float32 weights", "dB", "higher", detail=True),
        Figure("psnr_joint", "PSNR of all clips trained together", "dB", "higher", detail=True),
        Figure("changed", "earlier clips that no longer decode the same", detail=True),
    ],
    charts=[
        Tradeoff("psnr", "bytes", title="Quality against bytes of all four clips"),
        Groups("psnr_of_clip", over="clip", title="PSNR of each clip at the end"),
        Difference("psnr", title="PSNR beside a network each"),
        Bars(("bytes", "seconds"), title="Beside a network each"),
    ],
    time_limit=24 * 3600,
)
study.option("clips", "", help="a folder of clips of your own: videos, .npz files with `frames`, or folders of pictures")
study.option(
    "wsn", "same-weights", ["same-weights", "same-width"], help="the network without the Fourier operator: as many weights, or as wide"
)
study.option("capacity", 0.5, least=0.01, most=1.0, help="the share of the weights that a video computes with")
study.option("placement", "centred", ["centred", "released"], help="where negative row frequencies go in the larger spectrum")


@dataclass(frozen=True)
class Work:
    """The clips, the network and how it is trained."""

    clips: list[Tensor]
    config: PFNRConfig
    recipe: Recipe


@study.task
def task(scale: Scale, clips: str = "", capacity: float = 0.5, placement: Any = "centred") -> Work:
    config = SMALL if scale is Scale.QUICK else LARGE
    recipe = Recipe() if scale is Scale.QUICK else Recipe(epochs=150, lr=5e-4, batch_size=1, loss="ssim")
    found = read_clips(clips, config) if clips else study_clips(config)
    return Work(found, dataclasses.replace(config, max_sessions=len(found), capacity=capacity, placement=placement), recipe)


# What an arm does


def on_one_thread(arm: Callable[[Work, Trial], None]) -> Callable[[Work, Trial], None]:
    """The arm with one thread at quick scale, where two are slower on frames of 48 x 64."""

    @functools.wraps(arm)
    def run(work: Work, trial: Trial) -> None:
        with one_thread() if trial.scale is Scale.QUICK else contextlib.nullcontext():
            arm(work, trial)

    return run


def tell(work: Work, trial: Trial, right_after: list[Tensor], now: list[Tensor], stored: list[Tensor], seconds: float) -> None:
    """What became of each clip: right after its session, at the end, and out of the file."""
    ends = [psnr(found, clip) for found, clip in zip(now, work.clips, strict=True)]
    starts = [psnr(found, clip) for found, clip in zip(right_after, work.clips, strict=True)]
    files = [psnr(found, clip) for found, clip in zip(stored, work.clips, strict=True)]
    for number, quality in enumerate(files):
        trial.log("psnr_of_clip", quality, clip=number)
    trial.log("psnr", sum(files) / len(files))
    trial.log("psnr_float", sum(ends) / len(ends))
    trial.log("psnr_right_after", sum(starts) / len(starts))
    earlier = range(len(ends) - 1)
    trial.log("backward_transfer", sum(ends[i] - starts[i] for i in earlier) / max(1, len(earlier)))
    trial.log("changed", sum(not torch.equal(now[i], right_after[i]) for i in earlier))
    trial.log("seconds", seconds)


def weigh_all(work: Work, trial: Trial, nets: list[tuple[PFNR, list[Tensor]]]) -> list[Tensor]:
    """The bytes of the files that hold the networks, and the clips as they decode out of them."""
    found = [weigh(net, clips) for net, clips in nets]
    start = time.perf_counter()
    stored = [each.archive.decode(name) for each in found for name in each.archive.names]
    trial.log("frames_per_second", sum(map(len, stored)) / (time.perf_counter() - start))
    size, pixels = sum(each.bytes for each in found), sum(clip.shape[0] * clip.shape[2] * clip.shape[3] for clip in work.clips)
    trial.log("bytes", size)
    trial.log("mask_bytes", sum(each.mask_bytes for each in found))
    trial.log("bits_per_pixel", 8 * size / pixels)
    trial.log("parameters", sum(net.masked_weights() for net, _ in nets))
    trial.log("free_fraction", sum(net.free_fraction for net, _ in nets) / len(nets))
    return stored


def growing(work: Work, trial: Trial, config: PFNRConfig) -> None:
    """An archive to which the clips are added in turn."""
    archive, right_after = VideoArchive(config, torch.Generator().manual_seed(trial.seed)), []
    archive.net.to(trial.device)
    start = time.perf_counter()
    for number, clip in enumerate(work.clips):
        archive.add(clip, f"clip {number}", **dataclasses.asdict(work.recipe))
        right_after.append(archive.decode(f"clip {number}"))
        trial.progress(number + 1, len(work.clips), f"free: {archive.free_fraction:.2f}")
    seconds = time.perf_counter() - start
    now = [archive.decode(f"clip {number}") for number in range(len(work.clips))]
    tell(work, trial, right_after, now, weigh_all(work, trial, [(archive.net, work.clips)]), seconds)
    trial.note("weights by layer", ", ".join(f"{name}: {count:,}" for name, count in archive.net.count_by_layer().items()))


def a_network_each(work: Work, trial: Trial, config: PFNRConfig) -> None:
    """A dense network a clip."""
    nets, decoded, start = [], [], time.perf_counter()
    for number, clip in enumerate(work.clips):
        generator = torch.Generator().manual_seed(1000 * trial.seed + number)
        net = PFNR(dataclasses.replace(dense(config), max_sessions=1), generator).to(trial.device)
        fit(net, {0: clip}, work.recipe.training(), None, generator)
        net.record(net.current_masks())
        nets.append((net, [clip]))
        decoded.append(rendered_now(net, clip, 0))
        trial.progress(number + 1, len(work.clips), "a network each")
    seconds = time.perf_counter() - start  # files are no part of encoding
    tell(work, trial, decoded, decoded, weigh_all(work, trial, nets), seconds)


def finish(work: Work, trial: Trial, net: PFNR, right_after: list[Tensor], seconds: float) -> None:
    """A dense network of all clips at its end."""
    now = [rendered_now(net, clip, number) for number, clip in enumerate(work.clips)]
    for _ in work.clips:
        net.record(net.current_masks())
    tell(work, trial, right_after, now, weigh_all(work, trial, [(net, work.clips)]), seconds)


# The arms


@study.arm("pfnr", label="PFNR")
@on_one_thread
def pfnr(work: Work, trial: Trial) -> None:
    growing(work, trial, work.config)


@study.arm("wsn", label="WSN: no Fourier operator")
@on_one_thread
def wsn(work: Work, trial: Trial) -> None:
    stem = work.config.stem if trial.settings["wsn"] == "same-width" or trial.scale is Scale.FULL else SAME_WEIGHTS
    growing(work, trial, dataclasses.replace(work.config, fso_block=None, stem=stem))


@study.arm("fine-tune", label="one network, fine-tuned")
@on_one_thread
def fine_tune(work: Work, trial: Trial) -> None:
    """Dense, one clip after the other, each with a head of its own; nothing stands still."""
    generator, right_after, start = torch.Generator().manual_seed(trial.seed), [], time.perf_counter()
    net = PFNR(dense(work.config), generator).to(trial.device)
    for number, clip in enumerate(work.clips):
        fit(net, {number: clip}, work.recipe.training(), None, generator)
        right_after.append(rendered_now(net, clip, number))
        trial.progress(number + 1, len(work.clips), "fine-tuning")
    finish(work, trial, net, right_after, time.perf_counter() - start)
    if trial.scale is Scale.FULL:  # all old videos at hand whenever one arrives
        fresh = PFNR(dense(work.config), generator).to(trial.device)
        fit(fresh, dict(enumerate(work.clips)), work.recipe.training(), None, generator)
        jointly = [psnr(rendered_now(fresh, clip, number), clip) for number, clip in enumerate(work.clips)]
        trial.log("psnr_joint", sum(jointly) / len(jointly))


@study.arm("separate", label="a network each")
@on_one_thread
def separate(work: Work, trial: Trial) -> None:
    a_network_each(work, trial, work.config)


@study.arm("separate-small", label="a small network each")
@on_one_thread
def separate_small(work: Work, trial: Trial) -> None:
    a_network_each(work, trial, dataclasses.replace(work.config, stem=work.config.stem * THIN // SMALL.stem))


# What is claimed


@study.claim(
    "earlier videos decode bit for bit as right after their session: backward transfer is exactly 0", paper="lossless decoding (abstract)"
)
def lossless(results: Results) -> Any:
    return (results.mean("changed", "pfnr") <= 0) & results.mean("backward_transfer", "pfnr").between(0, 0)


@study.claim("one growing network ends at least as good as one that is fine-tuned", paper="above continual-learning baselines (abstract)")
def above_fine_tuning(results: Results) -> Any:
    return results.difference("psnr", "pfnr", "fine-tune") >= 0


@study.claim(
    "the Fourier operator is at least as good as the same subnetworks without it",
    paper="the repository's baseline WSN, at equal widths",
    if_fails="a third of its weights are the four spectral tensors of one block; at equal weights the stem of the other network gets them "
    "(--set wsn=same-width compares at equal widths)",
)
def above_wsn(results: Results) -> Any:
    return results.difference("psnr", "pfnr", "wsn") >= 0


@study.claim("the archive of all clips takes at most 0.6 of the bytes of a network each, at 8 bits")
def smaller(results: Results) -> Any:
    return results.ratio("bytes", "pfnr", "separate") <= 0.6


@study.claim("better than the baselines on UVG and DAVIS", paper="tables on UVG8, UVG17 and DAVIS50, which were not read")
def on_uvg(results: Results) -> Any:
    raise NotTestable("neither the videos nor the tables are here; MS-SSIM needs frames of 160 pixels, 17 and 50 sessions a GPU")


@study.summary
def summary(results: Results) -> str:
    say = results.say

    def quality(arm: str) -> str:
        return f"{results.mean('psnr', arm).value:.1f} dB"

    return (
        f"All clips in one network of PFNR: {quality('pfnr')} in {say('bytes', 'pfnr')}, {say('mask_bytes', 'pfnr')} of them masks. A network each "
        f"has {quality('separate')} and takes {say('bytes', 'separate', beside='pfnr')} as much; a small network each has "
        f"{quality('separate-small')} in {say('bytes', 'separate-small')}, since a mask costs a bit an entry and does not compress at c = 0.5. "
        f"Without the Fourier operator it is {quality('wsn')}; fine-tuned, {quality('fine-tune')}. {say('free_fraction', 'pfnr')} of the weights "
        "are still free."
    )
