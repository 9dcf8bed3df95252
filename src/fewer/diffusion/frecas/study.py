"""FreCaS beside direct sampling and plain enlargement, at twice the size that a model was trained at.

The model of digits has seen 16 x 16 pixels: whole small digits, and pieces of large ones. An independent classifier of 32 x 32 judges. On a
Gaussian field of known spectrum the same sampler shows what end time, gamma and enlargement do to the spectrum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fewer.devices import one_thread
from fewer.diffusion.frecas import problems
from fewer.diffusion.frecas.cascade import enlarge
from fewer.diffusion.frecas.problems import LARGE, SMALL, STEPS, Digits, Own, high_energy, plan
from fewer.diffusion.frecas.stages import FreCaSConfig, Stage, cost
from fewer.errors import UserError
from fewer.meters import count_flops
from fewer.study import Curve, Figure, NotTestable, Results, Scale, Study, Tradeoff, Trial
from fewer.tasks import frechet_distance

COUNT, FIELDS = 300, 200
BAND_GUIDANCE = 9.0  # w_h, three times the guidance
END_TIMES = {2.0: 400, 1.0: 200, 0.6: 100, 0.3: 50}  # end sigma of the digits -> end time of a pipeline
ENERGY = "energy above the small size's band"

study = Study(
    "frecas",
    question="What does an image of twice the training size cost, and is it whole and sharp?",
    baseline="direct",
    figures=[
        Figure("accuracy", "digits that a classifier reads", "%", "higher"),
        Figure("frechet", "Frechet distance to real digits"),
        Figure("energy", f"{ENERGY}, of real digits' (of a pipeline: of all)", "", ""),
        Figure("flops", "operations an image", "FLOP"),
        Figure("calls", "calls of the large size"),
        Figure("sample.cpu_seconds", "processor time", "s"),
        Figure("spectrum", "Gaussian field: power in the highest band, of the truth", "", "", at={"band": 4}),
        Figure("sample.seconds", "time", "s", detail=True),
    ],
    charts=[
        Tradeoff("accuracy", "frechet", title="Later ends keep the digit, earlier ones gain detail"),
        Tradeoff("accuracy", "flops", title="Digits that are read, over operations"),
        Curve("spectrum", over="band", title="Gaussian field: power over the truth, from low to high frequencies"),
    ],
    time_limit=4 * 3600,
)
study.option("pipeline", "", help="your own model: a directory of Stable Diffusion, SDXL or SD3, sampled at twice its size")
study.option("steps", STEPS, help="of a pipeline: network calls in all", least=4, most=1000)


@study.task
def task(scale: Scale, pipeline: str, steps: int) -> Digits | Own:
    if not pipeline:
        return problems.digits(COUNT)
    try:
        return problems.own(pipeline, steps)
    except (OSError, ValueError) as mistake:  # in the user's own files
        raise UserError(str(mistake)) from mistake


# The arms

Sample = Callable[[int, torch.Generator], torch.Tensor]  # (images, generator) -> images


def judge(made: Digits, trial: Trial, sample: Sample, calls: float) -> None:
    """What it costs and how good it is."""
    with one_thread():
        with count_flops() as flops:
            sample(2, torch.Generator().manual_seed(0))
        with trial.measure("sample"):
            images = sample(made.count, torch.Generator().manual_seed(trial.seed))
    trial.log("flops", flops.total / 2)
    trial.log("calls", calls)
    report(made, trial, images)


def report(made: Digits, trial: Trial, images: torch.Tensor) -> None:
    trial.show(images, "pictures")
    trial.log("accuracy", made.accuracy(images))
    trial.log("frechet", frechet_distance(made.model.features(images), made.model.features(made.images)))
    trial.log("energy", high_energy(images) / high_energy(made.images))


def field(trial: Trial, config: FreCaSConfig | None) -> None:
    """The spectrum of Gaussian fields sampled so, over the truth."""
    known, draw = problems.gaussian_field(), torch.Generator().manual_seed(trial.seed)
    side = SMALL if config else LARGE
    noise = torch.randn(FIELDS, 1, side, side, generator=draw, dtype=torch.float64)
    with one_thread():
        found = (
            problems.two_stages(known.denoiser, config, noise, draw, clip=False) if config else problems.direct(known.denoiser(1), noise)
        )
    for band, power in enumerate(known.bands(found), start=1):
        trial.log("spectrum", power, band=band)


def picture(own: Own, trial: Trial, config: FreCaSConfig, enlarged: int = 0) -> None:
    """Pictures of a user's pipeline by a cascade (of one stage: directly), enlarged where that is said."""
    with trial.measure("sample"):
        images = own.pictures(config, trial.seed, trial.device)
    if enlarged:
        images = enlarge(images, (enlarged, enlarged))
    trial.show(images, "pictures")
    trial.log("energy", high_energy(images) / float(torch.fft.fft2(images.double()).abs().square().mean()))
    trial.log("calls", cost(config) * config.stages[-1].grid[0] ** 2 / images.shape[-2] ** 2)


