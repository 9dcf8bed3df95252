"""What is learned: the model, each client's digits, and the settings."""

from functools import cache
from typing import Any

import torch
from flwr.app import Context
from torch import Tensor, nn

from fewer.data import load_digits
from fewer.federated import AnarchicConfig, dirichlet

TEST_ROWS = 297  # of the 1,797 digits; no client trains on them


def model_fn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


@cache
def digits() -> tuple[Tensor, Tensor]:
    images = load_digits()
    return torch.from_numpy(images.x).float().div(16).unsqueeze(1), torch.from_numpy(images.y)


@cache
def parts(clients: int, alpha: float, seed: int) -> list:
    return dirichlet(digits()[1][:-TEST_ROWS], clients, alpha, seed=seed, min_size=5)


def load_data(context: Context) -> tuple[Tensor, Tensor]:
    x, y = digits()
    settings: Any = context.run_config
    node: Any = context.node_config
    rows = parts(node["num-partitions"], settings["dirichlet"], settings["seed"])[node["partition-id"]]
    return x[rows], y[rows]


def load_test(context: Context) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[-TEST_ROWS:], y[-TEST_ROWS:]


def config_of(context: Context) -> AnarchicConfig:
    settings: Any = context.run_config
    return AnarchicConfig(
        variant=settings["variant"],
        server_lr=settings["server-lr"],
        buffer=settings["buffer"],
        lr=settings["lr"],
        batch_size=settings["batch-size"],
    )
