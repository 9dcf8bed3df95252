"""T1 beside the FNO: error after the same processor time at 64 x 64, error after the same epochs where data are few, and steps over resolution.

Vorticity on a torus is made here; Darcy's flow at 16 x 16 is the benchmark file of neuraloperator. The floor of the modes is told beside
each error. Or fields of yours: `--set data=FILE.npz`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fewer.devices import one_thread
from fewer.meters import median_seconds
from fewer.signals.transform_once.fno import FNO
from fewer.signals.transform_once.model import T1, Init
from fewer.signals.transform_once.modes import ModeDataset, ModeLoss
from fewer.signals.transform_once.problems import Budget, Fitted, Pairs, darcy, fit_fno, fit_t1, judged, relative, vorticity, yours
from fewer.signals.transform_once.transforms import Basis, truncated_dct
from fewer.study import Curve, Figure, NotTestable, Results, Scale, Study, Tradeoff, Trial
from fewer.study.races import time_pairs
from fewer.study.results import bootstrap

SIZES: dict[str, Any] = {
    "train": 500,
    "test": 100,
    "resolution": 64,
    "T": 10.0,
    "seconds": 10.0,
    "epochs": 10,
    "modes": 16,
    "width": 24,
    "layers": 4,
}
FULL: dict[str, Any] = {"train": 1000, "test": 200, "T": 50.0, "seconds": 45.0, "epochs": 25, "modes": 24, "width": 48, "layers": 8}
STEPS_AT = (32, 64, 128)  # resolutions at which a training step is timed
STEP_BATCH = (
    8  # training takes 20, which shows more: T1's step is mostly its weights', an FNO's grows with the batch (at 2: 4 times at 64^2)
)
VORTICITY, FEW, YOURS = {"data": "navier-stokes"}, {"data": "darcy"}, {"data": "yours"}

study = Study(
    "transform-once",
    question="What is an operator's error after the same time, and after the same epochs, if fields go to modes once?",
    baseline="fno",
    figures=[
        Figure("error", "relative error at 64^2, equal time", "%", at=VORTICITY),
        Figure("error", "relative error on Darcy 16^2, equal epochs", "%", at=FEW),
        Figure("error", "relative error, your fields", "%", at=YOURS),
        Figure("floor", "floor of the modes at 64^2", "%", at=VORTICITY),
        Figure("epochs", "epochs in that time", better="higher", at=VORTICITY),
        Figure("seconds", "100 fields answered", "s", at=VORTICITY),
        Figure("cpu_seconds", "processor time on Darcy", "s", at=FEW),
        Figure("parameters", "parameters", at=VORTICITY),
        Figure("step_ratio", "FNO's step / T1's, 64^2", better="higher", at={"resolution": 64}, detail=True),
    ],
    charts=[
        Curve("step_ratio", over="resolution", title="How many times longer an FNO's training step takes"),
        Curve("training_loss", over="share", title="Training loss over the share of the time"),
        Tradeoff("error", "seconds", title="Error against the time of an answer"),
    ],
    time_limit=4 * 3600,
)
study.option(
    "data", "", help="your own fields: an .npz file with x and y, [N, n], [N, n, n] or [N, channels, n, n]; the last fifth is held out"
)


@dataclass(frozen=True)
class Task:
    """Fields to train on by time, and (None for your own) few ones to train on by epochs."""

    name: str
    main: Pairs
    few: Pairs | None


@study.task
def task(scale: Scale, data: str = "") -> Task:
    if data:
        return Task("yours", yours(data), None)
    sizes = SIZES | (FULL if scale is Scale.FULL else {})
    return Task("navier-stokes", vorticity(sizes["train"], sizes["test"], sizes["resolution"], sizes["T"]), darcy())


def modes_for(pairs: Pairs, most: int) -> tuple[int, ...]:
    return tuple(min(most, n) for n in pairs.resolution)


def t1_for(pairs: Pairs, sizes: Mapping[str, Any], basis: Basis = "dct", init: Init = "vp-first") -> T1:
    """A T1 of those sizes; of the Fourier basis, which describes periodic fields by fewer, four fifths of the modes."""
    most = sizes["modes"] if basis == "dct" else round(0.8 * sizes["modes"])
    words: dict[str, Any] = {"resolution": pairs.resolution, "basis": basis, "init": init}
    return T1(modes_for(pairs, most), sizes["width"], pairs.x.shape[1], pairs.y.shape[1], sizes["layers"], **words)


def fno_for(pairs: Pairs, sizes: Mapping[str, Any]) -> FNO:
    """As wide and of as many modes; lifted by one map, and with T1's width before the output, which makes it quicker than neuralop's own."""
    modes = tuple(max(2, m // 2 * 2) for m in modes_for(pairs, sizes["modes"]))
    words: dict[str, Any] = {"lifting_channels": None, "projection_channels": 128}
    return FNO(modes, sizes["width"], pairs.x.shape[1], pairs.y.shape[1], sizes["layers"], **words)


def told(trial: Trial, model: torch.nn.Module, pairs: Pairs, fitted: Fitted, name: str) -> None:
    trial.log("error", judged(model, pairs), data=name)
    trial.log("epochs", fitted.epochs, data=name)
    trial.log("cpu_seconds", fitted.seconds, data=name)
    trial.log("parameters", sum(each.numel() for each in model.parameters()), data=name)
    trial.log("seconds", median_seconds(lambda: judged(model, pairs), 3), data=name)


def floor_of(pairs: Pairs, model: T1) -> float:
    """The least relative error that the modes leave on the fields held out."""
    y = pairs.test_y
    return relative(model.from_modes(truncated_dct(y, model.n_modes, model.basis)), y).item()


def by_t1(task: Task, trial: Trial, basis: Basis = "dct", init: Init = "vp-first", few: bool = True) -> None:
    if init == "naive" and trial.scale is Scale.QUICK and task.name != "yours":
        return trial.note("left out", "the naive initialisation runs at full scale")
    with one_thread():
        for name, pairs, budget in _rounds(task, trial, few):
            torch.manual_seed(trial.seed)
            model = t1_for(pairs, trial.settings, basis, init).to(trial.device)
            fitted = fit_t1(model, pairs, budget, trial.seed, _teller(trial, name))
            told(trial, model, pairs, fitted, name)
            trial.log("floor", floor_of(pairs, model), data=name)
        if basis == "dct" and init == "vp-first" and task.name != "yours":
            steps_over_resolution(trial)


def _rounds(task: Task, trial: Trial, few: bool) -> list[tuple[str, Pairs, Budget]]:
    found = [(task.name, task.main, Budget(seconds=trial.settings["seconds"]))]
    if few and task.few is not None:
        found.append(("darcy", task.few, Budget(epochs=trial.settings["epochs"])))
    return [(name, Pairs(*(each.to(trial.device) for each in pairs)), budget) for name, pairs, budget in found]


def _teller(trial: Trial, name: str) -> Any:
    logged = [0.0]

    def tell(share: float, loss: float) -> None:
        if share >= logged[0]:
            trial.log("training_loss", loss, share=round(share, 1), data=name)
            trial.progress(share, 1, f"{name}: {loss:.3f}")
            logged[0] = round(share, 1) + 0.05

    return tell


def steps_over_resolution(trial: Trial) -> None:
    """A training step of both, in pairs, on noise: T1's does not see the resolution."""
    for n in STEPS_AT:
        x, y = torch.randn(STEP_BATCH, 1, n, n), torch.randn(STEP_BATCH, 1, n, n)
        pairs = Pairs(x, y, x, y)
        t1, fno = t1_for(pairs, trial.settings), fno_for(pairs, trial.settings)
        times = time_pairs(*both_steps(t1, fno, x, y), 2)
        trial.log("step_ratio", float(np.median(times[:, 1] / times[:, 0])), resolution=n)


