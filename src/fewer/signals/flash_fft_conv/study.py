"""A small language model of long convolutions on real text, trained alike with torch.fft, with blocks, and with shorter filters; and a genome.

What is trained is held against frequencies taken away afterwards; what a convolution costs is measured beside torch.fft's expression. A
model of filters of 4,096 is streamed over a million bases of E. coli, and held against windows computed at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.data import load_e_coli, load_state_of_the_union
from fewer.fitting import fit_steps
from fewer.inputs import read_text
from fewer.meters import median_seconds, tensor_memory
from fewer.signals.flash_fft_conv import blocks, monarch
from fewer.signals.flash_fft_conv.conv import depthwise_conv1d, fft_conv
from fewer.signals.flash_fft_conv.layers import LongConv, StreamingConv
from fewer.signals.flash_fft_conv.plan import default_factors, make_plan
from fewer.study import Curve, Figure, NotTestable, Results, Scale, Study, Trial
from fewer.study.races import ratio_of_pairs, time_pairs

LENGTH, WIDTH, BLOCKS = 1024, 64, 2
STEPS = {Scale.QUICK: 200, Scale.FULL: 2_000}
BATCH, RATE, WARM_UP = 2, 4e-3, 20
HELD_OUT, ROWS = 12, 64  # every twelfth address; windows of them that are judged
SIZE = 2 * LENGTH  # of the FFT whose frequencies are taken away
KEEP = {0.5: (64, 8), 0.75: (64, 4), 0.9: (52, 2)}  # of 64 x 32: with its mirrors, what is left of the spectrum
MEASURED = (4, 64, 8192)  # batch, channels and length of the convolution whose memory and time are measured
GENOME = {Scale.QUICK: 1_000_000, Scale.FULL: 10**9}  # bases at most
STREAM_WIDTH, STREAM_TAPS, CHUNK = 16, 4096, 2**16
WINDOW, WINDOWS = 2048, 3  # entries that are compared with the stream's
TABLE = (256, 1024, 4096, 8192, 16384, 32768)  # lengths of the paper's table that are raced on a GPU
HALF: dict[str, Any] = {"way": "keep", "removed": 0.5}

study = Study(
    "flash-fft-conv",
    question="What does a long convolution cost without padding, spectra and gates in main memory, and what do shorter or sparser filters lose?",
    baseline="torch.fft",
    figures=[
        Figure("bits", "validation bits a byte"),
        Figure("loss", "validation loss (nats a byte)"),
        Figure("training.cpu_seconds", "processor time of training", "s"),
        Figure("step_ratio", "time of a training step / torch.fft's"),
        Figure("seconds", "gated convolution of 8,192, there and back", "s"),
        Figure("peak_memory", "memory that a gated convolution of 8,192 adds", "bytes"),
        Figure("parameters", "parameters", detail=True),
        Figure("lost_bits", "bits a byte lost by half of the spectrum", at=HALF),
        Figure("stream.seconds", "a genome streamed", "s"),
        Figure("stream.peak_memory", "memory of the process that streams", "bytes"),
        Figure("stream_error", "largest difference from windows at once", detail=True),
    ],
    charts=[
        Curve("training_loss", over="step", title="Training loss (nats a byte)"),
        Curve("lost_bits", over="removed", title="Bits a byte lost by frequencies taken away after training"),
    ],
    time_limit=4 * 3600,
)
study.option("text", "", help="your own text: a UTF-8 file to train on; its last twentieth is held out")


@dataclass(frozen=True)
class Task:
    """Bytes to train on and windows of bytes to judge on."""

    train: Tensor  # uint8 [N]
    test: Tensor  # int64 [rows, LENGTH + 1]


@study.task
def task(scale: Scale, text: str = "") -> Task:
    if text:
        whole = _bytes(read_text(text))
        cut = len(whole) - max(len(whole) // 20, LENGTH + 1)
        if cut <= LENGTH:
            raise ValueError(f"{text} has {len(whole)} bytes; expected at least {2 * (LENGTH + 1)}: name a longer text")
        return Task(whole[:cut], _windows(whole[cut:]))
    addresses = [text for _, text in load_state_of_the_union()]
    held = [text for i, text in enumerate(addresses) if i % HELD_OUT == HELD_OUT - 1]
    return Task(
        _bytes("\n".join(text for i, text in enumerate(addresses) if i % HELD_OUT != HELD_OUT - 1)), _windows(_bytes("\n".join(held)))
    )


def _bytes(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())


def _windows(held: Tensor) -> Tensor:
    """Evenly over the text, each with its next byte."""
    rows = min(ROWS, (len(held) - 1) // LENGTH)
    starts = torch.linspace(0, len(held) - LENGTH - 1, rows).long()
    return held[starts[:, None] + torch.arange(LENGTH + 1)].long()


# The model


Mixer = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # (its LongConv, q, v, g), each [B, H, L] -> g * mixed(q * v)


def by_torch(mixer: nn.Module, q: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The expression that is replaced."""
    assert isinstance(mixer, LongConv)
    u = q * v
    return g * (torch_conv(u, mixer.k) + mixer.skip[:, None] * u)


