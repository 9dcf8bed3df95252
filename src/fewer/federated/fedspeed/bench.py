"""Races: FedSpeed's local step against FedSAM's, the in-process engine against its own loop and against Flower on Ray, and the bytes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from torch import Tensor, nn

from fewer.devices import keep_ray_local
from fewer.federated._shared.baselines import FedAvg, FedSAM, Scaffold
from fewer.federated._shared.clients import Shards, client_rng
from fewer.federated._shared.flat_model import FlatModel
from fewer.federated._shared.flower_clients import flower_client_app
from fewer.federated._shared.flower_records import wire_bytes
from fewer.federated._shared.local_training import LocalConfig
from fewer.federated._shared.simulate import simulate
from fewer.federated.fedspeed.algorithm import FedSpeedAlgorithm, FedSpeedConfig
from fewer.study import Bench
from fewer.tasks import conv_net

bench = Bench("fedspeed")
CLIENTS, EACH = 50, 40  # small clients
LOCAL: dict[str, Any] = {"local_epochs": 1, "batch_size": 20}

Step = Callable[[], object]


def convnet() -> nn.Module:
    """Two convolutions with GroupNorm: 29,258 parameters."""
    return conv_net((1, 14, 14), norm=partial(nn.GroupNorm, 4))


@cache
def shards() -> Shards:
    """Images of the shape that matters; what they show does not change the time."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(CLIENTS * EACH, 1, 14, 14, generator=draw)
    return Shards(x, torch.randint(10, (len(x),), generator=draw), list(np.arange(len(x)).reshape(CLIENTS, EACH)))


def everybody(clients: Any, round: int, seed: int) -> list[int]:
    return list(clients)


@bench.race("local training of a client, 29,258 parameters, batch 50", peer="FedSAM in the same loop", reach=1.05)
def local_step() -> tuple[Step, Step]:
    flat = FlatModel(convnet())
    x, y = shards().x[:400], shards().y[:400]
    shard = Shards(x, y, [range(400)]).shard(0, flat)
    local: dict[str, Any] = {"local_epochs": 1, "batch_size": 50}

    def trained(algorithm: Any) -> Step:
        server = algorithm.initial(flat.initial(), 1)
        message = algorithm.configure(server, [0], 1)[0]
        state = {name: torch.zeros(flat.size) for name in algorithm.keeps}

        def train() -> object:
            with torch.no_grad():
                return algorithm.local(state, message, shard, client_rng(0, 1, 0))

        return train

    return trained(FedSpeedAlgorithm(FedSpeedConfig(**local))), trained(FedSAM(LocalConfig(**local)))


def engine(executor: Any, rounds: int = 1) -> Step:
    flat = FlatModel(convnet())
    algorithm = FedSpeedAlgorithm(FedSpeedConfig(**LOCAL))
    return lambda: simulate(algorithm, flat, shards(), rounds, sampler=everybody, executor=executor)


@bench.race("a round of 50 clients at once", peer="the same clients one after the other")
def at_once() -> tuple[Step, Step]:
    return engine("vmap"), engine(None)


def load_data(context: Context) -> tuple[Tensor, Tensor]:
    held = shards()
    rows = held.parts[int(context.node_config["partition-id"])]
    return held.x[rows], held.y[rows]


ROUNDS = 3


def seconds_by_ray() -> float:
    """Seconds of a round of FedSpeed in Flower's simulation; its start (Ray, the workers, who is there) is left out."""
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    from fewer.federated.fedspeed.strategy import FedSpeed

    keep_ray_local()
    config, server, marks = FedSpeedConfig(**LOCAL), ServerApp(), []

    @server.main()
    def main(grid: Any, context: Context) -> None:
        def mark(round: int, arrays: ArrayRecord) -> None:
            marks.append(time.perf_counter())

        strategy = FedSpeed(config, 1.0, CLIENTS, fraction_evaluate=0.0)
        strategy.start(grid, ArrayRecord(convnet().state_dict()), num_rounds=ROUNDS + 1, evaluate_fn=mark)

    app = flower_client_app(FedSpeedAlgorithm(config), convnet, load_data)
    run_simulation(server, app, CLIENTS, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    return (marks[-1] - marks[1]) / ROUNDS


def in_a_process_of_its_own(function: str) -> float:
    """What a function of this file returns, run where neither Flower nor Ray tells anybody of it, nor stays in this process."""
    quiet = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    code = f"from {__name__} import {function}; print('seconds', {function}())"
    done = subprocess.run([sys.executable, "-c", code], env=quiet, capture_output=True, text=True, check=False)
    found = re.search(r"^seconds (\S+)$", done.stdout, re.M)
    if found is None:
        raise RuntimeError(f"{function} did not end well:\n{done.stderr[-2000:]}")
    return float(found[1])


def seconds_here() -> float:
    """Seconds of a round in this engine, the best of three runs."""
    run = engine("vmap", ROUNDS)
    run()
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) / ROUNDS)
    return min(times)


@bench.quantity(
    "a round of 50 small clients, engine against FedSpeed's own Flower app", peer="Flower's simulation by Ray", unit="s", reach=1 / 3
)
def against_ray() -> tuple[float, float]:
    return seconds_here(), in_a_process_of_its_own("seconds_by_ray")


@bench.quantity("bytes up a client and round", peer="FedAvg's message (one model)", unit="bytes", reach=1.0)
def bytes_up() -> tuple[float, float]:
    server = FedAvg().initial(FlatModel(convnet()).initial(), CLIENTS)
    return wire_bytes(FedSpeedAlgorithm().sends, server), wire_bytes(FedAvg().sends, server)


@bench.quantity("bytes up a client and round, beside SCAFFOLD", peer="SCAFFOLD's message (two models)", unit="bytes", reach=0.51)
def bytes_beside_scaffold() -> tuple[float, float]:
    server = FedAvg().initial(FlatModel(convnet()).initial(), CLIENTS)
    return wire_bytes(FedSpeedAlgorithm().sends, server), wire_bytes(Scaffold().sends, server)
