"""Small vision transformers cut in three, images that two classes tell apart, and clients that hold them."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from fewer.federated import Shards, Wire, split_vit

CLASSES, SIDE = 3, 8


def vit(dtype=torch.float32, blocks=4, seed=0, **words: Any) -> Any:
    """Patch 4: four tokens beside the class token; D 16. Weights that matter: transformers' own start is too near zero."""
    return copy.deepcopy(_vit(blocks, seed, **words)).to(dtype)


@cache
def _vit(blocks, seed, **words: Any) -> Any:
    shape: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": blocks, "num_attention_heads": 2, "intermediate_size": 32, "image_size": SIDE,
        "patch_size": 4, "num_channels": 1, "num_labels": CLASSES, "initializer_range": 0.2,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViTForImageClassification(ViTConfig(**(shape | words))).train()


def cut(dtype=torch.float32, seed=0, blocks=4, prompt_tokens=2, **words: Any) -> Any:
    """The transformer in three; always the same, and a copy of its own."""
    return copy.deepcopy(_cut(dtype, seed, blocks, prompt_tokens, **words))


@cache
def _cut(dtype, seed, blocks, prompt_tokens, **words: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return split_vit(vit(dtype, blocks), prompt_tokens=prompt_tokens, **words).train()


def images(count=60, dtype=torch.float32, seed=1):
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=draw)
    x = torch.randn(count, 1, SIDE, SIDE, generator=draw)
    x[:, 0, :4, :4] += y[:, None, None] - 1.0
    return x.to(dtype), y


def federation(clients=3, count=60, dtype=torch.float32):
    x, y = images(count, dtype)
    sizes = [count // clients + (3 if client == 0 else 0) for client in range(clients)]  # unlike sizes
    sizes[-1] = count - sum(sizes[:-1])
    return Shards(x, y, torch.arange(count).split(sizes))


class RecordingWire(Wire):
    """A wire that notes what goes over it."""

    def __init__(self, server):
        super().__init__(server)
        self.seen = []

    def send(self, kind, tensor):
        self.seen.append((kind, tensor.detach().clone()))
        return super().send(kind, tensor)


class PlaybackServer:
    """Answers what another server answered before, in its order: no body here."""

    def __init__(self, seen):
        self.answers = {kind: [tensor for other, tensor in seen if other == kind] for kind in ("output", "returned_gradient")}

    def forward(self, client, smashed, prompt=None, *, keep=True):
        return self.answers["output"].pop(0)

    def backward(self, client, gradient):
        return self.answers["returned_gradient"].pop(0)
