"""Races: the engine that runs schedules against FedAvg's rounds in this process, the server's step of AFA-CS against summing its memory, and
simulated time and bytes beside FedAvg's."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fewer.federated._shared.algorithm import Reply
from fewer.federated._shared.asynchrony import Clock, Return, Update, schedule, simulate_anarchic, synchronous_rounds
from fewer.federated._shared.baselines import FedAvg
from fewer.federated._shared.clients import Shards
from fewer.federated._shared.flat_model import FlatModel
from fewer.federated._shared.flower_records import wire_bytes
from fewer.federated._shared.local_training import LocalConfig
from fewer.federated._shared.simulate import simulate
from fewer.federated.anarchic_fl.algorithm import MEMORY, AnarchicAlgorithm, AnarchicConfig, FedBuff
from fewer.study import Bench
from fewer.tasks import conv_net

bench = Bench("anarchic-fl")
WORKERS, EACH, STEPS, UPDATES = 10, 100, 5, 4
LOCAL: dict[str, Any] = {"batch_size": 20, "weight_decay": 0.0, "max_grad_norm": math.inf}

Call = Callable[[], object]


def convnet() -> nn.Module:
    """Two convolutions with GroupNorm: 29,258 parameters."""
    return conv_net((1, 14, 14), norm=partial(nn.GroupNorm, 4))


@cache
def shards() -> Shards:
    """Images of the shape that matters; what they show does not change the time."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(WORKERS * EACH, 1, 14, 14, generator=draw)
    return Shards(x, torch.randint(10, (len(x),), generator=draw), list(np.arange(len(x)).reshape(WORKERS, EACH)))


def everybody(clients: Any, round: int, seed: int) -> list[int]:
    return list(clients)


def afa(variant: Any) -> AnarchicAlgorithm:
    return AnarchicAlgorithm(AnarchicConfig(variant=variant, **LOCAL))


def with_delays(steps: Callable[[int, int], int]) -> list[Update]:
    """All workers in each update, each with a version of 0 to 3 updates before."""
    return [
        Update(float(t), [Return(worker, max(0, t - worker % 4), steps(t, worker)) for worker in range(WORKERS)]) for t in range(UPDATES)
    ]


def rounds_of_fedavg() -> Call:
    flat, algorithm = FlatModel(convnet()), FedAvg(LocalConfig(local_steps=STEPS, **LOCAL))
    return lambda: simulate(algorithm, flat, shards(), UPDATES, sampler=everybody, executor="vmap")


def updates_of(variant: Any, steps: Callable[[int, int], int]) -> Call:
    flat, updates = FlatModel(convnet()), with_delays(steps)
    return lambda: simulate_anarchic(afa(variant), flat, shards(), updates, executor="vmap")


@bench.race("an update of 10 workers, 5 steps each, from unlike versions (AFA-CS)", peer="a round of FedAvg, as many gradients", reach=1.1)
def equal_steps() -> tuple[Call, Call]:
    return updates_of("cs", lambda t, worker: STEPS), rounds_of_fedavg()


@bench.race("an update of 10 workers, 1 to 9 steps, as many gradients in all (AFA-CS)", peer="a round of FedAvg, 5 steps each")
def unequal_steps() -> tuple[Call, Call]:
    return updates_of("cs", lambda t, worker: 1 + (worker + t) % 5 * 2), rounds_of_fedavg()


@bench.race("the server's step of AFA-CS, 5 of 100 workers, 29,258 parameters", peer="the mean over the whole memory", reach=0.5)
def server_step() -> tuple[Call, Call]:
    algorithm, draw = afa("cs"), torch.Generator().manual_seed(0)
    x = FlatModel(convnet()).initial()
    server = algorithm.initial(x, 100)
    replies = [Reply(client, {"update": torch.randn(x.shape, generator=draw)}, {"examples": 1}) for client in range(5)]

    def whole() -> None:
        table = server.vectors[MEMORY]
        for reply in replies:
            table[reply.client] = reply.vectors["update"]
        torch.sub(server.x, table.mean(dim=0), alpha=0.1)

    return lambda: algorithm.aggregate(server, replies), whole


@bench.quantity(
    "simulated time of 400 updates, workers of unlike speed (log-normal, sigma 0.7)", peer="FedAvg's rounds", unit="s", reach=0.5
)
def simulated_time() -> tuple[float, float]:
    clock = Clock(np.exp(0.7 * np.random.default_rng(0).normal(size=WORKERS)).tolist())
    return schedule(clock, WORKERS, 5, 400)[-1].time, synchronous_rounds(clock, WORKERS, 5, 400, STEPS)[-1].time


@bench.quantity("bytes up a return", peer="FedBuff's (one model)", unit="bytes", reach=1.0)
def bytes_up() -> tuple[float, float]:
    server = FedBuff().initial(FlatModel(convnet()).initial(), WORKERS)
    return wire_bytes(afa("cs").sends, server), wire_bytes(FedBuff().sends, server)
