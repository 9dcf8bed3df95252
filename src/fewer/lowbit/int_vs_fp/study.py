"""Integer against floating point blocks of equal bits: how far a language model's next token moves, what a tensor loses, and training.

One window of text a seed, at full scale sixty-four. Rotations are turned by signs that the seed draws. The tensors are looked at with the
first seed, every third layer of the model, forward and backward operands; the classifier of digits is trained in 8 bits with every seed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fewer.lowbit._shared.conversion import exclude_head, linear_maps
from fewer.lowbit.int_vs_fp.model.capture import OPERANDS, ModelReport, analyse_model
from fewer.lowbit.int_vs_fp.model.divergence import Divergence, Reference, divergence
from fewer.lowbit.int_vs_fp.model.linear import Format, convert, revert
from fewer.lowbit.int_vs_fp.problems import (
    BIASED,
    UNBIASED,
    ModelAndText,
    bytes_of,
    model_and_text,
    signed_error,
    torchao_int8,
    train_digits,
    train_small_lm,
)
from fewer.lowbit.int_vs_fp.quantisers import Quantiser
from fewer.lowbit.int_vs_fp.tensors import bits_of
from fewer.lowbit.int_vs_fp.theory import PAIRS
from fewer.study import Curve, Figure, Groups, NotTestable, Results, Scale, Study, Trial
from fewer.study.results import All, bootstrap

WINDOWS = {Scale.QUICK: 1, Scale.FULL: 64}
EVERY = 3  # layers of the model: one of them is looked at, tensor by tensor
PLAIN, ROTATED = "plain", "rotated"
TURNS = ((PLAIN, None), (ROTATED, "block"))
FORWARD, WEIGHTS, GRADIENTS = ("X", "X^T"), ("W", "W^T"), ("dY", "dY^T")
NAMES = {"mx8": "8 bits", "mx6": "6 bits", "mx4": "4 bits, blocks of 32", "nv4": "4 bits, blocks of 16"}


def at(pair: str, turned: str = PLAIN) -> dict[str, Any]:
    return {"pair": pair, "rotation": turned}


study = Study(
    "int-vs-fp",
    question="Which loses less at equal bits, integer blocks or floating point blocks?",
    baseline="fp",
    figures=[
        *(Figure("kl", f"KL, {NAMES[pair]} (nats a token)", at=at(pair)) for pair in PAIRS),
        *(Figure("kl", f"KL, {NAMES[pair]}, rotated", at=at(pair, ROTATED)) for pair in PAIRS),
        Figure("loss", "loss of the next token, 8 bits (nats)", at=at("mx8")),
        Figure("loss", "loss of the next token, 4 bits, blocks of 16", at=at("nv4")),
        Figure("bytes", "weights, 8 bits", "bytes", at=at("mx8")),
        Figure("bytes", "weights, 4 bits, blocks of 16", "bytes", at=at("nv4")),
        Figure("bits", "bits a value, 8-bit formats", "", at=at("mx8")),
        Figure("digits_loss", "held-out loss of the digits' classifier trained in 8 bits"),
        Figure("lm_loss", "held-out loss of a small language model trained in 8 bits (full scale)", detail=True),
        Figure("bias", "signed error of a cast, in standard errors", "", ""),
        Figure("kl_released", "KL as the released script prints it, 8 bits", detail=True, at=at("mx8")),
        Figure("qsnr", "signal over noise of a tensor (dB)", "", "higher", detail=True),
        Figure("advantage", "signal over noise of the integer format minus the other's (dB)", "", "higher", detail=True),
        Figure("ahead", "signal over noise of the integer format minus the other's, by kind of operand (dB)", "", "higher", detail=True),
        Figure("crest", "crest factor of blocks", "", ""),
        Figure("seconds", "time to read the window with a format's casts", "s", detail=True, at=at("mx8")),
    ],
    charts=[
        Groups("kl", over="pair", log=True, at={"rotation": PLAIN}, title="KL to the uncast model, plain"),
        Groups("kl", over="pair", log=True, at={"rotation": ROTATED}, title="KL to the uncast model, rotated"),
        Curve("advantage", over="layer", at=at("mx8"), title="MXINT8 over MXFP8 in dB, layer by layer (inputs and weights)"),
        Curve("advantage", over="layer", at=at("nv4"), title="NVINT4 over NVFP4 in dB, layer by layer (inputs and weights)"),
        Groups("ahead", over="operands", at=at("mx4"), title="MXINT4 over MXFP4 in dB (the weights went through 4 bits once)"),
        Groups("ahead", over="operands", at=at("nv4", ROTATED), title="NVINT4 over NVFP4 in dB, rotated (weights: likewise)"),
        Curve("crest", over="layer", at={"block": 32, "rotation": PLAIN}, title="Crest factor of blocks of 32, layer by layer"),
    ],
    time_limit=4 * 3600,
)
study.option("model", "", help="your own model: a transformers directory, in place of SmolLM2-135M")
study.option("text", "", help="a UTF-8 text file to compare on, in place of State of the Union addresses")
study.option("data", "", help="a JSONL file of prompt and completion to compare on")
study.option("window", 256, help="tokens of a window", least=2)
study.option("whole", True, help="rotated formats, and training in 8 bits, too; no: what the plain formats do to the model")


@dataclass
class Task:
    given: ModelAndText
    scale: Scale

    def windows(self, seed: int) -> list[dict[str, torch.Tensor]]:
        return self.given.windows(seed, WINDOWS[self.scale])


@study.task
def task(scale: Scale, model: str, text: str, data: str, window: int) -> Task:
    return Task(model_and_text(model, text, data, window), scale)


# The arms


def log(trial: Trial, found: Divergence, **coordinates: Any) -> None:
    trial.log("kl", found.kl, **coordinates)
    trial.log("kl_released", found.kl_released, **coordinates)
    trial.log("loss", math.log(found.perplexity), **coordinates)


def log_training(work: Task, trial: Trial, fmt: Format | None) -> None:
    """The classifier of digits, and at full scale a small language model, trained in a format."""
    if not trial.settings.get("whole", True):
        return
    trial.log("digits_loss", train_digits(fmt, trial.seed))
    if work.scale is Scale.FULL:
        trial.log("lm_loss", train_small_lm(fmt, trial.seed))


def referred(work: Task, trial: Trial) -> tuple[nn.Module, Reference]:
    """The model, and what it says itself of the seed's windows."""
    trial.note("model and text", work.given.about)
    model = work.given.model(trial.device)
    return model, Reference.of(model, [batch["input_ids"] for batch in work.windows(trial.seed)])


