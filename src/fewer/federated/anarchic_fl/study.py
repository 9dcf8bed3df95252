"""AFA-CD and AFA-CS beside FedAvg and FedBuff under one simulated clock: accuracy over updates, over simulated seconds and over gradients.

Workers hold two classes of images each and are of unlike speed. All arms share the clock, the batch size, the number of updates and the
choice of the local rate (two rates each, by validation images in mode `random`). Simulated seconds are those of the clock (latency + steps * seconds a step),
not of this machine. Two modes: `random`, the number of local steps is drawn at each visit, and `fixed`, each worker has its own.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewer.devices import one_thread
from fewer.federated._shared.asynchrony import Clock, Return, Update, UpdateRound, schedule, simulate_anarchic, synchronous_rounds
from fewer.federated._shared.baselines import FedAvg
from fewer.federated._shared.clients import Shards
from fewer.federated._shared.flat_model import FlatModel
from fewer.federated._shared.flower_records import wire_bytes
from fewer.federated._shared.local_training import LocalConfig
from fewer.federated._shared.partition import pathological
from fewer.federated._shared.problems import DATA_HELP, Size, shards_of
from fewer.federated.anarchic_fl.algorithm import AnarchicAlgorithm, AnarchicConfig, FedBuff
from fewer.study import Curve, Figure, NotTestable, Results, Scale, Study, Trial
from fewer.tasks import ImageTask, accuracy, conv_net, image_task, mlp

RANDOM: dict[str, Any] = {"mode": "random"}
FIXED: dict[str, Any] = {"mode": "fixed"}
RATES = (0.02, 0.05)  # eta_L, chosen by validation images for each arm
SERVER_LR = 5.5  # eta: the mean of 1 to 10 steps
STEPS = (1, 10)  # of a visit in mode random
MOST_STEPS = 20  # of a worker in mode fixed
FEDAVG_STEPS = 5
SPREAD = 0.7  # sigma of the log-normal seconds per step
CLASSES_EACH = 2
LAST = 5  # reports whose mean accuracy is told
REPORTS = 20  # a run
DELAYS = (2, 10, 50)  # largest delay, at full scale

study = Study(
    "anarchic-fl",
    question="What do clients who come when they like, with as many steps as they like, cost in accuracy, and what waiting do they save?",
    baseline="fedavg",
    figures=[
        *(
            Figure(name, f"{label}, {mode['mode']}", unit, "higher" if name == "accuracy" else "lower", at=mode)
            for mode in (RANDOM, FIXED)
            for name, label, unit in (
                ("accuracy", f"test accuracy, mean of the last {LAST} reports", "%"),
                ("simulated_seconds", "simulated time of the clock", "s"),
                ("gradients", "gradients of batches", ""),
                ("bytes", "bytes on the wire", "bytes"),
            )
        ),
        *(
            Figure(name, f"{label}, random", unit, "", detail=True, at=RANDOM)
            for name, label, unit in (
                ("mean_delay", "mean delay in updates", ""),
                ("largest_delay", "largest delay in updates", ""),
                ("lr", "local rate that was chosen", ""),
                ("seconds", "time of the updates on this machine", "s"),
                ("cpu_seconds", "their processor time", "s"),
            )
        ),
        Figure("accuracy", "test accuracy", "%", "higher"),
        Figure("simulated_seconds", "simulated seconds of the clock so far", "s"),
        Figure("gradients", "gradients so far"),
    ],
    charts=[
        chart
        for mode in (RANDOM, FIXED)
        for chart in (
            Curve("accuracy", over="update", at=mode, title=f"Test accuracy over server updates ({mode['mode']} steps)"),
            Curve(
                "accuracy",
                over="update",
                x="simulated_seconds",
                log_x=True,
                at=mode,
                title=f"Over simulated seconds ({mode['mode']} steps)",
            ),
            Curve("accuracy", over="update", x="gradients", at=mode, title=f"Over gradients of batches ({mode['mode']} steps)"),
        )
    ],
    time_limit=24 * 3600,
)
study.option("data", "fashion-mnist", help=f"{DATA_HELP}; at full scale cifar-10 is the fitting one")

SIZES = {
    Scale.QUICK: Size(2_000, 1_000, 2_000, clients=10, rounds=400, batch_size=20, side=14, fraction=0.5),
    Scale.FULL: Size(None, 5_000, 10_000, clients=100, rounds=4000, batch_size=50, side=32, fraction=0.1),
}


@study.task
def task(scale: Scale, data: str) -> ImageTask:
    size = SIZES[scale]
    return image_task(
        data, train=size.images, validation=size.validation, test=size.test, side=size.side, normalise=(0.3, 0.35), beside=["client"]
    )


def make_model(task: ImageTask, scale: Scale, seed: int) -> nn.Module:
    """Softmax regression, whose updates are quick enough for 400 of them; at full scale a ConvNet with GroupNorm."""
    torch.manual_seed(seed)
    if scale is Scale.FULL:
        return conv_net(task.shape, task.classes, norm=partial(nn.GroupNorm, 4))
    return mlp(task.shape, task.classes, widths=())


# Who comes when


def clock_of(workers: int, mode: str, seed: int) -> Clock:
    """The seconds per step of each worker are log-normal; the steps of a visit are drawn (random), or each worker's own (fixed)."""
    draw = np.random.default_rng([seed, 1])
    speeds = np.exp(SPREAD * draw.normal(size=workers)).tolist()
    own = [round(math.exp(value)) for value in draw.uniform(0, math.log(MOST_STEPS), size=workers)]
    return Clock(speeds, steps=STEPS if mode == "random" else own)


