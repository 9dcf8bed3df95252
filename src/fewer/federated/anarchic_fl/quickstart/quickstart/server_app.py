"""The server: it sends the model to whoever owes nothing and steps as soon as a few replies are in."""

from typing import Any

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fewer.federated import Anarchic
from fewer.files import check_new_file

from .task import config_of, model_fn

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings: Any = context.run_config
    if settings["final-model"]:
        check_new_file(settings["final-model"], option="final-model")
    strategy = Anarchic(
        config_of(context),
        min_available_nodes=settings["min-available-nodes"],
        fraction_evaluate=settings["fraction-evaluate"],
        seed=settings["seed"],
        clients=settings["clients"],
        checkpoint=settings["checkpoint"] or None,
        retry=float(settings["retry"]),
    )
    result = strategy.start(grid, ArrayRecord(model_fn().state_dict()), num_rounds=settings["updates"], timeout=float(settings["timeout"]))
    if settings["final-model"]:
        torch.save(result.arrays.to_torch_state_dict(), settings["final-model"])
