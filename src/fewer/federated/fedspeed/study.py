"""FedSpeed beside FedAvg, FedProx, SCAFFOLD, FedDyn and FedSAM on unlike clients: accuracy over rounds, bytes, gradients and seconds.

All arms share the local optimiser, the batches, the clients of each round and the tuning budget. At quick scale 2,000 images lie with 50
clients, 10 of which take part in each of 120 rounds, by the end of which FedAvg has flattened. FedSpeed is run as its authors ran it (their
simulator's server rule); the rule that the paper writes is an arm of its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewer.federated._shared.baselines import FedAvg, FedDyn, FedProx, FedSAM, Scaffold
from fewer.federated._shared.flat_model import FlatModel
from fewer.federated._shared.flower_records import wire_bytes
from fewer.federated._shared.local_training import LocalConfig
from fewer.federated._shared.partition import dirichlet
from fewer.federated._shared.problems import DATA_HELP, Size, shards_of
from fewer.federated._shared.sampling import FixedSize, Independent
from fewer.federated._shared.simulate import Round, simulate
from fewer.federated.fedspeed.algorithm import FedSpeedAlgorithm, FedSpeedConfig
from fewer.study import Curve, Estimate, Figure, LogUniform, Results, Scale, Study, Trial
from fewer.study.results import All, bootstrap
from fewer.tasks import ImageTask, accuracy, image_task, mlp, resnet18

UNLIKE = 0.1  # concentration of the Dirichlet split
MOST: dict[str, Any] = {"epochs": 5}  # local epochs where all arms meet
SHORT: dict[str, Any] = {"epochs": 1}
LAST = 10  # rounds whose mean accuracy is told: that of a single round jumps
FEWEST = 2  # images a client; at this concentration more are out of reach with 40 a client

study = Study(
    "fedspeed",
    question="How many rounds, bytes, gradients and seconds does a good global model take when clients are unlike?",
    baseline="fedavg",
    figures=[
        Figure("accuracy", f"test accuracy, mean of the last {LAST} rounds", "%", "higher", at=MOST),
        Figure("bytes", "bytes on the wire, all clients", "bytes", at=MOST),
        Figure("gradients", "gradients of batches", at=MOST),
        Figure("seconds", "time of the rounds", "s", at=MOST),
        Figure("cpu_seconds", "their processor time", "s", at=MOST),
        Figure("drift", "client drift |y - x|", "", "", at=MOST),
        Figure("accuracy", f"test accuracy, mean of the last {LAST} rounds", "%", "higher"),
        Figure("bytes", "bytes on the wire so far", "bytes"),
        Figure("gradients", "gradients so far"),
        Figure("seconds", "seconds so far", "s"),
    ],
    charts=[
        Curve("accuracy", over="round", at=MOST, title="Test accuracy over rounds (5 local epochs)"),
        Curve("accuracy", over="round", x="bytes", at=MOST, title="Test accuracy over bytes on the wire"),
        Curve("accuracy", over="round", x="gradients", at=MOST, title="Test accuracy over gradients of batches"),
        Curve("accuracy", over="round", x="seconds", at=MOST, title="Test accuracy over seconds"),
        Curve("drift", over="round", at=MOST, title="How far clients drift from the global model"),
    ],
    time_limit=24 * 3600,
)
study.option("data", "fashion-mnist", help=DATA_HELP)


SIZES = {
    Scale.QUICK: Size(2_000, 1_000, 2_000, clients=50, rounds=120, batch_size=20, side=14, fraction=0.2),
    Scale.FULL: Size(None, 5_000, 10_000, clients=100, rounds=1000, batch_size=50, side=32, fraction=0.1),
}


@study.task
def task(scale: Scale, data: str) -> ImageTask:
    size = SIZES[scale]
    return image_task(data, train=size.images, validation=size.validation, test=size.test, side=size.side, beside=["client"])


def make_model(task: ImageTask, scale: Scale, seed: int) -> nn.Module:
    """At quick scale a perceptron, whose rounds are quick enough for 120 of them; at full scale the paper's ResNet-18 with GroupNorm."""
    torch.manual_seed(seed)
    if scale is Scale.FULL:
        return resnet18(task.shape, task.classes, norm=partial(nn.GroupNorm, 2))
    return mlp(task.shape, task.classes, widths=(64,))


