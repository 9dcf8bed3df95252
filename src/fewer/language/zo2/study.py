"""MeZO with everything in memory, with its blocks on disk, with shorter ones, and AdamW: memory and time of a step, its bits, and what is learnt."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewer.data import fetch_smollm2, load_state_of_the_union
from fewer.devices import one_thread
from fewer.language._shared.fine_tuning import fine_tune
from fewer.language._shared.model_directory import load_directory, load_tokenizer
from fewer.language._shared.trained import corpus_of_pairs
from fewer.language.zo2.checkpoints import Digest
from fewer.language.zo2.costs.break_even import HIDDEN, LENGTH, ROWS, steps_by_batch
from fewer.language.zo2.costs.wide import resident, warm, wide_model
from fewer.language.zo2.mezo import MeZO, StepResult, ZO2Config
from fewer.language.zo2.streaming import ZO2
from fewer.study import Curve, Figure, Results, Scale, Study, Tradeoff, Trial
from fewer.study.races import ratio_of_pairs
from fewer.study.results import NotTestable, bootstrap
from fewer.study.spaces import Choice
from fewer.tasks import fetch_small_lm, token_loss
from fewer.tasks.language_corpus import Corpus, text_corpus, token_stream
from fewer.tasks.lm_training import check_window, draw_windows

STEPS = {Scale.QUICK: 200, Scale.FULL: 1000}
BATCH, WINDOW = 8, 128
BITS_SHAPE, BITS_STEPS, BITS_LR = (2, 64), 3, 1e-5
COST_SHAPE = (2, 32)
HELD_OUT = 8192  # tokens
ADDRESSES, UNSEEN = 12, 2  # the last addresses, and how many of them are held out
SMALL = "family-xs"

study = Study(
    "zo2",
    question="What does streaming a model's blocks save when it is fine-tuned by forward passes alone, and are the results the same?",
    baseline="mezo",
    figures=[
        Figure("peak_memory", "peak memory of a step, above the libraries'", "bytes"),
        Figure("cpu_seconds", "processor time of a step", "s"),
        Figure("bytes", "blocks read and written a step", "bytes"),
        Figure("drawn", "random numbers drawn a step"),
        Figure("loss", "held-out loss after (nats)"),
        Figure("gain", "held-out loss won (nats)", "", "higher"),
        Figure("lost", "updates lost to rounding", "%"),
        Figure("streaming", "time of a streamed step over one in memory, by tokens", "x", detail=True),
        Figure("first_loss", "held-out loss before (nats)", detail=True),
        Figure("training_loss", "training loss (nats)", detail=True, at={"step": STEPS[Scale.QUICK]}),
    ],
    charts=[
        Tradeoff("cpu_seconds", "peak_memory", title="Processor time of a step against its peak memory"),
        Curve("training_loss", over="step", title="Training loss"),
        Curve("streaming", over="tokens", title="Time of a step with blocks streamed over one in memory"),
        Curve("bits_loss", over="step", title="Losses of the same steps on the real model"),
    ],
    time_limit=3600,
    objective="validation loss won (nats)",
    seeds=3,
)
study.option("model", "", help="a Llama, Mistral, Qwen2, Qwen3, Gemma, OPT or GPT-2 directory in place of SmolLM2-135M")
study.option("text", "", help="a UTF-8 text file to learn, its end held out, in place of the presidents' addresses")
study.option("data", "", help="a JSONL file of prompt and completion to learn, the last tenth of it held out")


@dataclass
class Task:
    """The directories of the three models, and text to learn in tokens.

    Attributes:
        model: the one whose bits are compared, with tokens of its own in `tokens`.
        small: the one that learns.
    """

    model: Path
    tokens: Tensor
    small: Path
    train: Tensor
    validation: Tensor
    test: Tensor
    scale: Scale

    def small_model(self) -> Any:
        return load_directory(self.small, "float32")[0]

    def batches(self, seed: int, steps: int, device: str) -> Iterator[Tensor]:
        for step in range(steps):
            draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
            yield draw_windows(self.train, BATCH, WINDOW, draw).to(device)


@study.task
def task(scale: Scale, model: str, text: str, data: str) -> Task:
    corpus = corpus_of(text, data)
    small, folder = fetch_small_lm(SMALL), Path(model) if model else fetch_smollm2()
    tokenizer = load_tokenizer(small)
    train, test = token_stream(tokenizer, corpus.train), token_stream(tokenizer, corpus.validation)
    for part in (train, test):
        check_window(part, 2 * WINDOW)
    words = token_stream(load_directory(folder)[1] if model else load_tokenizer(folder), [("", corpus.train[0][1][:4000])])
    check_window(words, BITS_SHAPE[1])
    half = len(train) // 20
    return Task(folder, words, small, train[:-half], train[-half:] if half > WINDOW else test, test[:HELD_OUT], scale)


def corpus_of(text: str, data: str) -> Corpus:
    """What is to be learnt, and a part that is held out."""
    if data:
        return corpus_of_pairs(data)
    if text:
        return text_corpus([text])
    addresses = load_state_of_the_union()[-ADDRESSES:]
    return Corpus(tuple(addresses[:-UNSEEN]), tuple(addresses[-UNSEEN:]), "addresses of presidents")


# Costs


Step = Callable[[Tensor], object]


def cost_of(make: Callable[[], tuple[Step, Callable[[], dict[str, float]]]], trial: Trial) -> None:
    """What a step of 2 x 32 tokens costs on one thread, after one that is not timed; memory counts from before the model is read."""
    ids = torch.randint(4096, COST_SHAPE, generator=torch.Generator().manual_seed(0))
    wide = wide_model()
    warm(wide)
    before = resident()
    with trial.measure("whole") as whole:
        step, counts = make()
        step(ids)
        at = counts()
        with one_thread(), trial.measure("step") as cost:
            step(ids)
    counted = counts()
    trial.log("peak_memory", max(cost.figures()["peak_memory"], whole.figures()["peak_memory"] if counted["bytes"] else 0) - before)
    trial.log("cpu_seconds", cost.figures()["cpu_seconds"])
    for name in counted:
        trial.log(name, counted[name] - at[name])


@contextlib.contextmanager
def counted_draws() -> Iterator[list[int]]:
    """How many numbers torch.normal draws inside the block, seen from outside."""
    drawn, normal = [0], torch.normal

    def counted(*args: Any, **words: Any) -> Tensor:
        made = normal(*args, **words)
        drawn[0] += made.numel()
        return made

    torch.normal = counted
    try:
        yield drawn
    finally:
        torch.normal = normal


# Ways to train


def in_memory(folder: Path) -> Any:
    """The whole model, read as it is for all of them."""
    return ZO2.from_pretrained(folder, ZO2Config(store="none", working_device="cpu")).model


def mezo_step(model: Any, lr: float, seed: int) -> Callable[[Tensor], StepResult]:
    optimizer = MeZO(model.named_parameters(), lr=lr, seed=seed)

    def step(ids: Tensor) -> StepResult:
        optimizer.step(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
        return optimizer.last

    return step


def adamw_step(model: Any, lr: float) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0)

    def step(ids: Tensor) -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def run_mezo(task: Task, trial: Trial) -> None:
    lr = float(trial.settings["lr"])
    if trial.seed == 0 and not trial.tuning:
        with counted_draws() as drawn:
            cost_of(lambda: (mezo_step(in_memory(wide_model()), 1e-6, 0), lambda: {"bytes": 0, "drawn": drawn[0]}), trial)
        gc.collect()
        model = in_memory(task.model)
        log_bits(task, trial, mezo_step(model, BITS_LR, 0), lambda: digest_of([dict(model.named_parameters())]))
        del model
    model = task.small_model().to(trial.device)
    learn(task, trial, mezo_step(model, lr, trial.seed), lambda: model)


def run_zo2(task: Task, trial: Trial, store: str, more: dict[str, Any], repeated: bool) -> None:
    """The arm's store with the first seed in all three settings, and with the others where it stands in a claim of what is learnt."""
    lr, first = float(trial.settings["lr"]), trial.seed == 0 and not trial.tuning
    if not first and not repeated and not trial.tuning and task.scale is Scale.QUICK:
        trial.note("not repeated", "its bits, or its rounding, are the same way again: with the first seed alone")
        return
    with TemporaryDirectory() as folder:

        def config(name: str, lr: float, seed: int = 0) -> ZO2Config:
            where = str(Path(folder) / name) if store == "disk" else None
            return ZO2Config(lr, store=store, store_dir=where, working_device=trial.device, seed=seed, **more)  # pyright: ignore[reportArgumentType]

        if first:
            with counted_draws() as drawn:
                cost_of(lambda: streamed_cost(config("wide", 1e-6), drawn), trial)
            gc.collect()
        if first and store == "disk" and "store_dtype" not in more:
            log_break_even(trial, Path(folder))
        if first and "store_dtype" not in more:
            zo2 = ZO2.from_pretrained(task.model, config("bits", BITS_LR))
            log_bits(task, trial, zo2.step, lambda: digest_of(zo2.named_values()))
            del zo2
        zo2 = ZO2(task.small_model(), config("small", lr, trial.seed))

        def whole() -> Any:
            model = task.small_model().to(trial.device)
            model.load_state_dict(zo2.state_dict()["model"], strict=False)  # the tied head goes by the embedding's name
            return model

        learn(task, trial, zo2.step, whole)
        if zo2.lost_updates is not None:
            trial.log("lost", zo2.lost_updates)


