"""FFA-LoRA beside federated LoRA, without noise and under two privacy budgets: accuracy, bytes up, the gap of averaging, the noise.

At quick scale a network that knows Fashion-MNIST upright is adapted to it upside down by three clients (Dirichlet 0.5). The rates are for
each arm and budget the best of some factors of two, by validation images; `fewer tune` gives all arms the same grid. "none" clips as the others do and adds
no noise: unclipped, SGD at these rates does not stay finite.
"""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from fewer import meters
from fewer.devices import one_thread
from fewer.federated._shared.algorithm import Reply, ServerState
from fewer.federated._shared.clients import Shards
from fewer.federated._shared.flat_model import FlatModel
from fewer.federated._shared.flower_records import reply_record
from fewer.federated._shared.partition import dirichlet
from fewer.federated._shared.problems import DATA_HELP, Size, shards_of
from fewer.federated._shared.sampling import Independent
from fewer.federated._shared.simulate import Round, simulate
from fewer.federated._shared.traffic import record_bytes
from fewer.federated.ffa_lora.accounting import PrivacyConfig
from fewer.federated.ffa_lora.adapters import Init, adapter_vectors, aggregation_gap, noise_energy
from fewer.federated.ffa_lora.algorithm import FedLoRA, LoRARoundsConfig
from fewer.federated.ffa_lora.problems import Adapting, texts, upside_down
from fewer.study import Curve, Figure, LogUniform, NotTestable, Results, Scale, Study, Trial
from fewer.study.results import bootstrap
from fewer.tasks import accuracy

BUDGETS = ("none", "6", "1")  # epsilon
TIGHT: dict[str, Any] = {"budget": "1", "times": 1}
STEEP: dict[str, Any] = {"budget": "1", "times": 4}  # at four times the rate
DELTA, LAST, UNLIKE, SEEDS = 1e-5, 5, 0.5, 3
STEPS = 10  # local

study = Study(
    "ffa-lora",
    question="What do half the bytes cost, and what does noise do to one trained factor and to two?",
    baseline="lora",
    figures=[
        Figure("accuracy", f"test accuracy at epsilon 1, mean of the last {LAST} rounds", "%", "higher", at=TIGHT),
        Figure("accuracy", "at epsilon 6", "%", "higher", at={"budget": "6", "times": 1}),
        Figure("accuracy", "without noise", "%", "higher", at={"budget": "none", "times": 1}),
        Figure("accuracy", "at epsilon 1 and four times the rate", "%", "higher", at=STEEP),
        Figure("bytes", "bytes up, all clients", "bytes", at=TIGHT),
        Figure("parameters", "numbers trained", "", at=TIGHT),
        Figure("gap", "gap of averaging at epsilon 1", "%", at=TIGHT),
        Figure("epsilon", "epsilon spent, the largest of a client", "", at=TIGHT),
        Figure("clipped", "examples clipped at epsilon 1", "%", "", at=TIGHT),
        Figure("noise", "energy of a step's noise in BA at epsilon 1", "", at=TIGHT),
        Figure("further_noise", "of it what A's noise adds", "", at=TIGHT),
        Figure("cpu_seconds", "processor time of the rounds at epsilon 1", "s", at=TIGHT),
    ],
    charts=[
        Curve("accuracy", over="round", at=TIGHT, title="Test accuracy over rounds, epsilon 1"),
        Curve("accuracy", over="round", at={"budget": "none", "times": 1}, title="Test accuracy over rounds, without noise"),
        Curve("accuracy", over="round", x="bytes", at=TIGHT, title="Test accuracy over bytes up, epsilon 1"),
        Curve("accuracy", over="round", x="epsilon", at={"budget": "6", "times": 1}, title="Test accuracy over epsilon spent, budget 6"),
    ],
    time_limit=24 * 3600,
    jobs=2,
)
study.option("data", "fashion-mnist", help=DATA_HELP)
study.option("text", "", help="--full: a JSONL file with text and label, which the language model is adapted to")
study.option("model", "", help="--full: a transformers directory; SmolLM2-135M by default")

