"""DFedSAM beside DFedAvg on a ring of unlike clients, with one and with four gossip steps, on a denser graph, and beside a server.

All arms share the local optimiser, the batches and the start. At quick scale 2,000 images lie with 16 clients, all of which take part in
each of 70 rounds of 20 local steps. Two models are judged: the mean of all clients', which nobody holds, and each client's own.

At full scale (`--full --set data=cifar-10 --device cuda`) it is ResNet-18 with GroupNorm, 100 clients, three splits, five graphs and 1 to 8
gossip steps, 500 rounds; `fewer tune` gives every arm the same budget for its rates first.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewer.federated._shared.baselines import FedSAM
from fewer.federated._shared.flat_model import FlatModel
from fewer.federated._shared.gossip import GossipRound, simulate_decentralized
from fewer.federated._shared.local_training import LocalConfig
from fewer.federated._shared.partition import dirichlet
from fewer.federated._shared.problems import DATA_HELP, Size, shards_of
from fewer.federated._shared.simulate import Round, simulate
from fewer.federated._shared.topology import Topology, complete, exponential, random_graph, ring, square_torus
from fewer.federated._shared.traffic import ideal_bytes
from fewer.federated.dfedsam.algorithm import DFedSAMAlgorithm, DFedSAMConfig
from fewer.study import Curve, Figure, LogUniform, NotTestable, Results, Scale, Study, Trial
from fewer.tasks import ImageTask, accuracy, image_task, mlp, resnet18

RHO, STEPS = 0.05, 4  # the ascent step's length, and Q of DFedSAM-MGS
UNLIKE = {Scale.QUICK: (0.1,), Scale.FULL: (0.1, 0.3, 0.6)}  # concentrations of the Dirichlet split
LAST = 5  # rounds whose mean is told at the end: that of a single round jumps
EVERY = 10  # rounds between two evaluations before that
MOST: dict[str, Any] = {"unlike": 0.1}

study = Study(
    "dfedsam",
    question="How good do models become without a server, where each client averages with its neighbours alone, and at what traffic?",
    baseline="dfedavg",
    figures=[
        Figure("accuracy", f"test accuracy of the mean model, mean of the last {LAST} rounds", "%", "higher", at=MOST),
        Figure("local_accuracy", "of the clients' own models, their mean", "%", "higher", at=MOST),
        Figure("consensus", "consensus distance", "", at=MOST),
        Figure("gap", "training minus test accuracy of the mean model", "%", "lower", at=MOST),
        Figure("bytes", "bytes sent, all clients (and server)", "bytes", at=MOST),
        Figure("busiest_bytes", "bytes through the busiest place", "bytes", at=MOST),
        Figure("gradients", "gradients of batches", at=MOST),
        Figure("drift", "client drift |z - x|", "", "", at=MOST, detail=True),
        Figure("seconds", "time of the rounds", "s", at=MOST),
        Figure("cpu_seconds", "their processor time", "s", at=MOST),
    ],
    charts=[
        Curve("accuracy", over="round", at=MOST, title="Test accuracy of the mean model over rounds"),
        Curve("local_accuracy", over="round", at=MOST, title="Mean test accuracy of the clients' own models over rounds"),
        Curve("local_accuracy", over="round", x="bytes", at=MOST, title="The same over bytes sent"),
        Curve("local_accuracy", over="round", x="gradients", at=MOST, title="The same over gradients of batches"),
        Curve("consensus", over="round", log=True, at=MOST, title="Consensus distance"),
    ],
    time_limit=48 * 3600,
)
study.option("data", "fashion-mnist", help=DATA_HELP)

SIZES = {
    Scale.QUICK: Size(images=2_000, validation=1_000, test=2_000, clients=16, rounds=70, batch_size=25, side=14),
    Scale.FULL: Size(images=None, validation=5_000, test=10_000, clients=100, rounds=500, batch_size=50, side=32),
}
LOCAL_STEPS = 20  # at quick scale, alike for all clients
FEWEST = 10  # images a client


@study.task
def task(scale: Scale, data: str) -> ImageTask:
    size = SIZES[scale]
    pixels = (0.3, 0.35) if data == "fashion-mnist" else None
    return image_task(
        data, train=size.images, validation=size.validation, test=size.test, side=size.side, normalise=pixels, beside=["client"]
    )


def make_model(task: ImageTask, scale: Scale, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if scale is Scale.FULL:
        return resnet18(task.shape, task.classes, norm=partial(nn.GroupNorm, 2))
    return mlp(task.shape, task.classes, widths=(64,))


Graph = Callable[[int], Topology]


@dataclass(frozen=True)
class Way:
    """What an arm varies: the graph of m clients (None: a server), the ascent step's length, and the gossip steps."""

    graph: Graph | None
    rho: float = 0.0
    steps: int = 1


