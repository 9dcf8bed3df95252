"""FZooS beside federated finite differences: a black-box attack on five models at once, and quadratics of unlike clients.

The clients' mean F after each round is measured from outside, for all arms alike, and counts as nobody's query. At quick scale three images a
seed of 14 x 14 pixels are attacked for 12 rounds of 5 steps, and a quadratic of 100 numbers is searched for 15 rounds of 10.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fewer.devices import one_thread
from fewer.federated._shared.problems import DATA_HELP
from fewer.federated.fzoos.algorithm import FZooSConfig
from fewer.federated.fzoos.peers import FedZOConfig
from fewer.federated.fzoos.problems import Problem, attacks, quadratics
from fewer.federated.fzoos.search import Result, minimize
from fewer.study import Choice, Curve, Estimate, Figure, Results, Scale, Study, Trial
from fewer.study.results import bootstrap
from fewer.tasks import ImageTask, image_task

NUMBER_BYTES = 8  # float64

study = Study(
    "fzoos",
    question="How many calls of black boxes does a point take that is best for all of their owners?",
    baseline="fedzo",
    objective="minus the final mean margin on validation images",
    figures=[
        Figure("margin", "mean margin at the end, three images"),
        Figure("error", "quadratics: F - F* at the end"),
        Figure("queries", "queries of all clients, an image"),
        Figure("queries_to_fooled", "of them until the mean margin is below 0"),
        Figure("bytes", "bytes both ways, an image", "bytes"),
        Figure("seconds", "seconds, an image", "s"),
        Figure("quadratic_queries", "quadratics: queries", detail=True),
        Figure("alike_error", "alike quadratics: F - F* at the end", detail=True),
    ],
    charts=[
        Curve("mean_margin", over="round", x="queries_so_far", title="Attack: mean margin over queries of all clients"),
        Curve("mean_margin", over="round", title="Attack: mean margin over rounds"),
        Curve("mean_margin", over="round", x="bytes_so_far", title="Attack: mean margin over bytes"),
        Curve("quadratic_error", over="round", log=True, title="Quadratics of unlike clients: F - F* over rounds"),
    ],
    time_limit=24 * 3600,
)
study.option("data", "fashion-mnist", help=f"{DATA_HELP}; a client's model learns its images")


@dataclass(frozen=True)
class Size:
    """How large the problems are."""

    clients: int
    images: int
    side: int
    rounds: int
    steps: int
    features: int
    dimension: int
    quadratic_clients: int
    quadratic_rounds: int
    unlike: float


SIZES = {
    Scale.QUICK: Size(5, 3, 14, 12, 5, 2_000, 100, 5, 15, 5.0),
    Scale.FULL: Size(10, 15, 32, 30, 10, 10_000, 300, 5, 50, 50.0),
}
ALIKE = 0.5  # C of quadratics whose clients are nearly alike


@study.task
def task(scale: Scale, data: str) -> ImageTask:
    kept: dict[str, Any] = (
        {"train": 4_000, "validation": 500, "test": 500} if scale is Scale.QUICK else {"train": 20_000, "validation": 1_000, "test": 1_000}
    )
    return image_task(data, side=SIZES[scale].side, beside=["client"], **kept)


Settings = FZooSConfig | FedZOConfig
Curves = dict[str, list[float]]


def search(problem: Problem, rounds: int, settings: Settings, seed: int) -> tuple[Result, Curves]:
    """A search, and after each round F and what was spent so far."""
    course: Curves = {"value": [], "queries": [], "bytes": []}

    def tell(round: int, result: Result) -> None:
        course["value"].append(problem.value(result.x))
        course["queries"].append(sum(result.queries))
        course["bytes"].append(NUMBER_BYTES * (sum(result.numbers_down) + sum(result.numbers_up)))

    return minimize(problem.boxes, problem.x0, rounds, settings, seed, tell), course


def run(task: ImageTask, trial: Trial, make: Callable[..., Settings]) -> None:
    """An arm: the attack at the tuned rate, and unless that is being tuned the quadratics."""
    size = SIZES[trial.scale]
    few = {"features": size.features, "near": 100, "near_round": 200} if trial.scale is Scale.QUICK else {"features": size.features}
    settings = make(few, local_steps=size.steps, lr=trial.settings["lr"])
    with one_thread():
        found = attack(task, trial, size, settings)
        if trial.tuning:
            trial.objective(-found)
            return
        for name, unlike in (("", size.unlike), ("alike_", ALIKE)):
            search_quadratic(trial, size, make({"features": size.features}), unlike, name)


def attack(task: ImageTask, trial: Trial, size: Size, settings: Settings) -> float:
    """The mean margin at the end, over images; each image's course is logged, and their mean's."""
    problems = attacks(task, size.clients, size.images, trial.seed, trial.tuning)
    trial.note("clients", str(len(problems[0].boxes)))
    courses: list[Curves] = []
    started = time.perf_counter()
    for place, problem in enumerate(problems):
        courses.append(search(problem, size.rounds, settings, trial.seed)[1])
        trial.progress(place + 1, len(problems), f"margin {courses[-1]['value'][-1]:.2f}")
    seconds = (time.perf_counter() - started) / len(problems)
    if trial.tuning:
        return float(np.mean([course["value"][-1] for course in courses]))
    for image, course in enumerate(courses):
        for round, (value, queries) in enumerate(zip(course["value"], course["queries"], strict=True), 1):
            trial.log("image_margin", value, image=image, round=round)
            trial.log("image_queries", queries, image=image, round=round)
    for round in range(1, size.rounds + 1):
        for name, of in {"mean_margin": "value", "queries_so_far": "queries", "bytes_so_far": "bytes"}.items():
            trial.log(name, float(np.mean([course[of][round - 1] for course in courses])), round=round)
    fooled = [next((q for v, q in zip(course["value"], course["queries"], strict=True) if v < 0), math.inf) for course in courses]
    margin = float(np.mean([course["value"][-1] for course in courses]))
    trial.log("margin", margin)
    trial.log("queries", float(np.mean([course["queries"][-1] for course in courses])))
    trial.log("bytes", float(np.mean([course["bytes"][-1] for course in courses])))
    if math.isfinite(max(fooled)):
        trial.log("queries_to_fooled", float(np.mean(fooled)))
    else:
        trial.note("queries_to_fooled", "not every image was told wrong in the end")
    trial.log("seconds", seconds)
    return margin


def search_quadratic(trial: Trial, size: Size, settings: Settings, unlike: float, name: str) -> None:
    """F - F* on quadratics whose clients are so unlike."""
    problem = quadratics(size.dimension, size.quadratic_clients, unlike, trial.seed)
    assert problem.least is not None
    result, course = search(problem, size.quadratic_rounds, settings, trial.seed)
    trial.log(f"{name}error", course["value"][-1] - problem.least)
    if not name:
        trial.log("quadratic_queries", sum(result.queries))
        for round, value in enumerate(course["value"], 1):
            trial.log("quadratic_error", value - problem.least, round=round)


def fzoos(**variant: Any) -> Callable[..., Settings]:
    return lambda few, **settings: FZooSConfig(**few, **settings, **variant)


def fedzo(**variant: Any) -> Callable[..., Settings]:
    return lambda few, **settings: replace(FedZOConfig(**settings), **variant)


study.arm_table(
    run,
    {
        "fedzo": {"label": "FedZO", "make": fedzo()},
        "fedzo-scaffold": {"label": "FedZO-SCAFFOLD", "make": fedzo(mode="scaffold")},
        "fzoos": {"label": "FZooS", "make": fzoos()},
        "fzoos-uncorrected": {"label": "FZooS, no correction", "make": fzoos(correction=False)},
    },
    space={"lr": Choice([0.05, 0.02, 0.1])},
)


# What the paper claims


def images(results: Results) -> list[int]:
    return sorted({int(dict(key)["image"]) for key in results.curve("image_margin", "fzoos")})


def to_fedzo(results: Results, image: int) -> np.ndarray:
    """Rounds until FZooS is where FedZO ends, of each seed."""
    return results.threshold("image_margin", "fzoos", over="round", reach="fedzo", better="lower", image=image).per_seed


def spent(results: Results, arm: str, image: int, rounds: np.ndarray) -> np.ndarray:
    """Queries of an arm after so many rounds, of each seed; infinite where it took no end."""
    curve = {
        int(dict(key)["round"]): by_seed for key, by_seed in results.curve("image_queries", arm).items() if dict(key)["image"] == image
    }
    seeds = sorted(next(iter(curve.values())))
    return np.array([curve[int(round)][seed] if math.isfinite(round) else math.inf for seed, round in zip(seeds, rounds, strict=True)])


def of_fedzos(results: Results, what: str) -> Estimate:
    """The share of FedZO's queries, or of its rounds, after which FZooS is where FedZO ends: the mean over images."""
    shares = []
    for image in images(results):
        rounds = to_fedzo(results, image)
        last = max(int(dict(key)["round"]) for key in results.curve("image_margin", "fedzo"))
        if what == "rounds":
            shares.append(rounds / last)
        else:
            shares.append(spent(results, "fzoos", image, rounds) / spent(results, "fedzo", image, np.full(len(rounds), float(last))))
    return bootstrap(
        lambda share: share, np.mean(shares, axis=0), what=f"{what} to FedZO's last mean margin, FZooS / FedZO, mean over images"
    )