def waits(trial: Trial, full_only: bool) -> bool:
    """Whether an arm runs at the full scale only, and this is another; it says so."""
    if full_only and trial.scale is not Scale.FULL:
        trial.note("scale", "runs at --full")
        return True
    return False


def one_size(made: Digits | Own, trial: Trial, side: int, flag: int, full_only: bool = False) -> None:
    """Direct sampling at the large size, or at the small one with enlargement."""
    if waits(trial, full_only):
        return
    if isinstance(made, Own):
        first, last = made.plan.stages
        stage = Stage(last.size if side == LARGE else first.size, first.steps + last.steps, 0)
        picture(made, trial, replace(made.plan, stages=(stage,), map_weight=0.0), 0 if side == LARGE else last.grid[0])
        return

    def sample(count: int, draw: torch.Generator) -> torch.Tensor:
        denoise = made.guided(plan(), count, (flag, flag))(0, None)
        found = problems.direct(denoise, torch.randn(count, 1, side, side, generator=draw))
        return found if side == LARGE else enlarge(found.clamp(-1, 1), (LARGE, LARGE))

    judge(made, trial, sample, STEPS * (side / LARGE) ** 2)
    if side == LARGE:
        field(trial, None)


def frecas(made: Digits | Own, trial: Trial, end: float = 1.0, bands: bool = False, full_only: bool = False, **words: Any) -> None:
    if waits(trial, full_only):
        return
    if isinstance(made, Own):
        first, last = made.plan.stages
        high = made.plan.high_guidance if bands else made.plan.guidance
        stages = (replace(first, end_time=END_TIMES[end]), last)
        picture(made, trial, replace(made.plan, **{"stages": stages, "high_guidance": high, "map_weight": 0.0} | words))
        return
    config = plan(end, **{"high_guidance": BAND_GUIDANCE} if bands else {}, **words)

    def sample(count: int, draw: torch.Generator) -> torch.Tensor:
        noise = torch.randn(count, 1, SMALL, SMALL, generator=draw)
        return problems.two_stages(made.guided(config, count), config, noise, draw)

    judge(made, trial, sample, cost(config))
    field(trial, replace(config, map_weight=0.0))  # a linear filter has no attention


@study.arm("real", label="real digits, as many")
def real(made: Digits | Own, trial: Trial) -> None:
    """What the judges say of real digits that the model was trained on: the noise floor of the Frechet distance."""
    if isinstance(made, Own):
        trial.note("real", "a pipeline brings no pictures")
        return
    images, labels = made.model.data("train")
    draw, each = torch.Generator().manual_seed(trial.seed), made.count // 10
    rows = [(labels == label).nonzero()[:, 0] for label in range(10)]
    chosen = torch.stack([row[torch.randperm(len(row), generator=draw)[:each]] for row in rows], dim=1).flatten()
    report(made, trial, images[chosen])


study.arm_table(
    one_size,
    {
        "direct": {"label": "direct", "side": LARGE, "flag": 1},
        "enlarged": {"label": "small and enlarged", "side": SMALL, "flag": 0},
        "direct-whole": {"label": "direct, told whole digits", "side": LARGE, "flag": 0, "full_only": True},
    },
)
study.arm_table(
    frecas,
    {
        "frecas": {"label": "FreCaS, end sigma 1"},
        "frecas-bands": {"label": "FreCaS, w_h 9", "bands": True},
        "frecas-late": {"label": "FreCaS, end sigma 0.6", "end": 0.6},
        "frecas-maps": {"label": "FreCaS, maps 0.6", "map_weight": 0.6},
        "frecas-0.3": {"label": "FreCaS, end sigma 0.3", "end": 0.3, "full_only": True},
        "frecas-2": {"label": "FreCaS, end sigma 2", "end": 2.0, "full_only": True},
        "frecas-gamma-1": {"label": "FreCaS, gamma 1", "gamma": 1.0, "full_only": True},
        "frecas-gamma-3": {"label": "FreCaS, gamma 3", "gamma": 3.0, "full_only": True},
        "frecas-nearest": {"label": "FreCaS, nearest", "upsample": "nearest", "full_only": True},
        "frecas-flat": {"label": "FreCaS, maps as released", "map_weight": 0.6, "map_resize": "released", "full_only": True},
        "sdedit": {"label": "no matched start (SDEdit)", "gamma": 0.0, "full_only": True},
    },
)


