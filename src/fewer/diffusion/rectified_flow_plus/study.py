"""2-rectified flow++ beside 2-rectified flow: how near to real images 1, 2 and 4 network calls come, and whether images can be inverted.

One round of pairs from one teacher; the arms differ in where training begins, in the law of times and in the premetric. A control that the
paper lacks regresses the image on the noise at t = 1 alone. Samples are judged in pixels and by a classifier that no premetric looks at.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fewer.diffusion.rectified_flow_plus.pairs import PairDataset
from fewer.diffusion.rectified_flow_plus.premetric import LPIPSHuber, PseudoHuber, SquaredL2
from fewer.diffusion.rectified_flow_plus.problems import SAMPLER, Task, of_digits, of_file
from fewer.diffusion.rectified_flow_plus.reflow import ReflowConfig, train_reflow
from fewer.diffusion.rectified_flow_plus.sampler import UPDATES, invert, sample, straightness
from fewer.diffusion.rectified_flow_plus.velocity import EPS
from fewer.study import Curve, Figure, NotTestable, Results, Scale, Study, Trial
from fewer.study.results import All, bootstrap
from fewer.tasks import frechet_distance

JUDGED, CALLS, SPACES = 2000, (1, 2, 4), ("pixels", "features")
INVERSIONS, STRAIGHT_STEPS = (2, 8), 8
QUICK = ReflowConfig(steps=600, batch_size=256, lr=1e-3, warm_up=50, decay=True, ema=0.995)
REFLOWED = ("a", "b", "c", "f")


def at(calls: int, update: str = "default", space: str = "pixels") -> dict[str, Any]:
    return {"space": space, "calls": calls, "update": update}


study = Study(
    "rectified-flow-plus",
    question="How near to real images do 1, 2 and 4 network calls come?",
    baseline="a",
    figures=[
        Figure("frechet", "Frechet distance in pixels, 1 call", at=at(1)),
        Figure("frechet", "2 calls", at=at(2)),
        Figure("frechet", "4 calls, new update", at=at(4, "new")),
        Figure("frechet", "in features of a classifier, 1 call", at=at(1, space="features")),
        Figure("frechet", "features, 2 calls", at=at(2, space="features")),
        Figure("inversion", "MSE of a round trip of held-out images, 2 + 2 calls", at={"calls": 2}),
        Figure("inversion", "8 + 8 calls", at={"calls": 8}),
        Figure("straightness", "how far the paths are from straight", detail=True),
        Figure("noise_std", "deviation of the inverted noise, 8 calls", better="", at={"calls": 8}, detail=True),
        Figure("floor", "Frechet distance between halves of the real images, pixels", at={"space": "pixels"}, detail=True),
        Figure("calls", "forward passes, pairs and training", detail=True),
        Figure("train.cpu_seconds", "processor time of the training", "s"),
    ],
    charts=[
        Curve("frechet", over="calls", log=True, at={"space": "pixels", "update": "default"}, title="Distance in pixels"),
        Curve("frechet", over="calls", log=True, at={"space": "features", "update": "default"}, title="Distance in features"),
        Curve("inversion", over="calls", log=True, title="Error of a round trip"),
    ],
    time_limit=4 * 3600,
)
study.option("data", "", help="your own images: FILE.npz with x [N, H, W] or [N, C, H, W] and y [N]; a teacher is trained on them once")


@study.task
def task(scale: Scale, data: str) -> Task:
    full = scale is Scale.FULL
    pairs = 20_000 if full else 10_000
    return of_file(data, pairs) if data else of_digits("mnist28" if full else "digits8", pairs)


# The arms


def judge(job: Task, trial: Trial, velocity: nn.Module) -> None:
    """Log how near samples come, how straight the paths are, and what comes back of held-out images."""
    draw = torch.Generator().manual_seed(1000 + trial.seed)
    noise, test = torch.randn(JUDGED, *job.images.shape[1:], generator=draw).to(trial.device), job.test.to(trial.device)
    for calls in CALLS:
        for update in UPDATES if calls > 2 else UPDATES[:1]:  # the updates are one for 1 and 2 calls
            images = sample(velocity, noise, calls, "euler", update)
            log_distances(job, trial, images, calls, update)
            if calls <= 2:
                trial.show(images, f"images after {calls} call{'s' if calls > 1 else ''}")
    trial.log("straightness", straightness(velocity, noise[:500], STRAIGHT_STEPS))
    for calls in INVERSIONS:
        inverted = invert(velocity, test, calls, generator=draw)
        trial.log("inversion", float((sample(velocity, inverted, calls) - test).square().mean()), calls=calls)
        trial.log("noise_std", float(inverted.std()), calls=calls)


def log_distances(job: Task, trial: Trial, samples: Tensor, calls: int, update: str = "default") -> None:
    for space in SPACES:
        distance = frechet_distance(job.features(samples.cpu(), space), job.features(job.images, space))
        trial.log("frechet", distance, **at(calls, update, space))


def trained(
    job: Task, trial: Trial, model: nn.Module, pairs: PairDataset, premetric: nn.Module, a: float, one_time: bool = False
) -> nn.Module:
    """The student of a configuration; `one_time` draws no other time than where sampling begins."""
    config = replace(QUICK if trial.scale is Scale.QUICK else replace(QUICK, steps=6000), a=a, seed=trial.seed)

    def tell(step: int, loss: float) -> None:
        if step % 50 == 0:
            trial.progress(step, config.steps, f"loss {loss:.3g}")

    draw_times = (lambda n, _: torch.full((n,), 1 - EPS)) if one_time else None
    trial.note("premetric", premetric.name)  # pyright: ignore[reportArgumentType]
    with trial.measure("train"):
        student = train_reflow(model, pairs, config, premetric, draw_times=draw_times, tell=tell)
    trial.log("calls", len(pairs) * SAMPLER.calls + config.steps * config.batch_size)
    return student


def premetric_of(job: Task, kind: str) -> nn.Module:
    if kind in ("e", "f"):
        return LPIPSHuber(job.distance, time_weight="1/t" if kind == "f" else "none")
    return PseudoHuber() if kind == "d" else SquaredL2()


def reflow(
    job: Task,
    trial: Trial,
    kind: str,
    scratch: bool = False,
    a: float = 4.0,
    one_time: bool = False,
    rounds: int = 1,
    only_full: bool = False,
) -> None:
    if only_full and trial.scale is Scale.QUICK:
        trial.note("scale", "this arm runs at the full scale alone")
        return
    student, pairs = (job.scratch(trial.seed) if scratch else job.teacher).to(trial.device), job.pairs
    for number in range(rounds):
        if number:
            noise = pairs.batch(torch.arange(len(pairs)))[1]
            pairs = PairDataset(torch.cat([SAMPLER(student, part.to(trial.device)).cpu() for part in noise.split(500)]).clamp(-1, 1), noise)
        student = trained(job, trial, student, pairs, premetric_of(job, kind), a, one_time)
    judge(job, trial, student)


def teacher(job: Task, trial: Trial) -> None:
    """The flow that training begins at, also with all the calls that its pairs take; and how far real images are from one another."""
    velocity, draw = job.teacher.to(trial.device), torch.Generator().manual_seed(1000 + trial.seed)
    judge(job, trial, velocity)
    noise = torch.randn(JUDGED, *job.images.shape[1:], generator=draw).to(trial.device)
    log_distances(job, trial, SAMPLER(velocity, noise), SAMPLER.calls)
    halves = job.images[torch.randperm(len(job.images), generator=draw)].chunk(2)
    for space in SPACES:
        trial.log("floor", frechet_distance(*(job.features(half, space) for half in halves)), space=space)


study.arm_table(
    reflow,
    {
        "a": {"label": "A: scratch, uniform t, L2", "kind": "a", "scratch": True, "a": 0.0},
        "b": {"label": "B: from the teacher", "kind": "b", "a": 0.0},
        "c": {"label": "C: + U-shaped t", "kind": "c", "against": "b"},
        "d": {"label": "D: + Huber", "kind": "d", "against": "c", "only_full": True},
        "e": {"label": "E: LPIPS-Huber", "kind": "e", "against": "c", "only_full": True},
        "f": {"label": "F: LPIPS-Huber-1/t", "kind": "f", "against": "b"},
        "f-two-rounds": {"label": "F, two rounds of reflow", "kind": "f", "against": "f", "rounds": 2, "only_full": True},
        "direct": {"label": "regression of x on z", "kind": "f", "against": "f", "one_time": True},
    },
)
study.arm_table(teacher, {"teacher": {"label": "the teacher's flow"}})


# What the paper claims

LPIPS = "CIFAR-10, 1 call: FID 3.38 against 7.14"


def both_spaces(results: Results, arm: str, other: str, calls: int, bound: float) -> Any:
    return All(tuple(results.ratio("frechet", arm, other, **at(calls, space=space)) <= bound for space in SPACES))


@study.claim("Begun at the teacher, 1 call: at most 0.75 of the distance from scratch", paper="CIFAR-10, 1 call: FID 7.14 against 12.21")
def from_teacher(results: Results) -> Any:
    return both_spaces(results, "b", "a", 1, 0.75)


@study.claim(
    "The U-shaped law, 1 call: at most 0.95 of the distance with uniform times",
    paper="CIFAR-10, 1 call: FID 5.17 against 7.14",
    if_fails="no effect of the law is found here, in so short a training of so small images",
)
def u_shape(results: Results) -> Any:
    return both_spaces(results, "c", "b", 1, 0.95)


@study.claim("Configuration F, 1 call: at most 0.95 of B's distance in pixels", paper=LPIPS)
def features_help(results: Results) -> Any:
    return results.ratio("frechet", "f", "b", **at(1)) <= 0.95


@study.claim(
    "Configuration F, 1 call: at most 0.95 of B's distance in the features of a classifier that no premetric looks at",
    paper=LPIPS,
    if_fails="near t = 1 the loss is the premetric's features alone, and what few channels of unit length do not see, another classifier does",
)
def features_help_others(results: Results) -> Any:
    return results.ratio("frechet", "f", "b", **at(1, space="features")) <= 0.95


@study.claim("2 calls: every reflowed model at most 0.4 of its teacher's distance", paper="CIFAR-10, 2 calls: FID 2.40")
def straightened(results: Results) -> Any:
    return All(tuple(results.ratio("frechet", arm, "teacher", **at(2)) <= 0.4 for arm in REFLOWED))


@study.claim("4 calls: the new update is no further than the default for B, C and F", paper="better at 2 to 4 steps")
def new_update(results: Results) -> Any:
    def beside(arm: str) -> Any:
        new, default = (results.values("frechet", arm, **at(4, update)) for update in ("new", "default"))
        return bootstrap(lambda a, b: a / b, new, default, what=f"Frechet distance of {arm.upper()}, new / default update")

    return All(tuple(beside(arm) <= 1 for arm in ("b", "c", "f")))


@study.claim(
    "Held-out images come back after 2 + 2 calls: F's error is at most 0.1 of the regression's and below the teacher's",
    paper="few-step inversion, which distilled models have not",
)
def invertible(results: Results) -> Any:
    return (results.ratio("inversion", "f", "direct", calls=2) <= 0.1) & (results.ratio("inversion", "f", "teacher", calls=2) < 1)


@study.claim(
    "More calls help: F at 4 calls is nearer than at 1, the regression is further", paper="CIFAR-10: FID 3.38, then 2.40 with 2 calls"
)
def more_calls(results: Results) -> Any:
    def gain(arm: str) -> Any:
        many, one = (results.values("frechet", arm, **at(calls)) for calls in (4, 1))
        return bootstrap(lambda a, b: a / b, many, one, what=f"Frechet distance of {arm}, 4 calls / 1 call")

    return (gain("f") < 1) & (gain("direct") > 1)


@study.claim(
    "1 call: F is no further than a regression of the image on the noise (a control that the paper lacks)",
    if_fails="one call is all that the regression is trained for, while F spends its training on all times; it loses wherever more is asked",
)
def against_regression(results: Results) -> Any:
    return results.ratio("frechet", "f", "direct", **at(1)) <= 1


@study.claim("FID on CIFAR-10, ImageNet-64, AFHQ and FFHQ, and the size of LPIPS' gain", paper="the card's results")
def images(results: Results) -> Any:
    raise NotTestable("their teachers and LPIPS' weights are not to be had here, and small digits have little texture that LPIPS could see")


@study.summary
def summary(results: Results) -> str:
    def of(arm: str, calls: int) -> str:
        return results.say("frechet", arm, **at(calls))

    return (
        f"With 1, 2 and 4 network calls 2-rectified flow++ (F) came to a Frechet distance of {of('f', 1)}, {of('f', 2)} and {of('f', 4)} in "
        f"pixels; from scratch (A) it was {of('a', 1)}, {of('a', 2)} and {of('a', 4)}, along the teacher's flow {of('teacher', 1)}, "
        f"{of('teacher', 2)} and {of('teacher', 4)}; the teacher's {SAMPLER.calls} calls came to {of('teacher', SAMPLER.calls)}, and two "
        f"halves of the real images are {results.say('floor', 'teacher', space='pixels')} apart. A regression of the image on the noise came "
        f"to {of('direct', 1)} with 1 call and to {of('direct', 4)} with 4. Held-out images came back after 2 + 2 calls with an error of "
        f"{results.say('inversion', 'f', calls=2)} (the regression: {results.say('inversion', 'direct', calls=2)})."
    )
