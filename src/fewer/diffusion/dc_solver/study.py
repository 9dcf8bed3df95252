"""DC-Solver beside UniPC and DPM-Solver++: how far from the converged image 5 to 10 network calls end, with guidance and without.

The reference is 999 steps of DDIM on the same schedule from the same noises. Ratios are searched on ten noises with the labels 0 to 9,
others in each seed; all samplers are judged on a hundred further noises with drawn labels, the same in all seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from fewer.diffusion._shared.pipelines import Pipeline
from fewer.diffusion.dc_solver.problems import CALLS, SEARCH_SEED, TEST_SEED, UNSEEN, Network, digits, of_pipeline
from fewer.diffusion.dc_solver.ratios import CascadePolynomial, Ratios
from fewer.diffusion.dc_solver.search import search_ratios
from fewer.errors import UserError
from fewer.study import Curve, Figure, NotTestable, Results, Scale, Study, Trial
from fewer.study.results import All, bootstrap

NOISES = 10  # of a search
Setting = tuple[int, float]  # network calls, guidance scale


def at(calls: int, scale: float) -> dict[str, Any]:
    return {"scale": scale, "calls": calls}


study = Study(
    "dc-solver",
    question="How far from the converged image do 5 to 10 network calls end?",
    baseline="unipc",
    figures=[
        Figure("error", "MSE to the converged image, scale 1, 5 calls", at=at(5, 1.0)),
        Figure("error", "scale 1, 10 calls", at=at(10, 1.0)),
        Figure("error", "scale 4, 8 calls", at=at(8, 4.0)),
        Figure("error", "scale 7.5, 5 calls", at=at(5, 7.5)),
        Figure("error", "MSE to the converged image"),
        Figure("frechet", "Frechet distance to digits in a classifier's features, scale 1, 5 calls", at=at(5, 1.0)),
        Figure("floor", "of as many real digits"),
        Figure("ratio", "ratio of a step, scale 1, 10 calls", "", ""),
        Figure("removed", "share of a step's squared error that its ratio took away, scale 1, 10 calls", "", "higher"),
        Figure("calls", "network calls of all searches"),
        Figure("cpu_seconds", "their processor time", "s"),
    ],
    charts=[
        Curve("error", over="calls", log=True, at={"scale": 1.0}, title="Error without guidance (scale 1)"),
        Curve("error", over="calls", log=True, at={"scale": 7.5}, title="Error at guidance scale 7.5"),
        Curve("ratio", over="step", title="Ratios found (scale 1, 10 calls)"),
    ],
    time_limit=4 * 3600,
)
study.option("pipeline", "", help="your own model: a diffusers directory (unconditional, with labels, or with text and guidance)")


@study.task
def task(scale: Scale, pipeline: str) -> Network:
    if not pipeline:
        return digits()
    try:
        network = of_pipeline(pipeline)
        network.scheduler()  # says what it cannot be
    except (OSError, ValueError) as mistake:  # in the user's own files
        raise UserError(str(mistake)) from mistake
    # uniform in time from the first to the last, so that all numbers of calls share one reference
    return replace(network, config=network.config | {"timestep_spacing": "linspace"})


# The arms

Sampler = Callable[[int, float], Any]  # (network calls, guidance scale) -> a scheduler of diffusers


def settings_of(network: Network, first_scale_only: bool = False) -> list[Setting]:
    """What samplers are judged at: every number of calls at every scale, and what is never searched for the polynomial."""
    if first_scale_only:
        return [(calls, network.scales[0]) for calls in CALLS]
    unseen = list(UNSEEN) if len(network.scales) > 1 else []
    return [*((calls, scale) for scale in network.scales for calls in CALLS), *unseen]


def sheets(network: Network) -> dict[float, str]:
    """Guidance scale -> what the sheet of its images is called: those of the fewest calls, with the least guidance and with the most."""
    return {scale: f"images after {CALLS[0]} calls, guidance scale {scale:g}" for scale in (network.scales[0], network.scales[-1])}


def judge(network: Network, trial: Trial, sampler: Sampler, settings: list[Setting]) -> None:
    """Log the error at each setting, and without guidance also how far the images are from held-out digits."""
    for calls, scale in settings:
        x = network.ends(sampler(calls, scale), calls, scale)
        trial.log("error", float((x - network.converged(scale)).square().mean()), **at(calls, scale))
        if calls == CALLS[0] and scale in sheets(network):
            trial.show(x, sheets(network)[scale])
        if scale == network.scales[0] and (distance := network.frechet(x)) is not None:
            trial.log("frechet", distance, **at(calls, scale))


def peer(network: Network, trial: Trial, make: Callable[..., Any], first_scale_only: bool = False, **words: Any) -> None:
    judge(network, trial, lambda calls, scale: make(network, **words), settings_of(network, first_scale_only))


def unipc(network: Network, order: int) -> Any:
    return UniPCMultistepScheduler.from_config(network.config, solver_order=order, final_sigmas_type="sigma_min")


def two_m(network: Network) -> Any:
    return DPMSolverMultistepScheduler.from_config(network.config, solver_order=2, final_sigmas_type="sigma_min", solver_type="midpoint")


def searched(
    network: Network, trial: Trial, settings: list[Setting], noises: int, oracle: bool = False, **words: Any
) -> dict[Setting, Ratios]:
    """Ratios of each setting, and what the search cost; an oracle searches on the noises that it is judged on."""
    found, spent = {}, 0.0
    for calls, scale in settings:
        noise, condition = (
            network.drawn(network.noises, TEST_SEED) if oracle else network.drawn(noises, SEARCH_SEED + trial.seed, in_turn=True)
        )
        reference = network.reference(scale, noise, condition)
        started = time.process_time()
        model = network.model(scale, condition)
        found[calls, scale] = search_ratios(model, noise, reference, network.scheduler(**words), calls, guidance_scale=scale)
        spent += time.process_time() - started
        trial.progress(
            len(found), len(settings), f"{calls} calls, scale {scale:g}: {' '.join(f'{v:.2f}' for v in found[calls, scale].values)}"
        )
    trial.log("calls", sum(each.calls for each in found.values()))
    trial.log("cpu_seconds", spent)
    shown = found.get((CALLS[-1], network.scales[0]))
    for step, (ratio, removed) in enumerate(zip(shown.values, shown.removed, strict=True) if shown else (), start=1):
        trial.log("ratio", ratio, step=step)
        trial.log("removed", removed, step=step)
    return found


def dc(network: Network, trial: Trial, first_scale_only: bool = False, noises: int = NOISES, oracle: bool = False, **words: Any) -> None:
    settings = settings_of(network, first_scale_only)
    found = searched(network, trial, settings, noises, oracle, **words)
    judge(network, trial, lambda *setting: network.scheduler(ratios=found[setting], **words), settings)


def static(network: Network, trial: Trial, ratio: float) -> None:
    judge(network, trial, lambda calls, scale: network.scheduler(ratios=[1.0, 1.0] + [ratio] * (calls - 2)), settings_of(network, True))


def polynomial(network: Network, trial: Trial) -> None:
    """Fitted on the settings that are searched, judged on those that never are."""
    if len(network.scales) < 3:
        trial.note("polynomial", "this model takes no guidance; a polynomial needs three scales")
        return
    found = searched(network, trial, [(calls, scale) for scale in network.scales for calls in CALLS], NOISES)
    fitted = CascadePolynomial.fit(list(found.values()))
    judge(network, trial, lambda calls, scale: network.scheduler(ratios=fitted.ratios(calls, scale)), list(UNSEEN))


def converged(network: Network, trial: Trial) -> None:
    """What 999 steps come to, and as many held-out digits as there are samples: the floor under any distance to all of them."""
    for scale, name in sheets(network).items():
        trial.show(network.converged(scale), name)
    distance = network.frechet(network.converged(network.scales[0]))
    if distance is None or isinstance(network.source, Pipeline):
        trial.note("frechet", "no classifier judges your own model's images")
        return
    images = network.source.data("test")[0]
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(trial.seed))[: network.noises]
    for calls in CALLS:
        trial.log("frechet", distance, **at(calls, network.scales[0]))
    trial.log("floor", network.frechet(images[rows]) or 0.0)


study.arm_table(converged, {"converged": {"label": "DDIM, 999 steps"}}, against="unipc")
study.arm_table(
    peer,
    {
        "unipc": {"label": "UniPC, order 2", "make": unipc, "order": 2},
        "unipc-3": {"label": "UniPC, order 3", "make": unipc, "order": 3},
        "dpm++2m": {"label": "DPM-Solver++ 2M", "make": two_m},
        "unipc-logsnr": {
            "label": "UniPC, steps of log SNR",
            "make": Network.scheduler,
            "first_scale_only": True,
            "use_exponential_sigmas": True,
        },
        "unipc-karras": {"label": "UniPC, Karras' steps", "make": Network.scheduler, "first_scale_only": True, "use_karras_sigmas": True},
    },
)
study.arm_table(
    dc,
    {
        "dc": {"label": "DC on UniPC"},
        "dc-2m": {"label": "DC on 2M", "use_corrector": False, "against": "dpm++2m"},
        "dc-k1": {"label": "DC, K = 1", "first_scale_only": True, "dc_order": 1},
        "dc-k3": {"label": "DC, K = 3", "first_scale_only": True, "dc_order": 3},
        "dc-2-noises": {"label": "DC, 2 noises", "first_scale_only": True, "noises": 2},
        "dc-40-noises": {"label": "DC, 40 noises", "first_scale_only": True, "noises": 40},
        "dc-oracle": {"label": "DC, searched on the judged noises", "first_scale_only": True, "oracle": True},
    },
    against="unipc",
)
study.arm_table(static, {"dc-static": {"label": "DC, ratio 1.1 throughout", "ratio": 1.1}}, against="unipc")
study.arm_table(polynomial, {"dc-cpr": {"label": "DC, ratios by polynomial"}}, against="unipc")


# What the paper claims

GREEDY = (
    "the search minimises the error of the next state on ten noises, not that of the image on others; where the long last step dominates, what "
    "it gains on the way is partly lost"
)


def beside(results: Results, arm: str, other: str, calls: int, scale: float) -> Any:
    return results.ratio("error", arm, other, **at(calls, scale))


@study.claim(
    "Scale 1: at most 0.7 of UniPC's error at 5, 6, 8 and 10 calls", paper="FFHQ: FID 10.38 against 18.66 with 5 calls", if_fails=GREEDY
)
def unguided(results: Results) -> Any:
    return All(tuple(beside(results, "dc", "unipc", calls, 1.0) <= 0.7 for calls in CALLS))


@study.claim(
    "Scale 4, 8 calls: at most 0.92 of UniPC's error", paper="SD 2.1, scale 7.5: MSE 0.294 against 0.373 with 10 calls", if_fails=GREEDY
)
def guided(results: Results) -> Any:
    return beside(results, "dc", "unipc", 8, 4.0) <= 0.92


@study.claim(
    "Scale 7.5, 5 calls: at most 0.97 of UniPC's error, and on DPM-Solver++ 2M below both",
    paper="SD 2.1, scale 7.5: MSE 0.394 against 0.434 (UniPC) and 0.443 (DPM-Solver++) with 5 calls",
    if_fails=GREEDY,
)
def strongly_guided(results: Results) -> Any:
    return (
        (beside(results, "dc", "unipc", 5, 7.5) <= 0.97)
        & (beside(results, "dc-2m", "unipc", 5, 7.5) < 1)
        & (beside(results, "dc-2m", "dc", 5, 7.5) < 1)
    )


@study.claim("K = 2 is no worse than K = 1 at any number of calls (scale 1)", paper="K = 2 beats 1 and 3", if_fails=GREEDY)
def second_order(results: Results) -> Any:
    return All(tuple(beside(results, "dc", "dc-k1", calls, 1.0) <= 1 for calls in CALLS))


@study.claim(
    "Ten noises come within 5 % of forty (scale 1, every number of calls)",
    paper="20 or 30 noises hardly beat 10",
    if_fails="a ratio is one number, but the loss of ten noises has a minimum elsewhere than that of forty",
)
def few_noises(results: Results) -> Any:
    return All(tuple(beside(results, "dc", "dc-40-noises", calls, 1.0) <= 1.05 for calls in CALLS))


@study.claim(
    "Ratios by polynomial, at settings never searched: below UniPC at all three",
    paper="predicted for unseen steps and guidance without a search",
    if_fails="at strong guidance even searched ratios gain little or nothing here",
)
def unseen(results: Results) -> Any:
    return All(tuple(beside(results, "dc-cpr", "unipc", *setting) < 1 for setting in UNSEEN))


@study.claim(
    "They keep at least 0.8 of what a search there gains over UniPC, where it gains",
    paper="predicted for unseen steps and guidance without a search",
    if_fails="the polynomial smooths over what ten noises of one setting say",
)
def kept_gain(results: Results) -> Any:
    verdicts = []
    for setting in UNSEEN:
        ours, search, base = (results.values("error", arm, **at(*setting)) for arm in ("dc-cpr", "dc", "unipc"))
        if search.mean() < base.mean():
            what = f"gain by polynomial minus 0.8 of the search's, {setting[0]} calls, scale {setting[1]:g}"
            verdicts.append(bootstrap(lambda o, s, b: (b - o) - 0.8 * (b - s), ours, search, base, what=what) >= 0)
    if not verdicts:
        raise NotTestable("no search gained at a setting that the polynomial never saw")
    return All(tuple(verdicts))


@study.claim("FID on FFHQ, and Stable Diffusion's MSE", paper="the card's results")
def images(results: Results) -> Any:
    raise NotTestable("their weights are not to be had here; `--set pipeline=DIRECTORY` judges your own")


@study.summary
def summary(results: Results) -> str:
    def of(arm: str, calls: int, scale: float, other: str = "unipc") -> str:
        return f"{beside(results, arm, other, calls, scale).value:.2f}" if results.has("error", arm) else "?"

    one = f"Without guidance DC-Solver left {of('dc', 5, 1.0)} of UniPC's error with 5 network calls and {of('dc', 10, 1.0)} with 10"
    rest = f" (a constant ratio of 1.1: {of('dc-static', 5, 1.0)} and {of('dc-static', 10, 1.0)}; UniPC on a log SNR grid: "
    rest += f"{of('unipc-logsnr', 5, 1.0)} and {of('unipc-logsnr', 10, 1.0)}, on Karras' grid {of('unipc-karras', 5, 1.0)} and "
    rest += f"{of('unipc-karras', 10, 1.0)})"
    if (("calls", 5), ("scale", 7.5)) not in results.curve("error", "dc"):
        return one + rest + "."
    strong = f"; at guidance scale 7.5 {of('dc', 5, 7.5)} with 5 calls, and on DPM-Solver++ 2M {of('dc-2m', 5, 7.5)} of UniPC's"
    return (
        one
        + rest
        + strong
        + f". All searches together took {results.say('cpu_seconds', 'dc')} and {results.say('calls', 'dc')} calls of ten."
    )