def follow(task: ImageTask, trial: Trial, make: Callable[[dict[str, Any]], Any], epochs: int) -> None:
    """Run one arm with so many local epochs and log its course."""
    size, at = SIZES[trial.scale], {"epochs": epochs}
    algorithm = make({"local_epochs": epochs, "batch_size": size.batch_size, "lr": trial.settings["lr"]})
    flat = FlatModel(make_model(task, trial.scale, trial.seed).to(trial.device))
    split = partial(dirichlet, alpha=UNLIKE, seed=trial.seed, min_size=FEWEST)
    shards, words = shards_of(task, split, size.clients, how=f"Dirichlet {UNLIKE}", fewest=FEWEST, device=trial.device)
    trial.note("clients", words)
    judged = tuple(part.to(trial.device) for part in (task.validation if trial.tuning else task.test))
    rounds = size.rounds // 2 if trial.tuning else size.rounds
    sampler = (FixedSize if trial.scale is Scale.QUICK else Independent)(size.fraction)
    server = algorithm.initial(flat.initial().cpu(), len(shards))
    sizes = sum(wire_bytes(names, server) for names in (algorithm.receives, algorithm.sends))
    so_far = dict.fromkeys(("bytes", "gradients", "seconds", "cpu_seconds"), 0.0)
    last: deque[float] = deque(maxlen=LAST)

    def judge(x: Tensor) -> float:
        return accuracy(lambda images: flat.predict(x, images), judged)  # pyright: ignore[reportArgumentType] - a pair

    def tell(line: Round) -> None:
        last.append(line.evaluation)
        added = (len(line.clients) * sizes, line.gradients, line.seconds, line.cpu_seconds)
        so_far.update({name: value + more for (name, value), more in zip(so_far.items(), added, strict=True)})
        for name, value in {"accuracy": float(np.mean(last)), "drift": line.drift, **so_far}.items():
            trial.log(name, value, round=line.round, **at)
        trial.progress(line.round, rounds, f"{epochs} local epochs: {100 * line.evaluation:.1f} %")

    history = simulate(algorithm, flat, shards, rounds, sampler=sampler, seed=trial.seed, evaluate=judge, tell=tell)
    if trial.tuning:
        trial.objective(float(np.mean(last)))
        return
    drift = float(np.mean([line.drift for line in history.rounds]))
    for name, value in {"accuracy": float(np.mean(last)), "drift": drift, **so_far}.items():
        trial.log(name, value, **at)


def run(task: ImageTask, trial: Trial, make: Callable[[dict[str, Any]], Any], further: tuple[dict[str, Any], ...] = ()) -> None:
    """An arm: where all meet, and with other local epochs."""
    if trial.scale is Scale.QUICK:
        torch.set_num_threads(1)  # the net is so small that a second thread only waits for the first
    for at in (MOST,) if trial.tuning else (MOST, *further):
        follow(task, trial, make, at["epochs"])


def fedspeed(**variant: Any) -> Callable[[dict[str, Any]], FedSpeedAlgorithm]:
    return lambda local: FedSpeedAlgorithm(FedSpeedConfig(**local, **variant))