def anarchic_visits(workers: int, buffer: int, updates: int, mode: str, seed: int) -> list[Update]:
    return schedule(clock_of(workers, mode, seed), workers, buffer, updates, seed)


def rounds_that_wait(workers: int, buffer: int, updates: int, mode: str, seed: int) -> list[Update]:
    """FedAvg's, on the same clock: who is drawn makes 5 steps, and the slowest of them is waited for."""
    return synchronous_rounds(clock_of(workers, mode, seed), workers, buffer, updates, FEDAVG_STEPS, seed)


def delayed_visits(workers: int, buffer: int, updates: int, most: int, seed: int) -> list[Update]:
    """Full scale: workers drawn at random, with steps and a delay of at most so many updates drawn uniformly."""
    draw = np.random.default_rng([seed, 2])
    return [
        Update(
            float(t),
            [
                Return(int(worker), t - int(draw.integers(min(t, most) + 1)), int(draw.integers(STEPS[0], STEPS[1] + 1)))
                for worker in draw.choice(workers, buffer, replace=False)
            ],
        )
        for t in range(updates)
    ]


# What an arm does


@dataclass
class Course:
    """One run: what was reported on the way, and what it cost."""

    reports: list[dict[str, float]] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    delays: list[int] = field(default_factory=list)
    so_far: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("gradients", "bytes", "seconds", "cpu_seconds"), 0.0))

    @property
    def chosen_by(self) -> float:
        """Validation accuracy, the mean of the last reports."""
        return float(np.mean(self.validation[-LAST:]))

    @property
    def accuracy(self) -> float:
        return float(np.mean([each["accuracy"] for each in self.reports[-LAST:]]))