def one_side(work: Task, trial: Trial, side: int) -> None:
    """All formats of one kind, plain and rotated, in one model; then the classifier in the kind's 8 bits."""
    model, reference = referred(work, trial)
    done, total = 0, (2 if trial.settings.get("whole", True) else 1) * len(PAIRS)
    for turned, rotate in TURNS[: total // len(PAIRS)]:
        for pair, names in PAIRS.items():
            fmt = names[side]
            convert(model, fmt, rotate, seed=trial.seed)
            with trial.measure("cast", **at(pair, turned)) as cost:
                found = divergence(reference, model)
            revert(model)
            log(trial, found, **at(pair, turned))
            trial.log("bits", bits_of(fmt), **at(pair, turned))
            trial.log("bytes", bytes_of(model, bits_of(fmt)), **at(pair, turned))
            trial.log("seconds", cost.figures()["seconds"], **at(pair, turned))
            done += 1
            trial.progress(done, total, f"{fmt}, {turned}: KL {found.kl:.4f}")
    log_training(work, trial, PAIRS["mx8"][side])


study.arm_table(
    one_side,
    {"fp": {"side": 1, "label": "floating point (MXFP, NVFP4)"}, "int": {"side": 0, "label": "integer (MXINT, NVINT4)"}},
    against="fp",
)


@study.arm("reference", label="not cast")
def reference(work: Task, trial: Trial) -> None:
    model, found = referred(work, trial)
    for pair in PAIRS:
        for turned in (PLAIN, ROTATED):
            trial.log("loss", math.log(found.perplexity), **at(pair, turned))
            trial.log("bytes", bytes_of(model, 32), **at(pair, turned))
            trial.log("bits", 32, **at(pair, turned))
    log_training(work, trial, None)


@study.arm("int8-dynamic", label="torchao int8 by row and token")
def by_row(work: Task, trial: Trial) -> None:
    model, found = referred(work, trial)
    size = bytes_of(model, 8)
    log(trial, divergence(found, torchao_int8(model)), **at("mx8"))
    trial.log("bytes", size, **at("mx8"))
    trial.log("bits", 8, **at("mx8"))


def clipped(work: Task, trial: Trial, quantiser: Quantiser) -> None:
    """What clipping does to a cast in bfloat16 arithmetic, and to training."""
    trial.log("bias", signed_error(quantiser, trial.seed))
    log_training(work, trial, quantiser)


study.arm_table(
    clipped,
    {
        "int8-symmetric": {"quantiser": UNBIASED, "label": "INT8 in bfloat16 arithmetic, [-127, 127]"},
        "int8-asymmetric": {"quantiser": BIASED, "label": "INT8 in bfloat16 arithmetic, [-128, 127]", "against": "int8-symmetric"},
    },
)


@study.arm("tensors", label="tensor by tensor")
def tensors(work: Task, trial: Trial) -> None:
    if trial.seed:
        trial.note("not repeated", "tensors are looked at with the first seed alone")
        return
    trial.note("model and text", work.given.about)
    model = work.given.model(trial.device)
    chosen = every_third(model)
    for turned, rotate in TURNS:
        report = analyse_model(model, work.windows(trial.seed)[:1], rotate=rotate, select=lambda name, _: name in chosen)
        log_report(trial, report, turned)
    for pair, names in PAIRS.items():
        best = [own.get(pair) for own in report.recommended.values()]
        trial.note(f"rotated, {NAMES[pair]}", f"{names[0]} suits {best.count(names[0])} of {len(best)} layers, {names[1]} the others")


def every_third(model: nn.Module) -> set[str]:
    """The linear layers of every third decoder layer: of blocks of as many linear layers as the first, where they are numbered."""
    names = [name for name, _ in linear_maps(model, exclude_head(model))]
    numbered = {name: next((int(part) for part in name.split(".") if part.isdigit()), 0) for name in names}
    return {name for name in names if numbered[name] % EVERY == 0}


def log_report(trial: Trial, report: ModelReport, turned: str) -> None:
    groups: dict[str, Sequence[str]] = {"all": OPERANDS, "inputs": FORWARD, "weights": WEIGHTS, "gradients": GRADIENTS}
    for pair, names in PAIRS.items():
        for group, operands in groups.items():
            kept = [report.mean_qsnr(fmt, operands) for fmt in names]
            trial.log("ahead", kept[0] - kept[1], operands=group, **at(pair, turned))
            for fmt, value in zip(names, kept, strict=True):
                trial.log("qsnr", value, format=fmt, rotation=turned, operands=group)
        trial.log("integer_wins", report.win_rate(pair), **at(pair, turned))
        trial.log("predicted", report.agreement(pair), **at(pair, turned))
        for number, layer in enumerate(report.layers):
            own = report.of_layer(layer)
            ours, theirs = (own.mean_qsnr(fmt, ("X", "W")) for fmt in names)
            trial.log("advantage", ours - theirs, layer=number, **at(pair, turned))
    for block, fmt in ((32, "mxint8"), (16, "nvint4")):
        for number, layer in enumerate(report.layers):
            trial.log("crest", report.of_layer(layer).mean_kappa(fmt, ("X", "W")), layer=number, block=block, rotation=turned)


# What the paper claims

ONE_WINDOW = "a seed reads one window of text, and the formats lie close together there"


def ordered(results: Results, pair: str, plain: str, rotated: str) -> All:
    """Each of the two, plain and rotated, diverges less than the other kind of its bits."""

    def less(arm: str, turned: str) -> Any:
        other = "fp" if arm == "int" else "int"
        return results.ratio("kl", arm, other, **at(pair, turned)) < 1

    return less(plain, PLAIN) & less(rotated, ROTATED)


for text, paper, pair, sides in (
    ("8 bits: MXINT8 diverges less than MXFP8, plain and rotated", "12 of 12 models, plain; 12 of 12, rotated", "mx8", ("int", "int")),
    ("6 bits: MXFP6 diverges less than MXINT6, plain and rotated", "12 of 12 models, plain; 11 of 12, rotated", "mx6", ("fp", "fp")),
    ("4 bits: MXFP4 diverges less than MXINT4, plain and rotated", "12 of 12 models, plain; 12 of 12, rotated", "mx4", ("fp", "fp")),
    ("4 bits: NVFP4 diverges less than NVINT4 plain, NVINT4 less rotated", "12 of 12 models; 12 of 12", "nv4", ("fp", "int")),
):
    study.claim(text, paper=paper, if_fails=ONE_WINDOW)(functools.partial(ordered, pair=pair, plain=sides[0], rotated=sides[1]))


def noise(results: Results, fmt: str, turned: str = PLAIN) -> Any:
    return results.mean("qsnr", "tensors", format=fmt, rotation=turned, operands="all")


@study.claim("MXFP8 keeps 31.5 +- 0.5 dB of a tensor", paper="31.50 dB plain, 31.51 rotated, over 10,752 tensors of Llama-3.1-8B")
def flat_floating(results: Results) -> Any:
    return noise(results, "mxfp8_e4m3").between(31.0, 32.0) & noise(results, "mxfp8_e4m3", ROTATED).between(31.0, 32.0)


@study.claim("MXINT8 keeps at least 5 dB more than MXFP8", paper="40.35 against 31.50 dB")
def better_integers(results: Results) -> Any:
    ours, theirs = (noise(results, fmt).per_seed for fmt in PAIRS["mx8"])
    return bootstrap(lambda a, b: a - b, ours, theirs, what="MXINT8 - MXFP8 (dB)") >= 5


@study.claim(
    "The crest factor alone predicts the better format of every pair on at least 80 % of the tensors, plain and rotated",
    paper="crossovers at 7.55, 1.96, 2.04 and 2.39 (figure 2)",
)
def predicted(results: Results) -> Any:
    return All(tuple(results.mean("predicted", "tensors", **at(pair, turned)) >= 0.8 for pair in PAIRS for turned in (PLAIN, ROTATED)))


@study.claim("MXINT8 diverges less than int8 by row and token", paper="third quartile of the crest factor: row 11.97, blocks of 32 2.96")
def finer_blocks(results: Results) -> Any:
    return results.ratio("kl", "int", "int8-dynamic", **at("mx8")) < 1


@study.claim(
    "The digits' classifier trained in MXINT8 and in MXFP8 ends within 0.01 of float32's held-out loss",
    paper="1B, 100B tokens: 2.6758 and 2.6767 against 2.6727",
    if_fails="the loss of 359 held-out digits moves by about 0.005 with any change of the arithmetic",
)
def lossless_training(results: Results) -> Any:
    if not results.has("digits_loss", "reference"):
        raise NotTestable("nothing was trained: `--set whole=no`")
    return All(
        tuple(part for arm in ("int", "fp") for part in results.difference("digits_loss", arm, "reference").between(-0.01, 0.01).parts)
    )


@study.claim(
    "Clipped to [-128, 127] in bfloat16 arithmetic, a cast's signed error lies more than 10 standard errors below 0; to [-127, 127] within 4",
    paper="16.8 % of the maxima of normal draws come to 128",
)
def biased_clip(results: Results) -> Any:
    return (results.mean("bias", "int8-asymmetric") <= -10) & results.mean("bias", "int8-symmetric").between(-4, 4)


@study.claim("Training loses by the asymmetric range", paper="145M, 20B tokens, blocks of 32: 3.1354 against 3.1251")
def asymmetric_training(results: Results) -> Any:
    raise NotTestable("0.01 after 20 billion tokens is too little to be seen in a small model; the bias itself is shown")


@study.claim("Energy and area of MXINT8 are 0.63 and 0.79 of MXFP8's", paper="appendix C")
def hardware(results: Results) -> Any:
    raise NotTestable("the cells' areas and energies are a foundry's, which are not public; `hardware_cost` counts gates")


@study.summary
def summary(results: Results) -> str:
    def kl(arm: str, pair: str, turned: str = PLAIN) -> str:
        return results.say("kl", arm, unit="", **at(pair, turned))

    told = ", ".join(f"{kl('int', pair)} and {kl('fp', pair)} at {NAMES[pair]}" for pair in PAIRS)
    turned = ", ".join(f"{kl('int', pair, ROTATED)} and {kl('fp', pair, ROTATED)}" for pair in PAIRS)
    return (
        f"Cast to integer and to floating point blocks, the model's next token moved by a KL of {told} (nats a token); rotated by {turned}. "
        f"Its loss was {results.say('loss', 'reference', unit='', **at('mx8'))} nats, {results.say('loss', 'int', unit='', **at('mx8'))} in "
        f"MXINT8. Of a tensor MXINT8 kept {noise(results, 'mxint8').value:.1f} dB, MXFP8 {noise(results, 'mxfp8_e4m3').value:.1f}."
    )
