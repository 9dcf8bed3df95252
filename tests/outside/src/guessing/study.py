"""Two ways to guess the mean of numbers from a sample; it takes milliseconds, and makes trouble on demand."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from fewer.errors import DataUnavailable, UserError
from fewer.study import Curve, Difference, Figure, LogUniform, Study

EIGHT = Figure("error", "error of 8 numbers", at={"size": 8})
study = Study(
    "guessing",
    question="How near does a guess come?",
    baseline="median",
    figures=[Figure("final", "error"), Figure("work.seconds", "time", "s"), EIGHT, Figure("unknown", "not logged")],
    charts=[Curve("error", over="size"), Difference("final")],
    memory_limit=4 * 2**30,
)
study.option("size", 40, help="how many numbers there are")
study.option("shape", "flat", choices=["flat", "steep"], help="how they are spread")
TROUBLES = ["none", "raise", "exit", "signal", "memory", "endless", "nan", "data", "peek"]
study.option("trouble", "none", choices=TROUBLES, help="what the arm `mean` does wrong")
study.option("numbers", "", help="a text file of your own numbers")


@dataclass
class Numbers:
    train: list[float]
    test: Any


@study.task
def task(scale, size, shape, trouble, numbers=""):
    if numbers:
        own = [float(word) for word in Path(numbers).read_text().split()]
        return Numbers(own[::2], own[1::2])
    if trouble == "data":
        raise DataUnavailable("the numbers could be had from none of 2 sources")
    power = 1 if shape == "flat" else 3
    numbers = [(i / size) ** power for i in range(size)]
    return Numbers(numbers[::2], numbers[1::2])


def guess(kind, task, trial):
    shift = trial.settings["shift"]
    while "slow" in trial.settings.get("numbers", "") and not Path("go").exists():  # the tests say when
        time.sleep(0.05)
    with trial.measure("work"):
        for size in (2, 4, 8):
            sample = random.sample(task.train, size)
            trial.progress(size, 8, f"{size} numbers")
            trial.report(size, -abs(kind(sample) + shift - fmean(task.train)))
            trial.log("error", abs(kind(sample) + shift - fmean(task.train)), size=size)
    trial.objective(-abs(kind(task.train) + shift - fmean(task.train)))
    trial.show(np.full((3, 2, 2), trial.seed / 10), "seeds")
    if not trial.tuning:
        trial.log("final", abs(kind(task.train) + shift - fmean(task.test)))


SPACE = {"shift": LogUniform(1e-4, 1.0, start=0.1)}


@study.arm("median", space=SPACE)
def median_arm(task, trial):
    if trial.settings.get("numbers", "").endswith("wide.txt") and trial.seed == 0:
        raise UserError("these numbers are too wide for it")
    guess(median, task, trial)


@study.arm("mean", space=SPACE, label="the mean")
def mean_arm(task, trial):
    match trial.settings["trouble"]:
        case "raise":
            raise ZeroDivisionError("a fault in the arm")
        case "exit":
            print("last words")
            os._exit(7)
        case "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        case "memory":
            bytearray(8 * 2**30)
        case "endless":
            while True:
                pass
        case "nan":
            trial.log("final", float("nan"))
            return
        case "peek":
            trial.objective(fmean(task.test))
            return
    guess(fmean, task, trial)


@study.arm("none", settings={"shift": 0.0})
def no_arm(task, trial):
    trial.log("final", fmean(task.test))


@study.claim("the mean is nearer", paper="0.8 %", if_fails="too few numbers")
def nearer(results):
    return results.difference("final", "mean", "median") <= 0


@study.claim("no guess is far off", paper="far")
def far(results):
    return results.mean("final", "none") >= 0.9


@study.summary
def summary(results):
    return f"The mean was off by {float(results.mean('final', 'mean')):.3f}."
