"""The networks of the study: a ConvNet to prune, a ResNet-20 to train, and a network trained once on this machine and kept in the cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.data import WEIGHTS, folder_of, made_once

BATCH, LR = 128, 4e-3


def conv_net() -> nn.Sequential:
    """Four 3x3 convolutions and a linear layer for images [N, 1, 28, 28].

    Examples:
        >>> sum(parameter.numel() for parameter in conv_net().parameters())
        59074
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 56, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(56, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 9, 10),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut, which drops rows and columns and adds empty channels (He et al. 2016, A)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.added = stride, out - into

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        return F.relu(shortcut + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def resnet20(channels: int, widths: tuple[int, int, int], stem_stride: int = 1) -> nn.Sequential:
    """ResNet-20 for small images: a convolution, three stages of three blocks, a linear layer.

    Examples:
        >>> sum(parameter.numel() for parameter in resnet20(1, (4, 8, 16)).parameters())
        17254
    """
    blocks: list[nn.Module] = [
        nn.Conv2d(channels, widths[0], 3, stem_stride, 1, bias=False),
        nn.BatchNorm2d(widths[0]),
        nn.ReLU(),
    ]
    into = widths[0]
    for stage, width in enumerate(widths):
        for block in range(3):
            blocks.append(ResidualBlock(into, width, stride=2 if stage and not block else 1))
            into = width
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, 10))


def trained(name: str, make: Callable[[], nn.Module], x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """`make()` trained on images x with labels y, from the cache where it was trained before; in eval mode.

    Args:
        name: of the data and the network; with the recipe it names the weights' place in the cache.
    """
    recipe = {
        "images": len(x),
        "epochs": epochs,
        "batch": BATCH,
        "lr": LR,
        "code": inspect.getsource(inspect.getmodule(trained) or trained),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()

        def learn(folder: Path) -> None:
            train(model, x, y, epochs)
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)

        model.load_state_dict(load_file(made_once(folder_of("mfac", name.replace(" ", "-"), recipe), learn) / WEIGHTS))
    return model.eval()


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """AdamW with a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=epochs * -(-len(x) // BATCH))
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