SIZES = {
    Scale.QUICK: Size(6_000, 1_000, 5_000, clients=3, rounds=60, batch_size=100, side=14),
    Scale.FULL: Size(None, 1_000, 5_000, clients=3, rounds=1000, batch_size=200, side=14),
}
CLIP = {Scale.QUICK: 1.0, Scale.FULL: 2.0}
FEWEST = 1_000  # images a client at quick scale, where there are enough
EVERY = {Scale.QUICK: 5, Scale.FULL: 20}  # rounds after which is judged, and after each of the last ones


@study.task
def task(scale: Scale, data: str, text: str, model: str) -> Adapting:
    """The examples, and (so that no trial waits for them) the bases and each client's noise of the seeds that are run by default."""
    made = texts(model, text) if scale is Scale.FULL else upside_down(data)
    for seed in range(SEEDS):
        made.base_of(seed)
        shards, _, batch = federation(made, scale, seed)
        for budget in BUDGETS:
            noise_of(privacy_of(budget, scale), shards, batch, SIZES[scale].rounds)
    return made


def noise_of(privacy: PrivacyConfig, shards: Shards, batch: int, rounds: int) -> list[float]:
    """sigma of each client."""
    return [privacy.noise_for(batch / len(part), rounds * STEPS) for part in shards.parts]


