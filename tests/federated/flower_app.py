"""A Flower app that Ray's workers can import: the algorithms of the tests, and one client app for all of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from federations import examples, loss, net
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fewer.devices import keep_ray_local
from fewer.federated import (
    FedDyn,
    FedSpeedAlgorithm,
    FedSpeedConfig,
    FlowerStrategy,
    Independent,
    LocalConfig,
    Scaffold,
    Shards,
    dirichlet,
    flower_client_app,
    simulate,
)

CLIENTS, SEED, FRACTION = 4, 3, 0.6
LOCAL = {"local_epochs": 2, "lr": 0.1, "batch_size": 8}


def shards():
    x, y = examples()
    return Shards(x, y, dirichlet(y, CLIENTS, alpha=0.3, seed=3, min_size=7))


def load_data(context):
    held = shards()
    rows = held.parts[context.node_config["partition-id"]]
    return held.x[rows], held.y[rows]


def initial(model_fn=net):
    return ArrayRecord(model_fn().state_dict())


def in_process(algorithm, rounds=3, model_fn=net, **keywords):
    return simulate(algorithm, model_fn, shards(), rounds, sampler=Independent(FRACTION), seed=SEED, **keywords)


def strategy_of(algorithm, **keywords):
    return FlowerStrategy(algorithm, FRACTION, 0.0, CLIENTS, seed=SEED, **keywords)


def largest_difference(arrays, history):
    mine, theirs = arrays if isinstance(arrays, dict) else arrays.to_torch_state_dict(), history.state_dict()
    assert list(mine) == list(theirs)
    return max(float((mine[name] - theirs[name]).abs().max()) for name in theirs)


ALGORITHMS = {
    "fedspeed": FedSpeedAlgorithm(FedSpeedConfig(**LOCAL)),
    "fedspeed, relaxed": FedSpeedAlgorithm(FedSpeedConfig(relaxed_beta=0.2, **LOCAL)),
    "fedspeed, paper's rule": FedSpeedAlgorithm(FedSpeedConfig(server_rule="paper", **LOCAL)),
    "scaffold": Scaffold(LocalConfig(**LOCAL)),
    "feddyn": FedDyn(LocalConfig(weighted=True, **LOCAL)),
}


def client_app() -> ClientApp:
    """One app for all algorithms: each message says which one it is of."""
    apps = {repr(algorithm): flower_client_app(algorithm, net, load_data, loss) for algorithm in ALGORITHMS.values()}
    app = ClientApp()

    def answer(message, context):
        return apps[message.content.config_records["config"].get("algorithm", next(iter(apps)))](message, context)

    app.train()(answer)
    app.query("who")(answer)
    return app


def by_ray(file: str) -> None:
    """Run all algorithms in Flower's simulation and write what comes out into a file."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    keep_ray_local()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    from flwr.simulation import run_simulation

    app, done = ServerApp(), {}

    @app.main()
    def main(grid, context):
        for name, algorithm in ALGORITHMS.items():
            done[name] = strategy_of(algorithm).start(grid, initial(), num_rounds=3, timeout=120).arrays.to_torch_state_dict()

    run_simulation(app, client_app(), CLIENTS, backend_config={"client_resources": {"num_cpus": 2, "num_gpus": 0.0}})
    torch.save(done, file)


if __name__ == "__main__":
    import flower_app  # by its name, so that Ray's workers find what the app is made of

    flower_app.by_ray(sys.argv[1])