def streamed_cost(config: ZO2Config, drawn: list[int]) -> tuple[Step, Callable[[], dict[str, float]]]:
    zo2 = ZO2.from_pretrained(wide_model(), config)
    return zo2.step, lambda: {"bytes": zo2.store.bytes_read + zo2.store.bytes_written, "drawn": drawn[0]}


def log_break_even(trial: Trial, folder: Path) -> None:
    """A streamed step's time over one in memory, by the batch: the mean of two pairs taken in turn."""
    for tokens, streamed, at_hand in steps_by_batch(folder, trial.device):
        with one_thread():
            ratio = ratio_of_pairs(streamed, at_hand, pairs=2)
        trial.log("streaming", ratio, tokens=tokens)


def run_adamw(task: Task, trial: Trial) -> None:
    if trial.seed == 0:
        cost_of(lambda: (adamw_step(in_memory(wide_model()), 1e-6), lambda: {"bytes": 0, "drawn": 0}), trial)
        gc.collect()
    model = task.small_model().to(trial.device).train()
    steps, before = 20, token_loss(model, task.test, window=WINDOW)
    told = trial.follow("training_loss", total=steps, text="loss", over="step")
    loss_of = lambda model, ids: model(input_ids=ids, labels=ids, use_cache=False).loss  # noqa: E731
    fine_tune(model, task.batches(trial.seed, steps, trial.device), loss_of, lr=3e-3, steps=steps, tell=lambda _, loss: told(loss))
    log_quality(task, trial, before, model)