def peer(algorithm: Callable[..., Any], **settings: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda local: algorithm(LocalConfig(**local), **settings)


study.arm_table(
    run,
    {
        "fedavg": {"label": "FedAvg", "make": peer(FedAvg), "further": (SHORT,)},
        "fedprox": {"label": "FedProx", "make": peer(FedProx, mu=0.1)},
        "scaffold": {"label": "SCAFFOLD", "make": peer(Scaffold)},
        "feddyn": {"label": "FedDyn", "make": peer(FedDyn, mu=0.1)},
        "fedsam": {"label": "FedSAM", "make": peer(FedSAM, rho=0.1)},
        "fedspeed": {"label": "FedSpeed", "make": fedspeed(), "further": (SHORT,)},
        "fedspeed-paper": {"label": "FedSpeed, the rule as the paper writes it", "make": fedspeed(server_rule="paper")},
        "fedspeed-no-ascent": {"label": "FedSpeed, no ascent step", "make": fedspeed(rho=0.0)},
        "fedspeed-no-correction": {"label": "FedSpeed, no correction", "make": fedspeed(correction=False)},
    },
    space={"lr": LogUniform(0.02, 0.4, start=0.1)},
)
BASELINES = ("fedavg", "fedprox", "scaffold", "feddyn", "fedsam")


# What the paper claims


def rounds_to_fedavg(results: Results, arm: str) -> Estimate:
    """Rounds until an arm reaches the accuracy at which FedAvg ends, of the same seed."""
    return results.threshold("accuracy", arm, over="round", reach="fedavg", **MOST)


@study.claim(
    "FedSpeed reaches FedAvg's final accuracy in fewer rounds than every baseline (5 local epochs)",
    paper="less communication rounds (title)",
    if_fails="SCAFFOLD and FedDyn correct the clients' drift as well and are as quick on the way; what FedSpeed has beside them, the ascent "
    "step, shows in where it ends",
)
def fewer_rounds(results: Results) -> Any:
    ours = rounds_to_fedavg(results, "fedspeed").per_seed
    return All(
        tuple(
            bootstrap(lambda a, b: a - b, ours, rounds_to_fedavg(results, arm).per_seed, what=f"rounds to it, FedSpeed - {arm}") < 0
            for arm in BASELINES
        )
    )


@study.claim(
    "FedSpeed ends more accurate than FedAvg where clients are unlike (Dirichlet 0.1)",
    paper="82.26 against 77.31 % (CIFAR-10, 10 % of 100 clients, 1000 rounds)",
    if_fails="with so few images a client, what a sample of clients disagrees on weighs more than the drift that FedSpeed removes",
)
def more_accurate(results: Results) -> Any:
    return results.difference("accuracy", "fedspeed", "fedavg", **MOST) > 0


@study.claim(
    "The gap to FedAvg grows with the local epochs (5 against 1), and is one in FedSpeed's favour",
    paper="larger local interval (title)",
    if_fails="with 1 local epoch FedAvg has not flattened by the last round, and FedSpeed, which is ahead on the way, gains by being quicker; "
    "with 5 the gap is one of where both end",
)
def longer_interval(results: Results) -> Any:
    curves = [results.values("accuracy", arm, **at) for at in (MOST, SHORT) for arm in ("fedspeed", "fedavg")]
    growth = bootstrap(lambda a, b, c, d: (a - b) - (c - d), *curves, what="gap to FedAvg, 5 local epochs minus 1")
    return (growth > 0) & (results.difference("accuracy", "fedspeed", "fedavg", **MOST) > 0)


@study.claim(
    "Both parts help: without the ascent step, or without the correction, FedSpeed ends less accurate",
    paper="both are needed (no figure here)",
    if_fails="the correction does most of it here; the ascent step is worth little to a net as small as this",
)
def both_parts_help(results: Results) -> Any:
    return (results.difference("accuracy", "fedspeed", "fedspeed-no-ascent", **MOST) > 0) & (
        results.difference("accuracy", "fedspeed", "fedspeed-no-correction", **MOST) > 0
    )


@study.summary
def summary(results: Results) -> str:
    def said(arm: str) -> str:
        return results.say("accuracy", arm, **MOST)

    needed = rounds_to_fedavg(results, "fedspeed").value
    reached = f"reached what FedAvg had at the end in {needed:.0f} rounds" if math.isfinite(needed) else "did not reach it in every seed"
    return (
        f"On this machine, with clients as unlike as Dirichlet {UNLIKE} makes them and 5 local epochs, FedSpeed ended at {said('fedspeed')} and "
        f"FedAvg at {said('fedavg')} (FedProx {said('fedprox')}, SCAFFOLD {said('scaffold')}, FedDyn {said('feddyn')}, FedSAM "
        f"{said('fedsam')}); FedSpeed {reached}. Without the ascent step it ended at {said('fedspeed-no-ascent')}, without the correction at "
        f"{said('fedspeed-no-correction')}. By the server rule as the paper writes it, which has no fixed point when only some clients take "
        f"part (the authors' own code has another, which is the one meant by FedSpeed here), it ended at {said('fedspeed-paper')}. It computes "
        f"{results.say('gradients', 'fedspeed', 'fedavg', **MOST)} the gradients of FedAvg."
    )
