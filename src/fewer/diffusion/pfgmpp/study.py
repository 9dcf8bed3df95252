"""PFGM++ beside EDM: the same network, images, sampler and cost, with a finite D or without, where sampling is clean and where it is rough.

Samples are judged by Frechet distances to the training images, in pixels and in the features of a classifier, beside that of one half of
the images to the other. Rough sampling is the paper's: noise alpha sigma added before every step, weights on few bits, and few steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fewer.diffusion.pfgmpp.perturbation import student_t_noise
from fewer.diffusion.pfgmpp.problems import BATCH, SIGMA_MAX, SIGMA_MIN, Task, make_task, train
from fewer.diffusion.pfgmpp.quantization import quantize_weights
from fewer.diffusion.pfgmpp.sampling import sample
from fewer.meters import median_seconds
from fewer.study import Curve, Estimate, Figure, NotTestable, Results, Scale, Study, Trial
from fewer.study.results import All

STEPS, BITS = 18, 32
NOT_ON_A_GRID = "norm", "noise", "time_embedding"  # the last is a U-Net's


def at(alpha: float = 0.0, bits: int = BITS, steps: int = STEPS) -> dict[str, Any]:
    return {"alpha": alpha, "bits": bits, "steps": steps}


PLAIN, NOISY, COARSE, SHORT = at(), at(alpha=0.3), at(bits=4), at(steps=6)
SHEETS = {"images": PLAIN, "noise added before each step (alpha 0.3)": NOISY, "weights of 4 bits": COARSE, "6 steps (11 calls)": SHORT}
MORE = [at(alpha=0.1), at(alpha=0.2), at(bits=6), at(bits=5), at(bits=3), at(steps=4), at(steps=9)]  # at full scale

study = Study(
    "pfgmpp",
    question="What does a heavier tail of the noise gain, where sampling is clean and where it is rough?",
    baseline="edm",
    figures=[
        Figure("frechet", "Frechet distance in pixels", at=PLAIN),
        Figure("frechet", "noise added before each step (alpha 0.3)", at=NOISY),
        Figure("frechet", "weights of 4 bits", at=COARSE),
        Figure("frechet", "6 steps (11 calls)", at=SHORT),
        Figure("floor", "of half the images to the other half"),
        Figure("frechet_features", "in features", at=PLAIN),
        Figure("frechet_features", "in features, alpha 0.3", at=NOISY),
        Figure("floor_features", "in features, half to half"),
        Figure("frechet_held_out", "to held-out images", detail=True),
        Figure("frechet", "Frechet distance in pixels", detail=True),
        Figure("frechet_features", "Frechet distance in features", detail=True),
        Figure("calls", "network calls of a sample", detail=True, at=PLAIN),
        Figure("step_seconds", "a training step, processor time", "s"),
        Figure("noise_seconds", "its noise, a sample", "s", detail=True),
    ],
    charts=[
        Curve("frechet", over="alpha", at={"bits": BITS, "steps": STEPS}, title="Noise added before each step"),
        Curve("frechet", over="bits", at={"alpha": 0.0, "steps": STEPS}, title="Bits of the weights"),
        Curve("frechet", over="steps", at={"alpha": 0.0, "bits": BITS}, title="Steps of the sampler"),
    ],
    time_limit=24 * 3600,
)
study.option("data", "", help="digits8, mnist28, cifar-10, or FILE.npz with x [N, H, W] or [N, C, H, W], uint8 or floats in [-1, 1]")
study.option("steps", 0, help="training steps; 0: 1,500, at full scale 30,000", least=0)


@study.task
def task(scale: Scale, data: str, steps: int) -> Task:
    return make_task(data, steps, scale is Scale.FULL)


def pfgmpp(job: Task, trial: Trial, D: float, full_only: bool = False) -> None:
    """Train with D extra dimensions, and judge samples of every kind."""
    if full_only and trial.scale is not Scale.FULL:
        trial.note("D", "trained at full scale alone")
        return
    every = max(1, job.steps // 20)

    def tell(step: int, loss: float) -> None:
        if step % every == 0:
            trial.progress(step, job.steps, f"D = {D:g}: loss {loss:.3f}")

    with trial.measure("train") as training:
        model = train(job, D, trial.seed, trial.device, tell)
    trial.log("step_seconds", training.figures()["cpu_seconds"] / job.steps)
    shape, draw = (BATCH, *job.shape), torch.Generator().manual_seed(trial.seed)
    trial.log("noise_seconds", median_seconds(lambda: student_t_noise(shape, D, draw), processor=True) / BATCH)
    for figure in job.judges:
        trial.log(figure.replace("frechet", "floor"), job.floor(figure))
    for how in [PLAIN, NOISY, COARSE, SHORT, *(MORE if trial.scale is Scale.FULL else [])]:
        judge(job, trial, model, D, how)


def judge(job: Task, trial: Trial, model: torch.nn.Module, D: float, how: dict[str, Any]) -> None:
    """Log the distances of samples that were drawn in one way."""
    calls = 0

    def denoiser(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.cat([net(*part) for part in zip(x.split(2000), sigma.split(2000), strict=True)])

    net = model if how["bits"] == BITS else quantize_weights(model, how["bits"], NOT_ON_A_GRID)
    draw = torch.Generator(trial.device).manual_seed(10_000 + trial.seed)  # the same for all ways and arms
    grid = {"steps": how["steps"], "sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX}
    x = sample(denoiser, (job.samples, *job.shape), D, generator=draw, injected=how["alpha"], **grid)
    for figure in job.judges:
        trial.log(figure, job.distance(figure, x), **how)
    trial.log("calls", calls, **how)
    for name, way in SHEETS.items():
        if way == how:
            trial.show(x, name)
    if how == PLAIN:
        trial.log("frechet_held_out", job.distance("frechet", x, job.test))


study.arm_table(
    pfgmpp,
    {
        "edm": {"label": "EDM (D = inf)", "D": math.inf},
        "d16": {"label": "PFGM++, D = 16", "D": 16},
        "d64": {"label": "PFGM++, D = 64", "D": 64},
        "d4": {"label": "PFGM++, D = 4", "D": 4, "full_only": True},
        "d256": {"label": "PFGM++, D = 256", "D": 256, "full_only": True},
        "d2048": {"label": "PFGM++, D = 2048", "D": 2048, "full_only": True},
    },
)


# What the paper claims


def beside(results: Results, arm: str, other: str, how: dict[str, Any], figure: str = "frechet") -> Estimate:
    return results.ratio(figure, arm, other, **how)


@study.claim(
    "Clean sampling: the distance of D = 16 and D = 64 is within 0.10 of EDM's", paper="CIFAR-10, 35 calls: FID 1.92 and 1.91 against 1.98"
)
def as_good(results: Results) -> Any:
    each = [results.difference("frechet", arm, "edm", **PLAIN).between(-0.1, 0.1) for arm in ("d16", "d64")]
    return each[0] & each[1]


@study.claim(
    "Noise before each step (alpha 0.3): D = 16 has at most 0.85 of EDM's distance", paper="FID over alpha rises slower the smaller D is"
)
def robust(results: Results) -> Any:
    return beside(results, "d16", "edm", NOISY) <= 0.85


@study.claim("In the features of a classifier, too, D = 16 has at most 0.85 of it", paper="FID over alpha rises slower the smaller D is")
def robust_features(results: Results) -> Any:
    if "frechet_features" not in results.figures:
        raise NotTestable("a classifier is at hand for digits alone")
    return beside(results, "d16", "edm", NOISY, "frechet_features") <= 0.85


@study.claim("Noise before each step: D = 16 has a smaller distance than D = 64", paper="FID over alpha rises slower the smaller D is")
def ordered(results: Results) -> Any:
    return beside(results, "d16", "d64", NOISY) < 1


NONE = "no effect found: the paper's gain, on far larger networks and images, does not show at this scale"


def gains(results: Results, how: dict[str, Any], most: float) -> Any:
    return All(tuple(beside(results, arm, "edm", how) <= most for arm in ("d16", "d64")))


@study.claim(
    "Clean sampling: a finite D has at most 0.97 of EDM's distance",
    paper="CIFAR-10: FID 1.91 against 1.98; FFHQ: 2.43 against 2.53",
    if_fails=NONE,
)
def better(results: Results) -> Any:
    return gains(results, PLAIN, 0.97)


@study.claim(
    "Six steps: a finite D has at most 0.95 of EDM's distance", paper="FID rises slower with fewer calls at D = 64 and 128", if_fails=NONE
)
def few_steps(results: Results) -> Any:
    return gains(results, SHORT, 0.95)


@study.claim(
    "Weights of 4 bits: a finite D has at most 0.95 of EDM's distance", paper="D = 64 and 128 lose much less at 6 and 5 bits", if_fails=NONE
)
def few_bits(results: Results) -> Any:
    return gains(results, COARSE, 0.95)


@study.claim("FID of CIFAR-10 and FFHQ", paper="the card's results")
def images(results: Results) -> Any:
    raise NotTestable("200 million images of training are beyond this machine; `--full --set data=cifar-10` trains a small U-Net")


@study.summary
def summary(results: Results) -> str:
    def of(arm: str, how: dict[str, Any]) -> str:
        return f"{beside(results, arm, 'edm', how).value:.2f}"

    said = (
        f"With noise added before each step D = 16 kept {of('d16', NOISY)} of EDM's Frechet distance and D = 64 {of('d64', NOISY)}, at the "
        f"same cost; with clean sampling they have {of('d16', PLAIN)} and {of('d64', PLAIN)} of it"
    )
    tests = {"clean sampling": better, "six steps": few_steps, "weights of 4 bits": few_bits}
    without = [name for name, test in tests.items() if test(results).outcome != "holds"]
    return said + (f". No effect of a finite D was found in {', '.join(without)}." if without else ".")