# What is logged


def digest_of(parts: Any) -> int:
    """52 bits of a digest of the weights: a whole number that a float holds."""
    digest = Digest()
    for part in parts:
        value = digest.watched(part.__getitem__)
        for name in part:
            value(name)
    return int(str(digest)[:13], 16)


def log_bits(task: Task, trial: Trial, step: Callable[[Tensor], StepResult], digest: Callable[[], int]) -> None:
    rows, length = BITS_SHAPE
    for number in range(1, BITS_STEPS + 1):
        draw = torch.Generator().manual_seed(number)
        found = step(draw_windows(task.tokens, rows, length, draw))
        trial.log("bits_loss", found.loss, step=number)
        trial.log("bits_g", found.projected_grad, step=number)
    trial.log("digest", digest())


def learn(task: Task, trial: Trial, step: Callable[[Tensor], StepResult], whole: Callable[[], Any]) -> None:
    """Train on one thread (what is small is not made quicker by two), and judge on text that was not seen."""
    steps, judged = STEPS[task.scale], task.validation if trial.tuning else task.test
    before = token_loss(task.small_model(), judged[:HELD_OUT], window=WINDOW)
    told = trial.follow("training_loss", total=steps, text="loss", over="step")
    with one_thread(), trial.measure("training"):
        for ids in task.batches(trial.seed, steps, trial.device):
            told(step(ids).loss)
    if trial.tuning:
        trial.objective(before - token_loss(whole(), judged[:HELD_OUT], window=WINDOW))
        return
    log_quality(task, trial, before, whole())


def log_quality(task: Task, trial: Trial, before: float, model: Any) -> None:
    after = token_loss(model, task.test, window=WINDOW)
    trial.log("first_loss", before)
    trial.log("loss", after)
    trial.log("gain", before - after)