class Course:
    """What an arm logs as it goes: quality of the mean model and of the clients' own, and what was spent on it."""

    def __init__(self, task: ImageTask, trial: Trial, flat: FlatModel, at: dict[str, Any]) -> None:
        size = SIZES[trial.scale]
        self.trial, self.flat, self.at = trial, flat, at
        self.rounds = size.rounds // 2 if trial.tuning else size.rounds
        judged = task.validation if trial.tuning else task.test
        self.judged, self.train = (tuple(part.to(trial.device) for part in pair) for pair in (judged, task.train))
        self.so_far = dict.fromkeys(("bytes", "busiest_bytes", "gradients", "seconds", "cpu_seconds"), 0.0)
        self.last: dict[str, deque[float]] = {}

    def due(self, round: int) -> bool:
        return round % EVERY == 0 or round > self.rounds - LAST

    def judge(self, models: Tensor, round: int) -> None:
        """Evaluate the mean of models [m, d] and each of them."""
        if not self.due(round):
            return

        def right(model: Tensor, pair: Any) -> float:
            return accuracy(lambda images: self.flat.predict(model, images), pair)

        mean = models.mean(dim=0)
        found = {"accuracy": right(mean, self.judged), "local_accuracy": float(np.mean([right(each, self.judged) for each in models]))}
        self.keep(found | {"gap": right(mean, self.train) - found["accuracy"]})

    def spend(self, **added: float) -> None:
        self.so_far = {name: value + added[name] for name, value in self.so_far.items()}

    def tell(self, line: Round | GossipRound) -> None:
        if not self.due(line.round):
            return
        seen = {"drift": line.drift} | ({"consensus": line.consensus} if isinstance(line, GossipRound) else {})
        self.keep(seen)
        latest = {name: values[-1] for name, values in self.last.items()}
        for name, value in (latest | self.so_far).items() if self.at.keys() == MOST.keys() else ():  # of a further graph the end alone
            self.trial.log(name, value, round=line.round, **self.at)
        said = f"mean model {100 * latest['accuracy']:.1f} %, own {100 * latest['local_accuracy']:.1f} %"
        self.trial.progress(line.round, self.rounds, said)

    def keep(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.last.setdefault(name, deque(maxlen=LAST)).append(value)

    def finish(self) -> None:
        ends = {name: float(np.mean(values)) for name, values in self.last.items()}
        if self.trial.tuning:
            self.trial.objective(ends["local_accuracy"])
            return
        for name, value in (ends | self.so_far).items():
            self.trial.log(name, value, **self.at)


def follow(task: ImageTask, trial: Trial, way: Way, at: dict[str, Any]) -> None:
    """Run one arm and log its course at these coordinates."""
    size, unlike = SIZES[trial.scale], at["unlike"]
    split = partial(_split, unlike, trial.seed)
    shards, who = shards_of(task, split, size.clients, how=f"Dirichlet {unlike}", fewest=FEWEST, device=trial.device)
    trial.note("clients", who)
    flat = FlatModel(make_model(task, trial.scale, trial.seed).to(trial.device))
    course = Course(task, trial, flat, at)
    model_bytes, m = ideal_bytes(flat.size), len(shards)
    rho = trial.settings.get("rho", way.rho)
    local: dict[str, Any] = {"batch_size": size.batch_size, "lr": trial.settings["lr"]}
    local |= {"local_steps": LOCAL_STEPS} if trial.scale is Scale.QUICK else {}

    def tell(line: Round | GossipRound) -> None:
        if isinstance(line, Round):  # all clients get the model and send theirs, all of it through the server
            sent = busiest = 2 * m * model_bytes
        else:  # what a client sends to its neighbours it also gets
            sent, busiest = ideal_bytes(sum(line.numbers_sent)), 2 * ideal_bytes(max(line.numbers_sent))
        course.spend(bytes=sent, busiest_bytes=busiest, gradients=line.gradients, seconds=line.seconds, cpu_seconds=line.cpu_seconds)
        course.tell(line)

    common: dict[str, Any] = {"seed": trial.seed, "executor": "vmap" if trial.scale is Scale.QUICK else None, "tell": tell}
    if way.graph is None:
        rounds = itertools.count(1)
        server = FedSAM(LocalConfig(**local), rho=rho)
        simulate(server, flat, shards, course.rounds, sampler=_everybody, evaluate=lambda x: course.judge(x[None], next(rounds)), **common)
    else:
        algorithm = DFedSAMAlgorithm(DFedSAMConfig(rho=rho, gossip_steps=way.steps, **local))
        simulate_decentralized(algorithm, flat, shards, course.rounds, topology=way.graph(m), evaluate=course.judge, **common)
    course.finish()


def _split(unlike: float, seed: int, labels: Tensor, clients: int) -> Any:
    return dirichlet(labels, clients, unlike, seed=seed, min_size=FEWEST)


def _everybody(clients: Any, round: int, seed: int) -> list[int]:
    return list(clients)


def run(task: ImageTask, trial: Trial, way: Way, further: tuple[Way, ...] = ()) -> None:
    """An arm, at each concentration of its scale; at full scale on further graphs and with other gossip steps."""
    if trial.scale is Scale.QUICK:
        torch.set_num_threads(1)  # the net is so small that a second thread only waits for the first
    for unlike in UNLIKE[trial.scale][:1] if trial.tuning else UNLIKE[trial.scale]:
        follow(task, trial, way, {"unlike": unlike})
    for other in further if trial.scale is Scale.FULL and not trial.tuning else ():
        assert other.graph is not None
        follow(task, trial, other, {**MOST, "graph": repr(other.graph(SIZES[trial.scale].clients)), "steps": other.steps})


def random_of(m: int) -> Topology:
    return random_graph(m, min(10, m - 1))


GRAPHS: tuple[Graph, ...] = (square_torus, exponential, random_of, complete)
RATE = LogUniform(0.02, 0.4, start=0.1)
WITH_SAM = {"lr": RATE, "rho": LogUniform(0.01, 0.2, start=RHO)}

study.arm_table(
    run,
    {
        "dfedavg": {"label": "DFedAvg", "way": Way(ring), "further": tuple(Way(graph) for graph in GRAPHS), "space": {"lr": RATE}},
        "dfedavg-4-steps": {"label": "DFedAvg, 4 gossip steps", "way": Way(ring, steps=STEPS), "space": {"lr": RATE}},
        "dfedsam": {"label": "DFedSAM", "way": Way(ring, RHO), "further": tuple(Way(graph, RHO) for graph in GRAPHS)},
        "dfedsam-mgs": {"label": "DFedSAM-MGS, 4 steps", "way": Way(ring, RHO, STEPS), "further": (Way(ring, RHO, 2), Way(ring, RHO, 8))},
        "dfedsam-exponential": {"label": "DFedSAM, exponential graph", "way": Way(exponential, RHO)},
        "fedsam-server": {"label": "FedSAM with a server, everybody", "way": Way(None, RHO)},
    },
    space=WITH_SAM,
)


# What the paper claims


@study.claim(
    "On a ring DFedSAM's mean model ends more accurate than DFedAvg's",
    paper="outperforms the decentralised baselines (abstract; its tables were not read)",
    if_fails="on a net as small as this the flatter minima are worth little, less than seeds differ by",
)
def above_averaging(results: Results) -> Any:
    return results.difference("accuracy", "dfedsam", "dfedavg", **MOST) > 0


@study.claim(
    "Four gossip steps a round: the clients' own models are at least 5 points, the mean model at least 1 point above DFedSAM's",
    paper="DFedSAM-MGS improves on DFedSAM (abstract)",
    if_fails="the mean model gains only as far as training from closer models is better training",
)
def more_gossip_is_better(results: Results) -> Any:
    own = results.difference("local_accuracy", "dfedsam-mgs", "dfedsam", **MOST) >= 0.05
    return own & (results.difference("accuracy", "dfedsam-mgs", "dfedsam", **MOST) >= 0.01)


@study.claim("Four gossip steps leave at most 0.3 of DFedSAM's consensus distance", paper="better model consistency (abstract)")
def more_gossip_is_closer(results: Results) -> Any:
    return results.ratio("consensus", "dfedsam-mgs", "dfedsam", **MOST) <= 0.3


@study.claim(
    "DFedSAM-MGS's mean model ends within 3 points of FedSAM's with a server",
    paper="competitive with centralised federated learning (abstract)",
    if_fails="four steps on a ring of 16 do not bring all clients together, as a server does each round",
)
def near_a_server(results: Results) -> Any:
    return results.difference("accuracy", "dfedsam-mgs", "fedsam-server", **MOST) >= -0.03


@study.claim(
    "On a better connected graph the clients' own models are better: exponential at least 5 points above ring",
    paper="a sparse graph is the weak point (abstract; the rates have 1 - lambda below the line)",
)
def better_connected(results: Results) -> Any:
    return results.difference("local_accuracy", "dfedsam-exponential", "dfedsam", **MOST) >= 0.05


@study.claim("DFedSAM reaches the paper's accuracies", paper="tables that could not be opened")
def the_papers_tables(results: Results) -> Any:
    raise NotTestable("neither the paper's tables nor which data sets they are on could be read")


@study.summary
def summary(results: Results) -> str:
    def mean(arm: str) -> str:
        return results.say("accuracy", arm, **MOST)

    def own(arm: str) -> str:
        return results.say("local_accuracy", arm, **MOST)

    def apart(arm: str) -> str:
        return f"{results.mean('consensus', arm, **MOST).value:.2f}"

    return (
        f"On a ring of unlike clients DFedAvg's mean model ended at {mean('dfedavg')} and the clients' own at {own('dfedavg')}; DFedSAM's at "
        f"{mean('dfedsam')} and {own('dfedsam')}, with four gossip steps at {mean('dfedsam-mgs')} and {own('dfedsam-mgs')}. Four steps without "
        f"the ascent gave {mean('dfedavg-4-steps')} and {own('dfedavg-4-steps')}: what they gain is the gossip's more than the ascent's. On the "
        f"exponential graph DFedSAM ended at {mean('dfedsam-exponential')} and {own('dfedsam-exponential')} for "
        f"{results.say('bytes', 'dfedsam-exponential', beside='dfedsam-mgs', **MOST)} the bytes of four steps on the ring; with a server that hears "
        f"everybody FedSAM had {mean('fedsam-server')}. The ascent does not bring the models together: their consensus distance is "
        f"{apart('dfedsam')} with it and {apart('dfedavg')} without. The curves are nearly flat at the end, not wholly: more rounds do not fit "
        "into this study's minutes."
    )
