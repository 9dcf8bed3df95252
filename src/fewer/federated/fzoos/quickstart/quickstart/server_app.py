"""The server: it sends the point out, and averages the points and the weights that come back."""

from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fewer.federated import FZooS
from fewer.federated.fzoos import arrays_of
from fewer.files import check_new_file

from .task import CLASSES, config_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings: Any = context.run_config
    if settings["final-point"]:
        check_new_file(settings["final-point"], option="final-point")
    strategy = FZooS(
        config_of(context),
        min_available_nodes=settings["min-available-nodes"],
        seed=settings["seed"],
        checkpoint=settings["checkpoint"] or None,
    )
    exchanges = strategy.exchanges(settings["rounds"])
    result = strategy.start(grid, arrays_of(np.full(CLASSES, 0.5)), num_rounds=exchanges, timeout=float(settings["timeout"]))
    for exchange, metrics in (result.train_metrics_clientapp or {}).items():
        print(f"exchange {exchange}: mean value {metrics['value']:.4f}, queries a client {metrics['queries']:.0f}")
    if settings["final-point"]:
        np.savetxt(Path(settings["final-point"]), result.arrays["x"].numpy())