# What the paper claims

PAPER = "SDXL at 2048: FID_b better by 11.6 than ScaleCrafter, 2.86 times faster"
SHARP = (
    "at this size the model has seen pieces alone: guided strokes come out sharper than real ones and some break off, which the classifier's "
    "features see more than enlargement's blur"
)


def judged(results: Results) -> Results:
    if not results.has("frechet", "frecas"):
        raise NotTestable("no classifier knows what a pipeline of your own should give")
    return results


@study.claim("At end sigma 1 at least 0.9 of the digits are read", paper="coherent images above the training size", if_fails=SHARP)
def whole(results: Results) -> Any:
    return judged(results).mean("accuracy", "frecas") >= 0.9


@study.claim("At most half of direct sampling's Frechet distance", paper=PAPER, if_fails=SHARP)
def nearer(results: Results) -> Any:
    return judged(results).ratio("frechet", "frecas", "direct") <= 0.5


@study.claim("A lower Frechet distance than the small image enlarged", paper=PAPER, if_fails=SHARP)
def beyond_enlargement(results: Results) -> Any:
    return judged(results).ratio("frechet", "frecas", "enlarged") < 1


@study.claim("At most 0.6 of direct sampling's operations", paper="each step pays for its own size alone")
def operations(results: Results) -> Any:
    return judged(results).ratio("flops", "frecas", "direct") <= 0.6


@study.claim("At most 0.75 of its processor time", paper=PAPER, if_fails="small images keep a processor less busy than their area says")
def seconds(results: Results) -> Any:
    return results.ratio("sample.cpu_seconds", "frecas", "direct") <= 0.75


@study.claim("Stronger guidance of the new band (w_h 9) lowers the Frechet distance", paper="w_h 35 beside w_l 7.5", if_fails=SHARP)
def bands(results: Results) -> Any:
    return judged(results).ratio("frechet", "frecas-bands", "frecas") < 1


@study.claim(f"{ENERGY.capitalize()}: at least half of real digits', enlargement's below a tenth", paper="detail where there was none")
def detail(results: Results) -> Any:
    return (judged(results).mean("energy", "frecas") >= 0.5) & (results.mean("energy", "enlarged") < 0.1)


@study.claim("And not more than 1.5 of it: no false sharpness", if_fails=SHARP)
def not_oversharp(results: Results) -> Any:
    return judged(results).mean("energy", "frecas") <= 1.5


@study.claim("SDXL's FID, and 2.86 and 6.07 times the speed of ScaleCrafter and DemoFusion", paper="the card's results")
def images(results: Results) -> Any:
    raise NotTestable(
        "their weights and the other methods are not to be had here; `--set pipeline=DIRECTORY` races your own against itself"
    )


@study.summary
def summary(results: Results) -> str:
    say = judged(results).say
    return (
        f"At twice its training size the model's own digits were read in {say('accuracy', 'direct')} of cases, those of FreCaS in "
        f"{say('accuracy', 'frecas')}, for {say('flops', 'frecas', beside='direct')} the operations and "
        f"{say('sample.cpu_seconds', 'frecas', beside='direct')} the processor time. Frechet distance: {say('frechet', 'frecas')} "
        f"({say('frechet', 'frecas-bands')} with stronger guidance of the new band), direct {say('frechet', 'direct')}, enlarged "
        f"{say('frechet', 'enlarged')}, real digits {say('frechet', 'real')}. Ending at sigma 0.6: {say('accuracy', 'frecas-late')} read, distance "
        f"{say('frechet', 'frecas-late')}. Attention maps of the small stage: distance {say('frechet', 'frecas-maps')}, "
        f"{say('accuracy', 'frecas-maps')} read. Energy above the small band: {say('energy', 'frecas')} of real digits'."
    )