def both_steps(t1: T1, fno: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[Any, Any]:
    """A training step of T1 on modes that are there already, and one of the FNO on fields."""
    data, loss = ModeDataset(x, y, t1), ModeLoss()
    optimizers = [torch.optim.AdamW(each.parameters(), lr=1e-4) for each in (t1, fno)]

    def step(optimizer: torch.optim.Optimizer, value: torch.Tensor) -> None:
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return (
        lambda: step(optimizers[0], loss(t1.forward_modes(data.inputs), data.targets)),
        lambda: step(optimizers[1], relative(fno(x), y)),
    )


study.arm_table(
    by_t1,
    {
        "t1": {"label": "T1"},
        "t1-fourier": {"label": "T1, Fourier basis", "basis": "fourier", "few": False},
        "t1-naive": {"label": "T1, naive start", "init": "naive", "against": "t1", "few": False},
    },
    settings=SIZES,
    at_full=FULL,
)


@study.arm("fno", label="FNO", settings=SIZES, at_full=FULL)
def by_fno(task: Task, trial: Trial) -> None:
    with one_thread():
        for name, pairs, budget in _rounds(task, trial, True):
            torch.manual_seed(trial.seed)
            model = fno_for(pairs, trial.settings).to(trial.device)
            told(trial, model, pairs, fit_fno(model, pairs, budget, trial.seed, _teller(trial, name)), name)


@study.arm("mean", label="mean of the targets", settings=SIZES, at_full=FULL)
def by_mean(task: Task, trial: Trial) -> None:
    for name, pairs, _ in _rounds(task, trial, True):
        trial.log("error", relative(pairs.y.mean(0, keepdim=True).expand_as(pairs.test_y), pairs.test_y).item(), data=name)


# What the paper claims


def asked(results: Results) -> Results:
    """The results, unless they are about your own fields, of which the paper claims nothing."""
    if any(row.coordinates.get("data") == "yours" for row in results.rows):
        raise NotTestable("this run was about your own fields; the claim is about the study's")
    return results


@study.claim("a training step at 64^2 is at least 5 times faster than the FNO's", paper="3x to 10x, growing with resolution")
def faster_steps(results: Results) -> Any:
    return asked(results).mean("step_ratio", "t1", resolution=64) >= 5


@study.claim("the ratio of steps grows with the resolution, from 32^2 over 64^2 to 128^2", paper="3x to 10x, growing with resolution")
def growing(results: Results) -> Any:
    small, middle, large = (asked(results).mean("step_ratio", "t1", resolution=n) for n in STEPS_AT)
    return (middle > small.high) & (large > middle.high)


@study.claim("after the same processor time at 64^2, less error than the FNO", paper="over 20 % lower error on average")
def less_error(results: Results) -> Any:
    return asked(results).ratio("error", "t1", "fno", **VORTICITY) < 1


@study.claim(
    "after the same epochs on Darcy at 16^2, at least 20 % less error than the FNO",
    paper="over 20 % lower error on average",
    if_fails="a thousand samples are few and Darcy's coefficients jump: a filter that is the same everywhere learns from every point of a "
    "field, where T1 has weights of their own for each pair of modes",
)
def same_epochs(results: Results) -> Any:
    return asked(results).ratio("error", "t1", "fno", **FEW) <= 0.8


@study.claim("no error is below the floor of its modes")
def above_the_floor(results: Results) -> Any:
    def over(arm: str) -> Any:
        values = (asked(results).values(figure, arm, **VORTICITY) for figure in ("error", "floor"))
        return bootstrap(lambda error, floor: error / floor, *values, what=f"error / floor of {arm}") >= 1

    return over("t1") & over("t1-fourier")


@study.claim(
    "started with preserved variance, T1 errs less than with the naive start", paper="the naive start loses variance in every layer"
)
def preserved_variance(results: Results) -> Any:
    if not results.has("error", "t1-naive"):
        raise NotTestable("the naive start runs at full scale alone")
    return asked(results).ratio("error", "t1", "t1-naive", **VORTICITY) < 1


@study.summary
def summary(results: Results) -> str:
    say = results.say
    if results.has("error", "t1") and any(row.coordinates.get("data") == "yours" for row in results.rows):
        return (
            f"On your fields T1 erred by {say('error', 't1', **YOURS)} (floor {say('floor', 't1', **YOURS)}), with the Fourier basis by "
            f"{say('error', 't1-fourier', **YOURS)}, the FNO by {say('error', 'fno', **YOURS)}, the mean of the targets by "
            f"{say('error', 'mean', **YOURS)}, after the same processor time."
        )
    return (
        f"After the same processor time at 64^2 T1 erred by {say('error', 't1', **VORTICITY)} (floor {say('floor', 't1', **VORTICITY)}, "
        f"{say('epochs', 't1', **VORTICITY)} epochs), with the Fourier basis by {say('error', 't1-fourier', **VORTICITY)}, the FNO by "
        f"{say('error', 'fno', **VORTICITY)} ({say('epochs', 'fno', **VORTICITY)} epochs) and the mean of the targets by "
        f"{say('error', 'mean', **VORTICITY)}. An FNO's step took {say('step_ratio', 't1', resolution=64)} times as long at 64^2 and "
        f"{say('step_ratio', 't1', resolution=128)} times at 128^2. On Darcy at 16^2, after as many epochs, T1 erred by "
        f"{say('error', 't1', **FEW)} and the FNO by {say('error', 'fno', **FEW)}."
    )
