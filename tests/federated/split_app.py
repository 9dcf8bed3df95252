"""A Flower app of SFPrompt that Ray's workers can import."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from flwr.serverapp import ServerApp
from split_vits import cut, federation

from fewer.devices import keep_ray_local
from fewer.federated import (
    Independent,
    SFPrompt,
    SFPromptConfig,
    SFPromptStrategy,
    Wire,
    sfprompt_client_app,
    simulate,
    trained_arrays,
)

CLIENTS, SEED = 3, 5
SETTINGS = SFPromptConfig(batch_size=8, keep=0.5, shortcut_epochs=1, lr=0.2)


def load_data(context):
    held = federation(CLIENTS)
    rows = held.parts[context.node_config["partition-id"]]
    return held.x[rows], held.y[rows]


def app_of(settings=SETTINGS, model_fn=cut, load=load_data):
    return sfprompt_client_app(model_fn, load, settings)


def strategy_of(settings=SETTINGS, model_fn=cut, **words):
    return SFPromptStrategy(
        model_fn().server(), settings, **({"fraction_train": 1.0, "min_available_nodes": CLIENTS, "seed": SEED} | words)
    )


def in_process(rounds, settings=SETTINGS, model_fn=cut, sampler=None):
    split = model_fn()
    wire = Wire(split.server())
    return simulate(SFPrompt(settings, wire), split.client, federation(CLIENTS), rounds, sampler=sampler or Independent(1.0), seed=SEED)


def by_ray(file: str) -> None:
    """Two rounds in Flower's simulation; what comes out goes into a file."""
    keep_ray_local()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid, context):
        torch.save(strategy_of().start(grid, trained_arrays(cut()), num_rounds=2, timeout=120).arrays.to_torch_state_dict(), file)

    run_simulation(server, app_of(), CLIENTS, backend_config={"client_resources": {"num_cpus": 2, "num_gpus": 0.0}})


if __name__ == "__main__":
    import split_app  # by its name, so that Ray's workers find what the app is made of

    split_app.by_ray(sys.argv[1])
