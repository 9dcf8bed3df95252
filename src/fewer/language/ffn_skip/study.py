"""Which feed-forward blocks to leave out of decoding: loss, agreement, circles and time with a share of them left out in every way.

The model is the family's small language model (or any directory), calibrated on its training text and judged on text that it has not seen.
Time is also taken on a random Llama large enough for its feed-forward networks to dominate.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewer.language._shared.prenorm import decode_bound, ffn_flops, layers_of
from fewer.language._shared.timing import wide_llama, writing_seconds
from fewer.language._shared.token_rows import repeating
from fewer.language._shared.trained import DATA_HELP, HELD_OUT_HELP, TEXT_HELP, Trained, trained
from fewer.language.ffn_skip.calibration import STEPS, calibrate, find_threshold
from fewer.language.ffn_skip.config import FFNSkipConfig
from fewer.language.ffn_skip.problems import PROMPT, THREE_OF_EIGHT, WINDOW, WRITTEN, decoding, read_texts, way_of, write_on
from fewer.language.ffn_skip.skipping import ffn_skip
from fewer.study import Curve, Figure, Groups, Results, Scale, Study, Trial
from fewer.study.races import time_pairs
from fewer.study.results import bootstrap
from fewer.tasks.lm_training import draw_windows

EIGHTHS = (1, 2, 3)  # of the FFN blocks
TARGETS = {1: 0.12, 2: 0.25, 3: 0.37}  # what the adaptive way is calibrated to
QUARTER: dict[str, Any] = {"skipped": 0.25}
SATURATED = 0.95  # mean similarity from which on a layer hardly moves the state: by 18 degrees at most

study = Study(
    "ffn-skip",
    question="How much does a language model lose when tokens leave out feed-forward blocks, and which way of choosing them loses least?",
    baseline="static",
    figures=[
        Figure("loss", "loss after the warm-up, a quarter skipped (nats)", at=QUARTER),
        Figure("accuracy", "next token right, a quarter skipped", "%", "higher", at=QUARTER),
        Figure("agreement", "token as the full model says", "%", "higher", at=QUARTER),
        Figure("repeating", "texts that go in circles", "%", at=QUARTER),
        Figure("ratio", "blocks skipped after the warm-up", "%", "", at=QUARTER),
        Figure("untouched", "blocks that no row of 16 came to", "%", "higher", at=QUARTER),
        Figure("ffn_flops", "feed-forward operations a token", "FLOP", at=QUARTER),
        Figure("writing_seconds", "processor time to write 32 tokens", "s", at=QUARTER),
        Figure("write.peak_memory", "peak resident memory while writing", "bytes", detail=True, at=QUARTER),
        Figure("speed", "random Llama of width 2,048: times as fast", "", "higher"),
        Figure("gain", "the same, share of what the bound allows", "%", "higher"),
    ],
    charts=[
        Curve("loss", over="skipped", title="Loss after the warm-up over the share of blocks skipped"),
        Curve("similarity", over="layer", title="Mean similarity before and after each feed-forward block"),
        Groups("variant_loss", over="variant", title="Loss of variants of the method (first seed)"),
    ],
    time_limit=2 * 3600,
    seeds=3,
)
study.option("model", "", help="a model directory (Llama, Mistral, Qwen, Gemma 1, OLMo 1, SmolLM3) in place of the small language model")
study.option("text", "", help=TEXT_HELP)
study.option("data", "", help=DATA_HELP)
study.option("held_out", 0, help=HELD_OUT_HELP, least=0)

# windows to calibrate on, steps of the bisection (each passes them all), tokens to judge on
EFFORT = {Scale.QUICK: (8, STEPS, 8_000), Scale.FULL: (128, STEPS, 200_000)}
OWN = (4, 14, 16 * WINDOW)  # a user's own model is larger: at quick scale a third of the passes; 14 steps leave theta to 0.0001
PROMPTS = 16


@dataclass
class Task:
    """A model with its text; `test` is what it is judged on."""

    given: Trained
    model: Any
    test: Tensor
    passages: int  # to calibrate on
    steps: int  # of the bisection
    judged: int  # tokens

    def windows(self, trial: Trial) -> Tensor:
        """Calibration windows of the training text [N, 192]."""
        draw = torch.Generator().manual_seed(trial.seed)
        return draw_windows(self.given.train, self.passages, WINDOW, draw).to(trial.device)

    def texts(self, trial: Trial) -> Tensor:
        """Windows of unseen text [N, 192]; the first tokens of the first sixteen are the prompts."""
        count = max(PROMPTS, self.judged // WINDOW)
        return draw_windows(self.test, count, WINDOW, torch.Generator().manual_seed(trial.seed)).to(trial.device)


@study.task
def task(scale: Scale, model: str, text: str, data: str, held_out: int = 0) -> Task:
    given = trained(model, text, data, window=WINDOW, dense=False)
    loaded = given.model("cpu")
    calibrate(loaded, given.train[None, :2], tokens=1, steps=0)  # a model that cannot be calibrated is told before anything is run
    passages, steps, judged = OWN if model and scale is Scale.QUICK else EFFORT[scale]
    return Task(given, loaded, given.validation, passages, steps, held_out or judged)


def judge(model: Any, task: Task, trial: Trial, config: FFNSkipConfig, *eighths: int) -> None:
    """Log how a model reads and writes in one way at a share skipped (the full one at all shares: a line to compare with)."""
    texts = task.texts(trial)
    read = read_texts(model, texts, config)
    with trial.measure("write", skipped=0.25 if 2 in eighths else eighths[0] / 8):
        written, stats = write_on(model, texts[:PROMPTS], config)
    figures = {
        "loss": read.loss,
        "accuracy": read.accuracy,
        "agreement": read.agreement,
        "repeating": repeating(written),
        "ratio": read.stats.ratio,
        "untouched": stats.untouched_ratio,
        "ffn_flops": (1 - read.stats.ratio) * sum(map(ffn_flops, layers_of(model.model))),
    }
    with ffn_skip(model, dataclasses.replace(config, warmup_tokens=0)):
        figures["writing_seconds"] = writing_seconds(model, texts[:1, :PROMPT])
    for share in eighths:
        for figure, value in figures.items():
            trial.log(figure, value, skipped=share / 8)


@study.arm("full", against="full", label="nothing skipped")
def full(task: Task, trial: Trial) -> None:
    trial.note("language model", task.given.about)
    judge(task.model.to(trial.device), task, trial, FFNSkipConfig.off(), *EIGHTHS)


def skip_and_judge(task: Task, trial: Trial, mode: str) -> None:
    """Calibrate and judge at each share; every way has the window that calibration gives the adaptive one."""
    model = task.model.to(trial.device)
    for eighths in EIGHTHS:
        with trial.measure("calibrate", skipped=eighths / 8):
            steps = task.steps if mode == "adaptive" else 0
            config, report = calibrate(model, task.windows(trial), TARGETS[eighths], WRITTEN, steps=steps)
        judge(model, task, trial, way_of(mode, config, report, eighths / 8, trial.seed), eighths)
        if mode == "adaptive":
            window = f"layers {report.window[0]} to {report.window[1] - 1}, {report.widened} of them added to reach {report.target}"
            trial.note(f"{eighths}/8", f"{window}; threshold {report.threshold:.4f}, {report.achieved_ratio:.3f} skipped in calibration")
    if mode == "adaptive":
        for layer, similarity in enumerate(report.similarity.tolist()):
            trial.log("similarity", similarity, layer=layer)


study.arm_table(
    skip_and_judge,
    {
        "static": {"mode": "static", "label": "the same blocks for all tokens"},
        "random": {"mode": "random", "label": "random blocks"},
        "layer-skip": {"mode": "layers", "label": "whole layers"},
        "ffn-skip": {"mode": "adaptive", "label": "FFN-SkipLLM"},
    },
)


@study.arm("variants", label="FFN-SkipLLM, variants")
def variants(task: Task, trial: Trial) -> None:
    """Warm-up, cold regions and the number of skips, on the first seed."""
    if trial.seed:
        return
    model, windows = task.model.to(trial.device), task.windows(trial)
    config, _ = calibrate(model, windows, QUARTER["skipped"], WRITTEN, steps=task.steps)
    whole = dataclasses.replace(config, cold_start=0, cold_end=len(layers_of(model.model)))
    theta, _ = find_threshold(model.model, windows, whole, QUARTER["skipped"], PROMPT, task.steps)
    table: dict[str, tuple[FFNSkipConfig, int]] = {f"warm-up {steps}": (config, steps) for steps in (0, 8, 25)}
    table |= {f"at most {k} skipped": (dataclasses.replace(config, max_skips=k), 25) for k in (1, 2)}
    table["no cold regions"] = (dataclasses.replace(whole, threshold=theta), 25)
    for variant, (settings, warmup) in table.items():
        read = read_texts(model, task.texts(trial), settings, warmup)
        trial.log("variant_loss", read.loss, variant=variant)
        trial.log("variant_ratio", read.stats.ratio, variant=variant)


@study.arm("wide-llama", against="full", label="random Llama of width 2,048")
def wide(task: Task, trial: Trial) -> None:
    """Tokens decoded one after the other, with three of eight blocks skipped and with none, in turn."""
    model = wide_llama(8).to(trial.device)
    times = time_pairs(decoding(model, 4, THREE_OF_EIGHT), decoding(model, 4), pairs=5)
    speed, bound = statistics.median(times[:, 1] / times[:, 0]), decode_bound(model, 3 / 8)
    for figure, value in {"speed": speed, "bound": bound, "gain": (speed - 1) / (bound - 1)}.items():
        trial.log(figure, value)


YOUNG = "in a model this small and young a block matters about alike to all tokens, so there is little for a threshold to tell apart"


def against(results: Results, other: str) -> Any:
    """The adaptive way's loss minus a rival's at as many blocks skipped: on the line between the rival's shares, as the share that a threshold
    comes to on unseen text is not the one that it was calibrated to."""
    reached, loss = (results.values(figure, "ffn-skip", **QUARTER) for figure in ("ratio", "loss"))

    def line(figure: str) -> Any:  # the rival's figure at its shares from 0 on, seed by seed
        shares = [results.values(figure, other, skipped=each / 8) for each in EIGHTHS]
        return zip(results.values(figure, "full", **QUARTER), *shares, strict=True)

    theirs = np.array([np.interp(*each) for each in zip(reached, line("ratio"), line("loss"), strict=True)])
    return bootstrap(lambda a, b: a - b, loss, theirs, what=f"loss at equal shares, FFN-SkipLLM - {study.arms[other].label}")


RIVALS = {
    "static": "Factoid-QA at 25 %: 78.09 against 74.13",
    "random": "Factoid-QA at 25 %: 78.09 against 49.22",
    "layer-skip": "Factoid-QA at about 20 %: 78.89 against ShortGPT's 70.49",
}
for rival, figures in RIVALS.items():
    study.claim(
        f"Where about a quarter of the blocks is skipped, the adaptive way loses less than {study.arms[rival].label} at as many",
        paper=figures,
        if_fails=YOUNG,
    )(lambda results, rival=rival: against(results, rival) < 0)


@study.claim(
    "With a quarter of the blocks skipped, the loss rises by less than 0.10 nats",
    paper="Factoid-QA at 25 %: 78.09 against 79.02 at full depth",
    if_fails=YOUNG,
)
def little_is_lost(results: Results) -> Any:
    return results.difference("loss", "ffn-skip", "full", **QUARTER) < 0.10


@study.claim(
    "With a quarter of the blocks skipped, fewer texts go in circles (an 8-gram twice) than with whole layers left out",
    paper="repetition and wrong facts from 10 to 15 % of the layers on (no figure)",
    if_fails="a small model's greedy texts go in circles whatever is skipped, the full model's too",
)
def fewer_circles(results: Results) -> Any:
    return results.difference("repeating", "ffn-skip", "layer-skip", **QUARTER) < 0


@study.claim(
    "With three of eight blocks skipped, a random Llama of width 2,048 gains at least 0.85 of what its weights' traffic allows",
    paper="1.20 times as fast at 30 %, 1.37 times at 50 % (RTX A6000)",
)
def as_fast_as_traffic_allows(results: Results) -> Any:
    return results.mean("gain", "wide-llama") >= 0.85


@study.summary
def summary(results: Results) -> str:
    def loss(arm: str) -> str:
        return f"{results.mean('loss', arm, **QUARTER).value:.3f}"

    layers = len(results.curve("similarity", "ffn-skip"))
    mean = [results.mean("similarity", "ffn-skip", layer=layer).value for layer in range(layers)]
    inner = [str(layer) for layer in range(1, layers - 1) if mean[layer] >= SATURATED]
    still = f"layers {', '.join(inner)} hardly move the state" if inner else "all inner layers move the state"
    return (
        f"Mean similarity before and after each feed-forward block: {', '.join(f'{each:.2f}' for each in mean)}: {still} ({SATURATED} is the bound). Where each "
        f"token chose for itself, {results.say('ratio', 'ffn-skip', **QUARTER)} of the blocks were skipped and the loss after the warm-up was "
        f"{loss('ffn-skip')} nats a token in place of {loss('full')} (the same blocks for all tokens {loss('static')}, random blocks "
        f"{loss('random')}, whole layers {loss('layer-skip')}). A random Llama of width 2,048 with three of eight blocks skipped wrote "
        f"{results.mean('speed', 'wide-llama').value:.2f} times as fast; its weights' traffic allows {results.mean('bound', 'wide-llama').value:.2f}."
    )
