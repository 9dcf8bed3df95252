"""The server: it samples clients, sends them the model and averages what comes back."""

from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fewer.federated import FedSpeed
from fewer.files import check_new_file

from .task import config_of, model_fn

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings: Any = context.run_config
    if settings["final-model"]:
        check_new_file(settings["final-model"], option="final-model")
    strategy = FedSpeed(
        config_of(context),
        fraction_train=settings["fraction-train"],
        fraction_evaluate=settings["fraction-evaluate"],
        min_available_nodes=settings["min-available-nodes"],
        seed=settings["seed"],
        checkpoint=settings["checkpoint"] or None,
    )
    result = strategy.start(grid, ArrayRecord(model_fn().state_dict()), num_rounds=settings["rounds"], timeout=float(settings["timeout"]))
    if settings["final-model"]:
        torch.save(result.arrays.to_torch_state_dict(), settings["final-model"])