def torch_conv(u: Tensor, k: Tensor) -> Tensor:
    n = 2 * u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, n=n) * torch.fft.rfft(k, n=n), n=n)[..., : u.shape[-1]]


def by_blocks(mixer: nn.Module, q: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return mixer(v, q, g)


def by_conv1d(mixer: nn.Module, q: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """The cheap alternative: torch's depthwise convolution."""
    assert isinstance(mixer, LongConv)
    u, taps = q * v, mixer.k.shape[1]
    return g * (F.conv1d(F.pad(u, (taps - 1, 0)), mixer.k.flip(-1)[:, None], groups=u.shape[1]) + mixer.skip[:, None] * u)


class Block(nn.Module):
    """x + W_o (g * LongConv(q * v)), then an MLP of four times the width."""

    def __init__(self, width: int, length: int, taps: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.short = nn.Parameter(torch.randn(3 * width, 3) * 0.3)
        self.mixer, self.outer = LongConv(width, length, taps), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mix: Mixer, short: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        u = self.inner(self.norm(x)).transpose(1, 2)
        q, v, g = (depthwise_conv1d(u, self.short, padding="causal") if short is None else short(u, self.short)).chunk(3, 1)
        x = x + self.outer(mix(self.mixer, q, v, g).transpose(1, 2))
        return x + self.mlp(x)


class Model(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, letters: int, width: int, length: int, taps: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(letters, width)
        self.blocks = nn.ModuleList(Block(width, length, taps) for _ in range(BLOCKS))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, tokens: Tensor, mix: Mixer) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mix)
        return self.head(self.norm(x))


def loss_of(model: Model, mix: Mixer, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1], mix).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def judged(model: Model, mix: Mixer, windows: Tensor) -> float:
    """Nats a byte."""
    return float(np.mean([loss_of(model, mix, part).item() for part in windows.split(8)]))


def learn(task: Task, trial: Trial, model: Model, mix: Mixer) -> None:
    steps, draw = STEPS[trial.scale], torch.Generator().manual_seed(trial.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def batches() -> Any:
        while True:
            starts = torch.randint(0, len(task.train) - LENGTH, (BATCH, 1), generator=draw)
            yield task.train[starts + torch.arange(LENGTH + 1)].long().to(trial.device)

    def schedule(step: int) -> float:
        return min((step + 1) / WARM_UP, (steps - step) / (steps - WARM_UP))

    with trial.measure("training"):
        losses = fit_steps(
            optimizer, lambda windows: loss_of(model, mix, windows), batches(), steps, schedule=schedule,
            tell=lambda step, loss: trial.progress(step, steps, f"{loss:.2f} nats"),
        )  # fmt: skip
    for step in range(0, steps, steps // 20):
        trial.log("training_loss", float(np.mean(losses[step : step + steps // 20])), step=step + steps // 20)


# The arms


ARMS: dict[str, dict[str, Any]] = {
    "torch.fft": {"taps": LENGTH, "mix": by_torch},
    "flash-fft-conv": {"taps": LENGTH, "mix": by_blocks, "label": "FlashFFTConv"},
    "partial-256": {"taps": 256, "mix": by_blocks, "label": "filters of 256", "against": "flash-fft-conv"},
    "partial-32": {"taps": 32, "mix": by_blocks, "label": "filters of 32", "against": "flash-fft-conv"},
    "conv1d-31": {"taps": 31, "mix": by_conv1d, "label": "Conv1d of 31", "against": "flash-fft-conv"},
}


def trained(task: Task, trial: Trial, taps: int, mix: Mixer) -> None:
    torch.manual_seed(trial.seed)
    model = Model(256, WIDTH, LENGTH, taps).to(trial.device)
    test = task.test.to(trial.device)
    trial.log("parameters", sum(each.numel() for each in model.parameters()))
    learn(task, trial, model, mix)
    loss = judged(model, mix, test)
    trial.log("loss", loss)
    trial.log("bits", loss / math.log(2))
    if mix is by_blocks and taps == LENGTH:
        without_frequencies(trial, model, test, loss)
        step_ratio(trial, model, test[:BATCH])
        if trial.device == "cuda":
            paper_table(trial)
    if taps == LENGTH:
        what_it_costs(trial, mix)


def without_frequencies(trial: Trial, model: Model, test: Tensor, loss: float) -> None:
    """What the trained model loses where its filters' spectra are cut, by `keep` and by a low pass of as many bins."""
    factors = default_factors(SIZE, (1, 1))
    for removed, keep in KEEP.items():
        mask = monarch.kept_mask(factors, keep)
        trial.note(f"keep {removed}", f"keep={keep} of {factors} removes {1 - mask.mean().item():.1%} of the bins")
        for way, words in (("keep", {"keep": keep}), ("low pass", {"low_pass": int(mask.sum())})):

            def sparse(mixer: nn.Module, q: Tensor, v: Tensor, g: Tensor, words: Any = words) -> Tensor:
                assert isinstance(mixer, LongConv)
                return fft_conv(v, mixer.k, pregate=q, postgate=g, n=SIZE, **words) + g * mixer.skip[:, None] * q * v

            trial.log("lost_bits", (judged(model, sparse, test) - loss) / math.log(2), way=way, removed=removed)


def step_ratio(trial: Trial, model: Model, windows: Tensor) -> None:
    """A training step's time over torch.fft's, in pairs in one process."""

    def step(mix: Mixer) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss_of(model, mix, windows), list(model.parameters()))

    trial.log("step_ratio", ratio_of_pairs(step(by_blocks), step(by_torch), 7))


def gated(shape: tuple[int, int, int], device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    u, pre, post = (torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for _ in range(3))
    return [u, torch.randn(shape[1:], generator=draw).div_(shape[2] ** 0.5).to(device).requires_grad_(), pre, post]


def torch_gated(u: Tensor, k: Tensor, pre: Tensor, post: Tensor) -> Tensor:
    return post * torch_conv(pre * u, k.to(u.dtype))


def blocks_gated(u: Tensor, k: Tensor, pre: Tensor, post: Tensor) -> Tensor:
    return fft_conv(u, k, pregate=pre, postgate=post)


def what_it_costs(trial: Trial, mix: Mixer) -> None:
    """Seconds there and back, and the bytes of tensors that a forward pass adds at its peak, of a gated convolution of 8,192."""
    given = gated(MEASURED, trial.device)
    ours = mix is by_blocks
    call = blocks_gated if ours else torch_gated

    def there_and_back() -> None:
        torch.autograd.grad(call(*given).sum(), given)
        if trial.device == "cuda":
            torch.cuda.synchronize()

    there_and_back()
    trial.log("seconds", median_seconds(there_and_back, 5))
    size = 2 * MEASURED[2]
    job = blocks.Job(make_plan(size, MEASURED[0] * MEASURED[1], trial.device, backend="fft", factors=(size,)))
    with torch.no_grad(), tensor_memory() as memory:  # inside of the operator, where the meter sees its blocks
        u, k, pre, post = given
        _ = blocks.convolve(u, k, pre, post, None, job) if ours else torch_gated(u, k, pre, post)
    trial.log("peak_memory", memory.total)


def paper_table(trial: Trial) -> None:
    """The paper's table: batch 64 x 768 channels, half precision, gated."""
    for length in TABLE:
        given = [each.detach() for each in gated((64, 768, length), trial.device, torch.bfloat16)]
        given[0], given[2], given[3] = (each.bfloat16() for each in (given[0], given[2], given[3]))
        wide = [each.float() for each in given]
        times = time_pairs(lambda: blocks_gated(*given), lambda: torch_gated(*wide), 7)  # noqa: B023 - called at once
        trial.log("speedup", float(np.median(times[:, 1] / times[:, 0])), length=length)


study.arm_table(trained, ARMS)


@study.arm("stream", label="streamed genome", against="flash-fft-conv")
@torch.no_grad()
def stream(task: Task, trial: Trial) -> None:
    """An untrained model goes over the genome in one pass; windows computed at once must agree."""
    torch.manual_seed(trial.seed)
    model = Model(4, STREAM_WIDTH, STREAM_TAPS * 4, STREAM_TAPS).to(trial.device)
    bases = torch.from_numpy(np.searchsorted(np.frombuffer(b"ACGT", np.uint8), np.frombuffer(load_e_coli().encode(), np.uint8)))
    bases = bases[: GENOME[trial.scale]].clamp(max=3)
    streams: dict[int, StreamingConv] = {}

    def one(key: Tensor, filters: Tensor, u: Tensor) -> Tensor:
        return streams.setdefault(id(key), StreamingConv(filters)).step(u)

    def short(u: Tensor, w: Tensor) -> Tensor:
        return one(w, w.flip(-1), u)

    def long(mixer: nn.Module, q: Tensor, v: Tensor, g: Tensor) -> Tensor:
        assert isinstance(mixer, LongConv)
        u = q * v
        return g * (one(mixer.k, mixer.k, u) + mixer.skip[:, None] * u)

    reach = BLOCKS * (STREAM_TAPS + 1)  # entries before a window that its outputs depend on
    ends = torch.linspace(reach + WINDOW, len(bases), WINDOWS).long().tolist()
    found: dict[int, Tensor] = {}
    with trial.measure("stream"):
        recent = torch.zeros(0)
        for start in range(0, len(bases), CHUNK):
            x = model.embedding(bases[None, start : start + CHUNK].to(trial.device))
            for block in model.blocks:
                x = block(x, long, short)
            recent = (
                torch.cat([recent[-WINDOW:], model.head(model.norm(x))[0].cpu()]) if len(recent) else model.head(model.norm(x))[0].cpu()
            )
            done = start + x.shape[1]
            for end in ends:
                if start < end <= done:
                    found[end] = recent[len(recent) - (done - end) - WINDOW : len(recent) - (done - end)].clone()
            trial.progress(done, len(bases), "bases")
    trial.log("bases", len(bases))
    errors = [
        (model(bases[None, end - reach - WINDOW : end].to(trial.device), by_torch)[0, reach:].cpu() - found[end]).abs().max()
        for end in ends
    ]
    trial.log("stream_error", max(float(each) for each in errors))


# What the paper claims


@study.claim("the training ends where torch.fft's does: loss within 1e-3 nats", paper="an exact algorithm")
def same_loss(results: Results) -> Any:
    return results.difference("loss", "flash-fft-conv", "torch.fft").between(-1e-3, 1e-3)


@study.claim(
    "a training step takes no longer than with torch.fft",
    paper="1.9x on M2-BERT, 1.7x on Hyena-s-4K end to end",
    if_fails="two windows of 64 channels are 0.13 M points, whose spectra stay in cache with torch.fft too; what is left is the blocks' calls, "
    "a few tenths of a millisecond; the races show what 4 M points gain",
)
def step_time(results: Results) -> Any:
    return results.mean("step_ratio", "flash-fft-conv") <= 1


@study.claim(
    "filters of 256 lose less than 0.02 bits a byte to filters of 1,024", paper="Hyena-s-8K keeps its perplexity with filters of 2K"
)
def shorter_filters(results: Results) -> Any:
    return results.no_worse("bits", "partial-256", "flash-fft-conv", 0.02, better="lower")


@study.claim(
    "half of the spectrum taken away after training loses less than 0.02 bits a byte",
    paper="50 to 79 % of k_f zeroed: HyenaDNA stays at 2.91-2.90",
    if_fails="filters of so short a training are rough: they are drawn with all frequencies alike, and 200 steps do not smooth them",
)
def sparse_spectrum(results: Results) -> Any:
    return results.mean("lost_bits", "flash-fft-conv", **HALF) < 0.02


@study.claim("a gated convolution of 8,192 adds at most a third of torch.fft's memory", paper="6.34x less at 8K on an H100")
def memory(results: Results) -> Any:
    return results.ratio("peak_memory", "flash-fft-conv", "torch.fft") <= 1 / 3


@study.claim(
    "a genome of a million bases goes through filters of 4,096 in less than 1.5 GiB", paper="HyenaDNA stretched to 4M bases: 2.91 -> 2.90"
)
def bounded_memory(results: Results) -> Any:
    return (results.mean("stream.peak_memory", "stream") < 1.5 * 2**30) & (results.mean("stream_error", "stream") < 1e-3)


@study.claim(
    "on a GPU, gated, 1K to 8K: at least 3 times faster than torch.fft", paper="7.93x, 6.64x and 5.42x at 1K, 4K and 8K on an H100"
)
def matrix_units(results: Results) -> Any:
    if not results.has("speedup", "flash-fft-conv"):
        raise NotTestable("a CPU has no matrix units for half precision here; run with --device cuda")
    first, *rest = (results.mean("speedup", "flash-fft-conv", length=length) >= 3 for length in (1024, 4096, 8192))
    return first & rest[0] & rest[1]


@study.summary
def summary(results: Results) -> str:
    say, ours = results.say, "flash-fft-conv"
    return (
        f"The model reads {say('bits', ours)} bits a byte with blocks and {say('bits', 'torch.fft')} with torch.fft (the same computation), "
        f"{say('bits', 'partial-256')} with filters of 256, {say('bits', 'partial-32')} with filters of 32 and {say('bits', 'conv1d-31')} with a "
        f"Conv1d of 31: so short a training prefers short filters. A gated convolution of 8,192 took {say('seconds', ours, 'torch.fft')} of "
        f"torch.fft's time there and back and {say('peak_memory', ours, 'torch.fft')} of its memory; a training step "
        f"{say('step_ratio', ours)} of its time. Half of the spectrum taken away afterwards lost {say('lost_bits', ours, **HALF)} bits a byte. "
        f"{say('bases', 'stream')} bases were streamed in {say('stream.seconds', 'stream')}."
    )
