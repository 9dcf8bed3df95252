"""The server: it sends the trained factors to the clients and averages what comes back."""

from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fewer.federated import FFALoRA, trained_arrays
from fewer.files import check_new_file

from .task import config_of, model_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings: Any = context.run_config
    if settings["final-model"]:
        check_new_file(settings["final-model"], option="final-model")
    strategy = FFALoRA(
        config_of(context),
        fraction_train=settings["fraction-train"],
        fraction_evaluate=settings["fraction-evaluate"],
        min_available_nodes=settings["min-available-nodes"],
        seed=settings["seed"],
        checkpoint=settings["checkpoint"] or None,
    )
    result = strategy.start(grid, trained_arrays(model_of(context)), num_rounds=settings["rounds"], timeout=float(settings["timeout"]))
    if settings["final-model"]:
        torch.save(result.arrays.to_torch_state_dict(), settings["final-model"])