SPACE = {"lr": Choice((1e-3, 3e-4, 1e-4))}
SHORT = {"store": "disk", "repeated": False}
study.arm("mezo", space=SPACE, label="MeZO")(run_mezo)
study.arm_table(
    run_zo2,
    {
        "zo2-none": {"store": "none", "more": {}, "repeated": True, "label": "ZO2, in memory"},
        "zo2-disk": {"store": "disk", "more": {}, "repeated": False, "label": "ZO2, disk"},
        "zo2-disk-nearest": SHORT | {"more": {"store_dtype": "bfloat16"}, "label": "ZO2, disk, bfloat16"},
        "zo2-disk-stochastic": SHORT
        | {"more": {"store_dtype": "bfloat16", "store_rounding": "stochastic"}, "label": "ZO2, disk, bfloat16, stochastic"},
    },
    space=SPACE,
)
study.arm("adamw", label="AdamW, 20 steps")(run_adamw)


# What the paper claims


def largest_difference(results: Results, arm: str, figures: Sequence[tuple[str, dict[str, Any]]]) -> Any:
    """The largest difference from MeZO among numbers that are to be the same, as a comparison with 0."""
    pairs = [results.values(name, way, **at) for name, at in figures for way in (arm, "mezo")]
    what = f"largest of {len(figures)} differences, {study.arms[arm].label} - MeZO"
    return (
        bootstrap(lambda *means: functools.reduce(np.maximum, map(np.abs, map(np.subtract, means[::2], means[1::2]))), *pairs, what=what)
        <= 0
    )


@study.claim(
    "In memory and on disk, three steps of a real model give MeZO's losses, projected gradients and weights, to the bit",
    paper="no loss of accuracy against MeZO (the same arithmetic)",
)
def same_bits(results: Results) -> Any:
    steps = itertools.product(("bits_loss", "bits_g"), range(1, BITS_STEPS + 1))
    figures = [*((name, {"step": step}) for name, step in steps), ("digest", {})]
    return largest_difference(results, "zo2-none", figures) & largest_difference(results, "zo2-disk", figures)


@study.claim(
    "With its blocks on disk a step peaks at most at 0.45 of MeZO's memory (312 million parameters, the embedding tied)",
    paper="OPT-175B in 18.04 GB, Qwen3-32B in 6 GB of GPU memory",
)
def peaks_lower(results: Results) -> Any:
    return results.ratio("peak_memory", "zo2-disk", "mezo") <= 0.45


@study.claim("In memory a step takes at most 0.9 of MeZO's processor time", paper="almost no overhead against MeZO")
def is_quicker(results: Results) -> Any:
    return results.ratio("cpu_seconds", "zo2-none", "mezo") <= 0.9


@study.claim(
    "200 steps lower the loss on unseen text by at least 0.03 nats, and with MeZO by the same, to the bit",
    paper="no loss of accuracy against MeZO",
)
def learns(results: Results) -> Any:
    return (results.mean("gain", "zo2-none") >= 0.03) & largest_difference(results, "zo2-none", [("loss", {})])


@study.claim(
    "20 steps of AdamW lower it at least 5 times as far: forward passes alone are cheap in memory, not in steps",
    paper="20,000 steps a task",
)
def takes_more_steps(results: Results) -> Any:
    return results.ratio("gain", "adamw", "zo2-none") >= 5


@study.claim("On a GPU, copying hides behind computing", paper="almost no overhead; OPT-175B on one GPU")
def overlaps(results: Results) -> Any:
    raise NotTestable("it takes a GPU whose blocks come from host memory")


@study.summary
def summary(results: Results) -> str:
    batches = {rows * LENGTH: results.mean("streaming", "zo2-disk", tokens=rows * LENGTH).value for rows in ROWS}
    loud = max((tokens for tokens, ratio in batches.items() if ratio > HIDDEN), default=0)
    hides = min((tokens for tokens in batches if tokens > loud), default=0)
    even = f"from {hides:,} tokens a step on" if hides else "at none of the batches tried"
    return (
        f"A step on {results.mean('drawn', 'mezo').value / 4e6:.0f} million parameters peaked at {results.say('peak_memory', 'zo2-disk')} with the blocks on disk "
        f"(MeZO {results.say('peak_memory', 'mezo')}, AdamW {results.say('peak_memory', 'adamw')}) and took {results.say('cpu_seconds', 'zo2-disk')} "
        f"of processor time ({results.say('cpu_seconds', 'zo2-none')} in memory, MeZO {results.say('cpu_seconds', 'mezo')}), for "
        f"{results.say('bytes', 'zo2-disk')} read and written; streaming hides behind computing {even}. With bfloat16 blocks {results.say('lost', 'zo2-disk-nearest')} of the last updates were lost to "
        f"rounding. 200 steps won {results.say('gain', 'zo2-none')} nats on unseen text, 20 of AdamW {results.say('gain', 'adamw')}."
    )
