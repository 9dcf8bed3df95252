"""Small models with adapters, and clients that hold their examples."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fewer.federated import FlatModel, Shards, freeze_a

WIDTH, CLASSES = 16, 3


def net(dtype=torch.float32, norm=None, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)]
        return nn.Sequential(*layers[:1], *([norm] if norm else []), *layers[1:]).to(dtype)


class Tokens(nn.Module):
    """Token by token, then the mean over the tokens [B, T, d] -> [B, classes]."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.body = net(dtype)

    def forward(self, x):
        return self.body(x).mean(-2)


class TokensFirst(Tokens):
    """The same with the tokens as the layers' first axis."""

    def forward(self, x):
        return self.body(x.transpose(0, 1)).mean(0)


def lora(base=None, rank=4, alpha=8, frozen=True, targets=("0", "2"), seed=0, init: Any = "kaiming", **config):
    """A peft model whose A is always the same, and frozen or not; B is zero."""
    base = net() if base is None else base
    model = freeze_a(get_peft_model(base, LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), **config)), seed, init)
    if not frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return model


def drawn(flat: FlatModel, seed=0, scale=0.3):
    """Trained numbers that are not zero."""
    return scale * torch.randn(flat.size, generator=torch.Generator().manual_seed(seed), dtype=flat.dtype)


def points(count=120, dtype=torch.float32, seed=1):
    """Points of three classes that no client holds alike."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=draw)
    centres = torch.randn(CLASSES, WIDTH, generator=draw)
    return (centres[y] + 0.7 * torch.randn(count, WIDTH, generator=draw)).to(dtype), y


def federation(clients=3, count=120, dtype=torch.float32):
    """The points sorted by class and dealt out, so that the clients are unlike."""
    x, y = points(count, dtype)
    return Shards(x, y, y.argsort().chunk(clients))


def all_of(clients, round, seed):
    return list(clients)
