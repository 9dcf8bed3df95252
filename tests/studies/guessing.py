"""A study that takes milliseconds: two ways to guess the mean of numbers from a sample."""

from __future__ import annotations

import random
from dataclasses import dataclass
from statistics import fmean, median

from fewer.study import Curve, Difference, Figure, Study

study = Study(
    "guessing",
    question="How near does a guess come?",
    baseline="median",
    figures=[Figure("error", "error"), Figure("work.seconds", "time", "s")],
    charts=[Curve("error", over="size"), Difference("final")],
)
study.option("size", 40, help="how many numbers there are")
study.option("shape", "flat", choices=["flat", "steep"], help="how they are spread")


@dataclass
class Numbers:
    train: list[float]
    test: list[float]


@study.task
def task(scale, size, shape):
    power = 1 if shape == "flat" else 3
    numbers = [(i / size) ** power for i in range(size)]
    return Numbers(numbers[::2], numbers[1::2])


def guess(kind, task, trial):
    with trial.measure("work"):
        for size in (2, 4, 8):
            sample = random.Random(trial.seed).sample(task.train, size)
            trial.progress(size, 8, f"{size} numbers")
            trial.log("error", abs(kind(sample) - fmean(task.test)), size=size)
    trial.log("final", abs(kind(task.train) - fmean(task.test)))


@study.arm("median")
def median_arm(task, trial):
    guess(median, task, trial)


@study.arm("mean")
def mean_arm(task, trial):
    guess(fmean, task, trial)


@study.claim("the mean is nearer", paper="always", if_fails="too few numbers")
def nearer(results):
    return results.difference("final", "mean", "median") <= 0


@study.summary
def summary(results):
    return f"The mean was off by {float(results.mean('final', 'mean')):.3f}."