def federation(task: Adapting, scale: Scale, seed: int, device: str = "cpu") -> tuple[Shards, str, int]:
    """Who holds which examples, that in words, and how many a step draws: fewer where a client has not so many."""
    size = SIZES[scale]
    fewest = min(FEWEST, len(task.train[0]) // (2 * size.clients))
    split = partial(dirichlet, alpha=UNLIKE, seed=seed, min_size=fewest)
    shards, words = shards_of(task, split, size.clients, how=f"Dirichlet {UNLIKE}", device=device)  # pyright: ignore[reportArgumentType] - has what is asked for
    return shards, words, min(size.batch_size, *map(len, shards.parts))


def privacy_of(budget: str, scale: Scale) -> PrivacyConfig:
    """A budget's settings; "none" clips and adds no noise."""
    if budget == "none":
        return PrivacyConfig(noise_multiplier=0.0, delta=DELTA, clip=CLIP[scale])
    return PrivacyConfig(epsilon=float(budget), delta=DELTA, clip=CLIP[scale])


@dataclass(frozen=True)
class Watched(FedLoRA):
    """The algorithm, and the replies of its last round."""

    seen: list[Reply] = field(default_factory=list, repr=False, compare=False)

    def aggregate(self, server: ServerState, replies: Any) -> ServerState:
        self.seen[:] = replies
        return super().aggregate(server, replies)


def follow(task: Adapting, trial: Trial, model: Any, budget: str, times: int) -> float:
    """One run of an arm: its course and where it ends. The last rounds' mean accuracy."""
    size, at = SIZES[trial.scale], {"budget": budget, "times": times}
    shards, words, batch = federation(task, trial.scale, trial.seed, trial.device)
    trial.note("clients", f"{words}; {batch} examples a step")
    judged = tuple(part.to(trial.device) for part in (task.validation if trial.tuning else task.test))
    rate, rounds = times * trial.settings[f"lr_{budget}"], size.rounds
    config = LoRARoundsConfig(
        local_steps=STEPS, batch_size=batch, lr=rate, privacy=(privacy := privacy_of(budget, trial.scale)), rounds=rounds
    )
    flat, algorithm = FlatModel(model.to(trial.device)), Watched(config)
    so_far, judge = dict.fromkeys(("bytes", "cpu_seconds"), 0.0), copy.deepcopy(flat.model)
    last, gaps = deque[float](maxlen=LAST), deque[float](maxlen=LAST)

    def tell(line: Round) -> None:
        so_far["bytes"] += sum(bytes_of(reply) for reply in algorithm.seen)
        so_far["cpu_seconds"] += line.cpu_seconds
        if line.round % EVERY[trial.scale] and line.round <= rounds - LAST:
            return
        last.append(accuracy(judge, judged))  # pyright: ignore[reportArgumentType] - a pair
        gaps.append(float(np.mean(list(aggregation_gap(flat, [reply.vectors["model"] for reply in algorithm.seen]).values()))))
        told = {"accuracy": last[-1], **so_far}
        if budget != "none":
            told["epsilon"] = max(reply.metrics["epsilon"] for reply in algorithm.seen)
        for name, value in told.items():
            trial.log(name, value, round=line.round, **at)
        trial.progress(line.round, rounds, f"epsilon {budget}, rate {rate:g}: {100 * last[-1]:.1f} %")

    def load(x: Tensor) -> None:
        judge.load_state_dict(flat.named(x), strict=False)

    sampler = Independent(size.fraction)
    with meters.counting() as counts:
        history = simulate(algorithm, flat, shards, rounds, sampler=sampler, seed=trial.seed, evaluate=load, tell=tell)
    if trial.tuning:
        return float(np.mean(last))
    sigma = float(np.mean(noise_of(privacy, shards, batch, rounds)))
    first, further = energies(flat, history.server.x, rate * sigma * CLIP[trial.scale] / batch)
    figures = {
        "accuracy": float(np.mean(last)), **so_far, "parameters": flat.size, "gap": float(np.mean(gaps)),
        "clipped": counts["clipped"] / max(1, counts["drawn"]), "noise": first + further, "further_noise": further,
    }  # fmt: skip
    if budget != "none":
        figures["epsilon"] = max(reply.metrics["epsilon"] for reply in algorithm.seen)
    for name, value in figures.items():
        trial.log(name, value, **at)
    return float(np.mean(last))


def bytes_of(reply: Reply) -> int:
    """A reply as it is serialised."""
    held = {name: vector.cpu() for name, vector in reply.vectors.items()}
    return record_bytes(reply_record(replace(reply, vectors=held), STEPS))


def energies(flat: FlatModel, x: Tensor, step_noise: float) -> tuple[float, float]:
    """What a step's noise does to the products of all layers: by B's noise, and by A's, where A is trained."""
    terms = [noise_energy(a, b, step_noise) for a, b in adapter_vectors(flat, x).values()]
    trained = any("lora_A" in name for name in flat.shapes)
    return sum(term[0] for term in terms), sum(term[1] + term[2] for term in terms) if trained else 0.0


def run(task: Adapting, trial: Trial, frozen: bool, init: Init = "kaiming", runs: tuple[tuple[str, int], ...] = ()) -> None:
    """An arm: each budget at the arm's own rate for it, and the rates that are four times too large."""
    with one_thread():  # layers so small that a second thread only waits for the first
        chosen = [pair for pair in runs if pair[1] == 1] if trial.tuning else runs
        ends = [follow(task, trial, task.adapted(trial.seed, frozen, init), budget, times) for budget, times in chosen]
    if trial.tuning:
        trial.objective(float(np.mean(ends)))


def rates(none: float, six: float, one: float) -> dict[str, LogUniform]:
    """One grid for all arms and budgets; where each begins was found by a few tries."""
    return {f"lr_{budget}": LogUniform(0.1, 32, start=start) for budget, start in zip(BUDGETS, (none, six, one), strict=True)}


ALL = (("none", 1), ("6", 1), ("1", 1), ("1", 4))
study.arm_table(
    run,
    {
        "lora": {"label": "LoRA", "frozen": False, "space": rates(4, 2, 0.25), "at_full": dict.fromkeys(("lr_none", "lr_6", "lr_1"), 0.1)},
        "ffa-lora": {"label": "FFA-LoRA", "frozen": True, "space": rates(30, 8, 2), "at_full": dict.fromkeys(("lr_none", "lr_6", "lr_1"), 1.0)},
        "ffa-lora-orthonormal": {
            "label": "FFA-LoRA, A orthonormal", "frozen": True, "init": "orthonormal", "runs": (("none", 1), ("1", 1)),
            "space": rates(10, 8 / 3, 2 / 3), "at_full": dict.fromkeys(("lr_none", "lr_6", "lr_1"), 1 / 3),
        },
    },
    runs=ALL,
)  # fmt: skip


# What the paper claims


@study.claim("FFA-LoRA's clients send half of LoRA's bytes", paper="393,216 against 786,432 numbers a round (RoBERTa-large, r = 8)")
def half_the_bytes(results: Results) -> Any:
    return results.ratio("bytes", "ffa-lora", "lora", **TIGHT).between(0.49, 0.51)


@study.claim(
    "Averaging loses nothing of FFA-LoRA's product (gap at most 1e-6) and more than 1 % of LoRA's at epsilon 1",
    paper="the mean of the products is not the product of the means; no figure",
)
def exact_mean(results: Results) -> Any:
    return (results.mean("gap", "ffa-lora", **TIGHT) <= 1e-6) & (results.mean("gap", "lora", **TIGHT) > 0.01)


@study.claim(
    "At epsilon 1 FFA-LoRA is at least as accurate as LoRA",
    paper="78.81 against 39.46 % at epsilon 6 (MNLI); repeated by FedSVD at epsilon 3: 66.00 against 50.71 % (six tasks of GLUE)",
    if_fails="one factor fits less than two of the same rank, which is worth about as much here as the noise on A costs",
)
def tight_budget(results: Results) -> Any:
    return results.difference("accuracy", "ffa-lora", "lora", **TIGHT) >= 0


@study.claim(
    "What FFA-LoRA has over LoRA is more at epsilon 1 than without noise",
    paper="noise on both factors multiplies (section 3)",
    if_fails="noise on A costs LoRA no more than noise on B costs both",
)
def noise_favours_one_factor(results: Results) -> Any:
    tight, calm = TIGHT, {"budget": "none", "times": 1}
    curves = [results.values("accuracy", arm, **at) for at in (tight, calm) for arm in ("ffa-lora", "lora")]
    return bootstrap(lambda a, b, c, d: (a - b) - (c - d), *curves, what="FFA-LoRA - LoRA, epsilon 1 minus none") > 0


@study.claim(
    "A rate four times too large costs FFA-LoRA fewer points than LoRA at epsilon 1",
    paper="FFA-LoRA is stable over rates and alpha (no figure here)",
    if_fails="both lose to noise on B at such a rate, which they share",
)
def steep_rate(results: Results) -> Any:
    curves = [results.values("accuracy", arm, **at) for arm in ("lora", "ffa-lora") for at in (TIGHT, STEEP)]
    return bootstrap(lambda a, b, c, d: (a - b) - (c - d), *curves, what="points lost by LoRA - by FFA-LoRA, four times the rate") > 0


@study.claim(
    "At epsilon 6 FFA-LoRA is at least as accurate as LoRA",
    paper="78.81 against 39.46 % (MNLI matched); repeated by FedSVD: 68.02 against 67.17 % (six tasks of GLUE)",
    if_fails="so little noise costs LoRA less than it gains by a second factor, and both arms have a rate of their own here, which the paper's "
    "arms chose from two grids that do not overlap much",
)
def loose_budget(results: Results) -> Any:
    return results.difference("accuracy", "ffa-lora", "lora", budget="6", times=1) >= 0


@study.claim("The gain is 39 points at epsilon 6, and GSM-8K rises too", paper="MNLI 78.81 against 39.46 %; GSM-8K 17.12 against 15.68 %")
def size_of_the_gain(results: Results) -> Any:
    raise NotTestable("RoBERTa-large on GLUE and LLaMA-7B on GSM-8K are not to be had here; --full runs a user's own texts")


@study.summary
def summary(results: Results) -> str:
    def said(arm: str, budget: str, times: int = 1) -> str:
        return results.say("accuracy", arm, budget=budget, times=times)

    return (
        f"On this machine FFA-LoRA's clients sent {results.say('bytes', 'ffa-lora', **TIGHT)} and LoRA's {results.say('bytes', 'lora', **TIGHT)}. "
        f"Without noise FFA-LoRA ended at {said('ffa-lora', 'none')} and LoRA at {said('lora', 'none')}, at epsilon 6 at {said('ffa-lora', '6')} "
        f"and {said('lora', '6')}, at epsilon 1 at {said('ffa-lora', '1')} and {said('lora', '1')}; at four times the rate, epsilon 1, at "
        f"{said('ffa-lora', '1', 4)} and {said('lora', '1', 4)}. Averaging the factors lost {results.say('gap', 'lora', **TIGHT)} of LoRA's "
        f"product and nothing of FFA-LoRA's. With orthonormal A it ended at {said('ffa-lora-orthonormal', 'none')} without noise and "
        f"{said('ffa-lora-orthonormal', '1')} at epsilon 1. Each arm had for each budget the rate that was the best of some factors of two."
    )