@study.claim(
    "Attack: FZooS is where FedZO ends after at most 0.6 of FedZO's queries",
    paper="query-efficient (abstract; no figure could be read)",
    if_fails="the surrogate of so few queries points less well than as many finite differences",
)
def fewer_queries(results: Results) -> Any:
    return of_fedzos(results, "queries") <= 0.6


@study.claim(
    "Attack: FZooS ends below FedZO and below FedZO-SCAFFOLD",
    paper="outperforms existing federated zeroth-order methods (abstract)",
    if_fails="the others had more queries, which here were worth more than what is remembered",
)
def lower_in_the_end(results: Results) -> Any:
    return (results.difference("margin", "fzoos", "fedzo") < 0) & (results.difference("margin", "fzoos", "fedzo-scaffold") < 0)


@study.claim(
    "Attack: FZooS is where FedZO ends after at most 0.75 of its rounds",
    paper="communication-efficient, counted in rounds (abstract)",
    if_fails="the rate, which both share, sets how far a round goes",
)
def fewer_rounds(results: Results) -> Any:
    return of_fedzos(results, "rounds") <= 0.75


@study.claim(
    "Unlike quadratics: FZooS leaves at most half of FedZO's F - F*, and at most half of what it leaves without correction",
    paper="trajectory-informed surrogates and their correction (abstract; no figure could be read)",
    if_fails="clients are then so alike that a local surrogate's gradient is as good as the corrected one",
)
def correction_pays(results: Results) -> Any:
    return (results.ratio("error", "fzoos", "fedzo") <= 0.5) & (results.ratio("error", "fzoos", "fzoos-uncorrected") <= 0.5)


