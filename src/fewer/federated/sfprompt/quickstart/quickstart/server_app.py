"""The server: it holds the body, lends it to the clients, and averages prompt and tail."""

from typing import Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fewer.federated import SFPromptStrategy, trained_arrays
from fewer.files import check_new_file

from .task import config_of, load_test, split_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings: Any = context.run_config
    if settings["final-model"]:
        check_new_file(settings["final-model"], option="final-model")
    split = split_of(context)
    strategy = SFPromptStrategy(
        split.server(),
        config_of(context),
        fraction_train=settings["fraction-train"],
        min_available_nodes=settings["min-available-nodes"],
        seed=settings["seed"],
        checkpoint=settings["checkpoint"] or None,
    )

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """The whole model on digits that no client has: only the server can put it together."""
        split.load_state_dict(arrays.to_torch_state_dict(), strict=False)
        x, y = load_test()
        with torch.no_grad():
            right = split.eval()(x).argmax(1) == y
        return MetricRecord({"accuracy": float(right.float().mean())})

    result = strategy.start(
        grid, trained_arrays(split), num_rounds=settings["rounds"], timeout=float(settings["timeout"]), evaluate_fn=evaluate
    )
    if settings["final-model"]:
        torch.save(result.arrays.to_torch_state_dict(), settings["final-model"])
