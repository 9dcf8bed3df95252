"""A Flower app of federated LoRA with noise that Ray's workers can import."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from adapted import federation, lora
from flwr.serverapp import ServerApp

from fewer.devices import keep_ray_local
from fewer.federated import FedLoRA, FFALoRA, Independent, LoRARoundsConfig, PrivacyConfig, ffa_lora_client_app, simulate, trained_arrays

CLIENTS, SEED = 3, 5
PRIVACY = PrivacyConfig(noise_multiplier=0.8, delta=1e-3, clip=0.5)
SETTINGS = LoRARoundsConfig(local_steps=4, batch_size=10, privacy=PRIVACY, rounds=10)


def load_data(context):
    held = federation(CLIENTS)
    rows = held.parts[context.node_config["partition-id"]]
    return held.x[rows], held.y[rows]


def app_of(settings=SETTINGS, model_fn=lora, **words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noise by the seed, which the tests are about
        return ffa_lora_client_app(model_fn, load_data, config=settings, **words)


def strategy_of(settings=SETTINGS, **words):
    return FFALoRA(settings, **({"min_available_nodes": CLIENTS, "fraction_evaluate": 0.0, "seed": SEED} | words))


def in_process(rounds, settings=SETTINGS, model_fn=lora):
    return simulate(FedLoRA(settings), model_fn, federation(CLIENTS), rounds, sampler=Independent(1.0), seed=SEED)


def by_ray(file: str) -> None:
    """Two rounds in Flower's simulation; what comes out goes into a file."""
    keep_ray_local()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid, context):
        torch.save(strategy_of().start(grid, trained_arrays(lora()), num_rounds=2, timeout=120).arrays.to_torch_state_dict(), file)

    run_simulation(server, app_of(), CLIENTS, backend_config={"client_resources": {"num_cpus": 2, "num_gpus": 0.0}})


if __name__ == "__main__":
    import lora_app  # by its name, so that Ray's workers find what the app is made of

    lora_app.by_ray(sys.argv[1])
