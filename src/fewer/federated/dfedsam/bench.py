"""Races: a round without a server beside one with, four gossip steps beside one, and the bytes through the busiest place."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from fewer.federated._shared.baselines import FedAvg, FedSAM
from fewer.federated._shared.clients import Shards
from fewer.federated._shared.flat_model import FlatModel
from fewer.federated._shared.gossip import Averaging, models_from, simulate_decentralized
from fewer.federated._shared.local_training import LocalConfig
from fewer.federated._shared.simulate import simulate
from fewer.federated._shared.topology import ring
from fewer.federated._shared.traffic import ideal_bytes
from fewer.federated.dfedsam.algorithm import DFedSAMAlgorithm, DFedSAMConfig
from fewer.study import Bench
from fewer.tasks import mlp

bench = Bench("dfedsam")
CLIENTS, EACH, SHAPE = 16, 125, (1, 14, 14)
RHO, STEPS = 0.05, 4
LOCAL: dict[str, Any] = {"local_steps": 20, "batch_size": 25}

Step = Callable[[], object]


@cache
def shards() -> Shards:
    """Images of the shape that matters; what they show does not change the time."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(CLIENTS * EACH, *SHAPE, generator=draw)
    return Shards(x, torch.randint(10, (len(x),), generator=draw), list(np.arange(len(x)).reshape(CLIENTS, EACH)))


def net() -> nn.Module:
    """13,258 parameters."""
    return mlp(SHAPE, widths=(64,))


def everybody(clients: Any, round: int, seed: int) -> list[int]:
    return list(clients)


def without_server(steps: int) -> Step:
    flat = FlatModel(net())
    algorithm = DFedSAMAlgorithm(DFedSAMConfig(rho=RHO, gossip_steps=steps, **LOCAL))
    return lambda: simulate_decentralized(algorithm, flat, shards(), 1, topology=ring(CLIENTS), executor="vmap")


def with_server() -> Step:
    flat, algorithm = FlatModel(net()), FedSAM(LocalConfig(**LOCAL), rho=RHO)
    return lambda: simulate(algorithm, flat, shards(), 1, sampler=everybody, executor="vmap")


@bench.race("a round of 16 clients on a ring, 4 gossip steps", peer="FedSAM with a server, the same clients", reach=1.1)
def a_round() -> tuple[Step, Step]:
    return without_server(STEPS), with_server()


@bench.race("4 gossip steps of 16 models of 13,258 parameters", peer="the round they are of", reach=0.05)
def gossip_alone() -> tuple[Step, Step]:
    models = models_from(torch.randn(FlatModel(net()).size), CLIENTS)
    averaging = Averaging.of(ring(CLIENTS), 1, (), STEPS, models)
    return lambda: averaging.apply(models), without_server(STEPS)


@bench.race("4 gossip steps of 16 models by W^4", peer="each client's average by itself, four times")
def one_product() -> tuple[Step, Step]:
    start = torch.randn(CLIENTS, FlatModel(net()).size)
    models, graph = start.clone(), ring(CLIENTS)
    averaging, neighbors = Averaging.of(graph, 1, (), STEPS, models), graph.neighbors(1)
    shares = torch.from_numpy(graph.weights(1)).float()

    def by_clients() -> None:
        x = start
        for _ in range(STEPS):
            x = torch.stack([sum((shares[i, j] * x[j] for j in beside), shares[i, i] * x[i]) for i, beside in enumerate(neighbors)])

    return lambda: averaging.apply(models), by_clients


MANY = 100


def busiest_client(steps: int) -> float:
    """Bytes that a client on a ring sends to its neighbours and hears from them, in a round that is run."""
    algorithm = DFedSAMAlgorithm(DFedSAMConfig(rho=RHO, gossip_steps=steps, local_steps=1))
    (line,) = simulate_decentralized(algorithm, net, many_shards(), 1, topology=ring(MANY), executor="vmap").rounds
    return 2.0 * ideal_bytes(max(line.numbers_sent))


def server() -> float:
    """Bytes that a server sends to all clients and hears from them."""
    (line,) = simulate(FedAvg(LocalConfig(local_steps=1)), net, many_shards(), 1, sampler=everybody, executor="vmap").rounds
    return float(ideal_bytes(line.numbers_down + line.numbers_up))


def many_shards() -> Shards:
    return Shards(shards().x, shards().y, list(np.arange(CLIENTS * EACH).reshape(MANY, -1)))


@bench.quantity("bytes through the busiest place, 100 clients on a ring", peer="FedAvg's server", unit="bytes", reach=0.05)
def busiest_place() -> tuple[float, float]:
    return busiest_client(1), server()


@bench.quantity("the same with 4 gossip steps", peer="FedAvg's server", unit="bytes", reach=0.1)
def busiest_place_of_many_steps() -> tuple[float, float]:
    return busiest_client(STEPS), server()
