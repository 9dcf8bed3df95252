"""FedSpeed for Flower: the strategy of the ServerApp, and the ClientApp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.clientapp import ClientApp
from torch import nn

from fewer.federated._shared.flat_model import Loss, cross_entropy
from fewer.federated._shared.flower import FlowerStrategy
from fewer.federated._shared.flower_clients import LoadData, flower_client_app
from fewer.federated.fedspeed.algorithm import FedSpeedAlgorithm, FedSpeedConfig


class FedSpeed(FlowerStrategy):
    """FedSpeed as a Flower strategy.

    Args:
        config: FedSpeed's settings, the same as the clients'.
        fraction_train: each client takes part in a round with this probability (redrawn if none does).
        min_available_nodes: the strategy waits until so many nodes are there.
        keywords: `fraction_evaluate`, `seed`, `sampler`, `clients`, `checkpoint` (see `FlowerStrategy`).

    Examples:
        >>> strategy = FedSpeed(FedSpeedConfig(lr=0.05), fraction_train=0.2)
        >>> strategy.algorithm.config.lr
        0.05

        In a ServerApp: `strategy.start(grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=10)`.
    """

    def __init__(
        self, config: FedSpeedConfig | None = None, fraction_train: float = 0.1, min_available_nodes: int = 2, **keywords: Any
    ) -> None:
        super().__init__(FedSpeedAlgorithm(config or FedSpeedConfig()), fraction_train, min_available_nodes=min_available_nodes, **keywords)


def fedspeed_client_app(
    model_fn: Callable[[], nn.Module],
    load_data: LoadData,
    loss_fn: Loss = cross_entropy,
    config: FedSpeedConfig | None = None,
    **keywords: Any,
) -> ClientApp:
    """FedSpeed's clients as a Flower ClientApp; g_i lies in `context.state`.

    Args:
        model_fn: makes the model.
        load_data: `load_data(context)`: the client's examples (x [n, ...], y [n, ...]).
        loss_fn: `loss_fn(output, y)`: the losses of the examples [B], or their mean.
        config: FedSpeed's settings, the same as the strategy's.
        keywords: `load_test`, `buffers` (see `flower_client_app`).

    Examples:
        >>> import torch
        >>> app = fedspeed_client_app(lambda: nn.Linear(2, 2), lambda context: (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])))
    """
    return flower_client_app(FedSpeedAlgorithm(config or FedSpeedConfig()), model_fn, load_data, loss_fn, **keywords)
