"""What is learned: a network that knows upright digits, adapters that teach it digits upside down, and the settings."""

import copy
from functools import cache
from typing import Any

import torch
from flwr.app import Context
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from fewer.data import load_digits
from fewer.federated import LoRARoundsConfig, PrivacyConfig, dirichlet, freeze_a

BASE_ROWS, TEST_ROWS = 600, 297  # of the 1,797 digits: the first taught the base, no client trains on the last


@cache
def digits() -> tuple[Tensor, Tensor]:
    images = load_digits()
    return torch.from_numpy(images.x).float().div(16), torch.from_numpy(images.y)


@cache
def base() -> nn.Module:
    """A perceptron trained on upright digits; in practice a large model that everybody has."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    x, y = digits()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[:BASE_ROWS]), y[:BASE_ROWS]).backward()
        optimizer.step()
    return net


def model_of(context: Context) -> Any:
    """The base with adapters whose A every client draws for itself, alike."""
    settings: Any = context.run_config
    adapted = LoraConfig(r=settings["rank"], lora_alpha=settings["rank"], target_modules=["1", "3"])
    model = freeze_a(get_peft_model(copy.deepcopy(base()), adapted), settings["seed"])
    if not settings["freeze-a"]:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return model


@cache
def parts(clients: int, alpha: float, seed: int) -> list:
    return dirichlet(digits()[1][BASE_ROWS:-TEST_ROWS], clients, alpha, seed=seed, min_size=50)


def load_data(context: Context) -> tuple[Tensor, Tensor]:
    x, y = digits()
    settings: Any = context.run_config
    node: Any = context.node_config
    rows = parts(node["num-partitions"], settings["dirichlet"], settings["seed"])[node["partition-id"]]
    return x[BASE_ROWS:][rows].flip(-2), y[BASE_ROWS:][rows]


def load_test(context: Context) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[-TEST_ROWS:].flip(-2), y[-TEST_ROWS:]


def config_of(context: Context) -> LoRARoundsConfig:
    settings: Any = context.run_config
    privacy = None
    if settings["epsilon"]:
        privacy = PrivacyConfig(epsilon=settings["epsilon"], delta=settings["delta"], clip=settings["clip"], secure=settings["secure"])
    return LoRARoundsConfig(
        local_steps=settings["local-steps"],
        batch_size=settings["batch-size"],
        lr=settings["lr"],
        privacy=privacy,
        rounds=settings["rounds"],
    )