def follow(task: ImageTask, trial: Trial, algorithm: Any, shards: Shards, updates: list[Update]) -> Course:
    """Run an algorithm over a schedule."""
    course, every = Course(), max(1, len(updates) // REPORTS)
    flat = FlatModel(make_model(task, trial.scale, trial.seed).to(trial.device))
    server = AnarchicAlgorithm(AnarchicConfig(variant="cd")).initial(flat.initial().cpu(), len(shards))
    a_return = sum(wire_bytes(names, server) for names in (algorithm.receives, algorithm.sends))
    judged = [tuple(part.to(trial.device) for part in pair) for pair in (task.validation, task.test)]
    made = 0

    def judge(x: Tensor) -> tuple[float, float] | None:
        nonlocal made
        made += 1
        if made % every and made != len(updates):
            return None
        validation, test = (accuracy(lambda images: flat.predict(x, images), pair) for pair in judged)  # pyright: ignore[reportArgumentType] - pairs
        return validation, test

    def tell(line: UpdateRound) -> None:
        added = {
            "gradients": line.gradients,
            "bytes": len(line.clients) * a_return,
            "seconds": line.seconds,
            "cpu_seconds": line.cpu_seconds,
        }
        course.so_far = {name: value + added[name] for name, value in course.so_far.items()}
        course.delays.extend(line.delays)
        if line.evaluation is not None:
            course.validation.append(line.evaluation[0])
            course.reports.append({"update": line.round, "accuracy": line.evaluation[1], "simulated_seconds": line.time, **course.so_far})

    executor = None if trial.scale is Scale.QUICK else "vmap"  # a softmax regression is quicker one after the other
    simulate_anarchic(algorithm, flat, shards, updates, seed=trial.seed, executor=executor, evaluate=judge, tell=tell)
    return course


def run(task: ImageTask, trial: Trial, make: Callable[[dict[str, Any]], Any], visits: Callable[..., list[Update]]) -> None:
    """An arm: in both modes, at the rate that validation images choose in the first."""
    size = SIZES[trial.scale]
    split = partial(pathological, classes_per_client=CLASSES_EACH, seed=trial.seed)
    shards, words = shards_of(task, split, size.clients, how=f"{CLASSES_EACH} classes each", device=trial.device)
    trial.note("clients", words)
    buffer = max(1, round(size.fraction * len(shards)))
    plans: dict[str, list[Update]] = {
        mode["mode"]: visits(len(shards), buffer, size.rounds, mode["mode"], trial.seed) for mode in (RANDOM, FIXED)
    }
    if trial.scale is Scale.FULL and visits is anarchic_visits:
        plans |= {f"delay {most}": delayed_visits(len(shards), buffer, size.rounds, most, trial.seed) for most in DELAYS}
    local = {"batch_size": size.batch_size, "lr_decay": 1.0, "weight_decay": 0.0, "max_grad_norm": math.inf}
    with one_thread() if trial.scale is Scale.QUICK else contextlib.nullcontext():
        tried = {rate: follow(task, trial, make(local | {"lr": rate}), shards, plans["random"]) for rate in RATES}
        lr = max(tried, key=lambda rate: tried[rate].chosen_by)
        for number, (mode, updates) in enumerate(plans.items(), 1):
            course = tried[lr] if mode == "random" else follow(task, trial, make(local | {"lr": lr}), shards, updates)
            log_course(trial, course, mode, lr)
            trial.progress(number, len(plans), f"{mode}: {100 * course.accuracy:.1f} %")


def log_course(trial: Trial, course: Course, mode: str, lr: float) -> None:
    for report in course.reports:
        for name in ("accuracy", "simulated_seconds", "gradients", "bytes"):
            trial.log(name, report[name], mode=mode, update=int(report["update"]))
    final = {
        "accuracy": course.accuracy, "simulated_seconds": course.reports[-1]["simulated_seconds"], "lr": lr,
        "mean_delay": float(np.mean(course.delays)), "largest_delay": float(max(course.delays)), **course.so_far,
    }  # fmt: skip
    for name, value in final.items():
        trial.log(name, value, mode=mode)


def afa(variant: Any) -> Callable[[dict[str, Any]], AnarchicAlgorithm]:
    return lambda local: AnarchicAlgorithm(AnarchicConfig(variant=variant, server_lr=SERVER_LR, **local))


study.arm_table(
    run,
    {
        "fedavg": {"label": "FedAvg", "make": lambda local: FedAvg(LocalConfig(**local)), "visits": rounds_that_wait},
        "fedbuff": {"label": "FedBuff", "make": lambda local: FedBuff(LocalConfig(**local)), "visits": anarchic_visits},
        "afa-cd": {"label": "AFA-CD", "make": afa("cd"), "visits": anarchic_visits},
        "afa-cs": {"label": "AFA-CS", "make": afa("cs"), "visits": anarchic_visits},
    },
)


# What the paper claims


@study.claim(
    "AFA-CS ends within 2 points of FedAvg after as many updates, with random and with fixed steps",
    paper="comparable accuracy to synchronous FedAvg (no figure at hand)",
    if_fails="AFA-CS steps with old updates of all workers, so it wants a smaller rate than FedAvg where delays are long",
)
def cs_comparable(results: Results) -> Any:
    return results.no_worse("accuracy", "afa-cs", "fedavg", 0.02, **RANDOM) & results.no_worse(
        "accuracy", "afa-cs", "fedavg", 0.02, **FIXED
    )


@study.claim(
    "AFA-CD ends within 3 points of FedAvg, with random steps",
    paper="comparable accuracy to synchronous FedAvg (no figure at hand)",
    if_fails="who comes often pulls the model towards its own two classes: the error term that AFA-CD keeps",
)
def cd_comparable(results: Results) -> Any:
    return results.no_worse("accuracy", "afa-cd", "fedavg", 0.03, **RANDOM)


@study.claim(
    "AFA-CS ends at least 2 points above AFA-CD where each worker has a number of steps of its own",
    paper="AFA-CS drops AFA-CD's constant error term (no figure at hand)",
    if_fails="where speeds and steps happen to even out, all workers come about as often, and the error term is small",
)
def no_error_term(results: Results) -> Any:
    return results.difference("accuracy", "afa-cs", "afa-cd", **FIXED) >= 0.02


@study.claim(
    "AFA-CS needs at most half of FedAvg's simulated time for as many updates, with random steps",
    paper="the server waits for nobody (no figure at hand)",
    if_fails="workers are about as fast as each other, so that little is waited for",
)
def no_waiting(results: Results) -> Any:
    return results.ratio("simulated_seconds", "afa-cs", "fedavg", **RANDOM) <= 0.5


@study.claim(
    "Where each worker has a number of steps of its own, AFA-CS ends at least 1 point above FedBuff",
    paper="no claim of the paper: the raw sum favours whoever steps most",
    if_fails="those who step most come least often, which evens out what the raw sum favours",
)
def above_fedbuff(results: Results) -> Any:
    return results.difference("accuracy", "afa-cs", "fedbuff", **FIXED) >= 0.01


@study.claim("Linear speed-up in workers and local steps", paper="rates 1/sqrt(m K T) for AFA-CD and 1/sqrt(M K T) for AFA-CS")
def linear_speed_up(results: Results) -> Any:
    raise NotTestable("it takes many sizes of the buffer, each with tuned rates; real network time and the paper's networks are not here")


@study.summary
def summary(results: Results) -> str:
    def said(arm: str, mode: dict[str, Any]) -> str:
        return results.say("accuracy", arm, **mode)

    def row(mode: dict[str, Any]) -> str:
        return (
            f"AFA-CS {said('afa-cs', mode)}, AFA-CD {said('afa-cd', mode)}, FedBuff {said('fedbuff', mode)}, FedAvg {said('fedavg', mode)}"
        )

    return (
        f"After as many updates: {row(RANDOM)} where the steps of each visit are drawn, {row(FIXED)} where each worker has its own number. "
        f"In simulated time (latency + steps * seconds a step, not this machine's) AFA-CS takes "
        f"{results.say('simulated_seconds', 'afa-cs', 'fedavg', **RANDOM)} of FedAvg's with random steps and "
        f"{results.say('simulated_seconds', 'afa-cs', 'fedavg', **FIXED)} with fixed ones, for "
        f"{results.say('gradients', 'afa-cs', 'fedavg', **RANDOM)} and {results.say('gradients', 'afa-cs', 'fedavg', **FIXED)} of its gradients. "
        f"With random steps FedBuff, which keeps nothing about workers either, is {100 * above(results, 'fedbuff', 'afa-cd'):+.1f} points beside "
        f"AFA-CD and {100 * above(results, 'fedbuff', 'afa-cs'):+.1f} beside AFA-CS."
    )


def above(results: Results, arm: str, other: str) -> float:
    return results.difference("accuracy", arm, other, **RANDOM).value