@study.summary
def summary(results: Results) -> str:
    say = results.say
    return (
        f"Attacking all clients' models at once, FZooS ended at a mean margin of {say('margin', 'fzoos')} with {say('queries', 'fzoos')} queries, "
        f"FedZO at {say('margin', 'fedzo')} with {say('queries', 'fedzo')}, FedZO-SCAFFOLD at {say('margin', 'fedzo-scaffold')}, and FZooS without "
        f"correction at {say('margin', 'fzoos-uncorrected')} with {say('queries', 'fzoos-uncorrected')}, which is the cheapest where clients are "
        f"alike. FZooS was where FedZO ended after {of_fedzos(results, 'queries').value:.2f} of its queries and "
        f"{of_fedzos(results, 'rounds').value:.2f} of its rounds; it sends {say('bytes', 'fzoos', 'fedzo')} the bytes and computes for "
        f"{say('seconds', 'fzoos')} an image where FedZO takes {say('seconds', 'fedzo')}. On quadratics of unlike clients it left "
        f"{say('error', 'fzoos')} of F - F*, FedZO {say('error', 'fedzo')}, without correction {say('error', 'fzoos-uncorrected')}; of alike ones "
        f"{say('alike_error', 'fzoos')}, {say('alike_error', 'fedzo')} and {say('alike_error', 'fzoos-uncorrected')}. The paper's CIFAR-10 attack "
        f"and its Covertype metrics are not shown here."
    )
