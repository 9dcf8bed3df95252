"""What is learned: a transformer that knows upright digits is fine-tuned to digits upside down; and the settings."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

from fewer.data import load_digits
from fewer.data.made_once import WEIGHTS, folder_of, made_once
from fewer.federated import SFPromptConfig, dirichlet, split_vit

BASE_ROWS, TEST_ROWS = 600, 297  # of the 1,797 digits: the first taught the base, no client trains on the last
SHAPE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256, "image_size": 8, "patch_size": 4,
    "num_channels": 1, "num_labels": 10,
}  # fmt: skip


@cache
def digits() -> tuple[Tensor, Tensor]:
    images = load_digits()
    return torch.from_numpy(images.x).float().div(16).unsqueeze(1), torch.from_numpy(images.y)


@cache
def base() -> Any:
    """A transformer trained on upright digits, once on a machine. In practice the server has a large one, and each device
    `split_vit(...).client()` of it, which is all it needs."""
    torch.manual_seed(0)
    model: Any = ViTForImageClassification(ViTConfig(**SHAPE))

    def make(part: Path) -> None:
        x, y = digits()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(150):
            rows = torch.randperm(BASE_ROWS)[:100]
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]).logits, y[rows]).backward()
            optimizer.step()
        save_file(model.state_dict(), part / WEIGHTS)

    model.load_state_dict(load_file(made_once(folder_of("quickstart", "digits-vit", SHAPE), make) / WEIGHTS))
    return model


def split_of(context: Context) -> Any:
    """The base, cut in three; the prompt begins alike everywhere."""
    settings: Any = context.run_config
    torch.manual_seed(settings["seed"])
    return split_vit(base(), prompt_tokens=settings["prompt-tokens"], at=settings["at"])


@cache
def parts(clients: int, alpha: float, seed: int) -> list:
    return dirichlet(digits()[1][BASE_ROWS:-TEST_ROWS], clients, alpha, seed=seed, min_size=30)


def load_data(context: Context) -> tuple[Tensor, Tensor]:
    x, y = digits()
    settings: Any = context.run_config
    node: Any = context.node_config
    rows = parts(node["num-partitions"], settings["dirichlet"], settings["seed"])[node["partition-id"]]
    return x[BASE_ROWS:][rows].flip(-2), y[BASE_ROWS:][rows]


def load_test() -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[-TEST_ROWS:].flip(-2), y[-TEST_ROWS:]


def config_of(context: Context) -> SFPromptConfig:
    settings: Any = context.run_config
    return SFPromptConfig(
        shortcut_epochs=settings["shortcut-epochs"],
        keep=settings["keep"],
        batch_size=settings["batch-size"],
        lr=settings["lr"],
        max_grad_norm=1.0,
    )
