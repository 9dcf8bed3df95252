"""What the side by side is about: mirrored images for a vision transformer that knows them as they are, or a user's own transformer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.devices import one_thread
from fewer.errors import UserError
from fewer.federated._shared.problems import load_trained
from fewer.fitting import fit_steps
from fewer.tasks import image_task

Pair = tuple[Tensor, Tensor]
KNOWN, HELD = 20_000, 1_200  # images that the backbone is trained on, and that the clients hold mirrored
VALIDATION, TEST, SIDE = 1_000, 1_000, 28
OWN_KNOWN = 0.6  # of a user's images, where there are fewer
WIDTH, BLOCKS, HEADS, MLP, PATCHES = 48, 6, 4, 192, 4  # of the backbone; patches a side
EPOCHS, BATCH, LR, DECAY, WARM_UP = 3, 128, 1.5e-3, 0.01, 50  # of its training
FULL_HELD, FULL_IMAGES = 6_000, 10_000  # at full scale: of mirrored images, and for a user's transformer


class Logits(nn.Module):
    """An image classifier of transformers whose output is the logits alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


class Resized(nn.Module):
    """Embeddings that first bring images to the size and the channels that they know."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.embeddings, self.patch_embeddings = embeddings, embeddings.patch_embeddings

    def forward(self, x: Tensor, *inputs: Any, **keywords: Any) -> Tensor:
        known = self.patch_embeddings
        x = F.interpolate(x, known.image_size, mode="bilinear", antialias=True) if tuple(x.shape[-2:]) != tuple(known.image_size) else x
        return self.embeddings(x.expand(-1, known.num_channels, -1, -1), *inputs, **keywords)


@dataclass(frozen=True)
class Mirrored:
    """A model that knows images, and others that are unlike them.

    Attributes:
        model: a `ViTForImageClassification`.
        train, validation, test: (x, y) each; the clients hold `train`.
        name: the data's.
        beside: arrays beside the training examples: "client" says who holds which.
    """

    model: Any
    train: Pair
    validation: Pair
    test: Pair
    name: str
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)


def mirrored(data: str, held: int = HELD) -> Mirrored:
    """A small transformer trained on images as they are; clients and tests have others, their columns reversed.

    Args:
        data: as `image_task` takes it.
        held: images that the clients have in all, where there are enough.

    Raises:
        UserError: no such set or file, or what the file holds cannot be used.
    """
    task = image_task(data, train=KNOWN + held, validation=VALIDATION, test=TEST, side=SIDE, normalise=(0.0, 1.0), beside=["client"])
    (x, y), count = task.train, len(task.train[0])
    known = min(KNOWN, round(OWN_KNOWN * count)) if count < KNOWN + held else KNOWN
    model = trained_once(backbone(task.shape, task.classes), x[:known], y[:known])
    turned = [(each.flip(-1), labels.long()) for each, labels in ((x[known:], y[known:]), task.validation, task.test)]
    return Mirrored(model, *turned, name=task.name, beside={name: array[known:] for name, array in task.beside.items()})


def backbone(shape: tuple[int, int, int], classes: int) -> Any:
    """The small transformer for images of so many channels, rows and columns, untrained; always the same.

    Raises:
        UserError: the images are too small.
    """
    from transformers import ViTConfig, ViTForImageClassification

    channels, height, width = shape
    if min(height, width) < PATCHES:
        raise UserError(f"the images have {height} x {width} pixels; expected at least {PATCHES} a side: larger ones")
    settings: dict[str, Any] = {
        "hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": HEADS, "intermediate_size": MLP, "num_channels": channels,
        "image_size": [height, width], "patch_size": [height // PATCHES, width // PATCHES], "num_labels": classes,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTForImageClassification(ViTConfig(**settings))


def trained_once(model: Any, x: Tensor, y: Tensor) -> Any:
    """The model trained on these images, or loaded as it was before; on one thread, so that sums do not depend on their number."""
    steps = EPOCHS * -(-len(x) // BATCH)

    def schedule(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP, (steps - step) / max(1, steps - WARM_UP))

    def batches() -> Iterator[Tensor]:
        for _ in range(EPOCHS):
            yield from torch.randperm(len(x)).split(BATCH)

    def train() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
        model.train()
        fit_steps(optimizer, lambda rows: F.cross_entropy(model(x[rows]).logits, y[rows].long()), batches(), steps, schedule=schedule)

    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(0)
        load_trained(model, x, y, ("split-backbones", "vit"), [EPOCHS, BATCH, LR, DECAY, WARM_UP], train)
    return model.eval()


def own_model(directory: str, data: str) -> Mirrored:
    """A user's transformer, a classifier for the data's classes where it has another one, and images as they are.

    Raises:
        UserError: the folder holds no ViT, or the data cannot be used.
    """
    from transformers import ViTForImageClassification

    task = image_task(data, train=FULL_IMAGES, validation=VALIDATION, test=TEST, normalise=(0.5, 0.5), beside=["client"])
    if not (Path(directory) / "config.json").is_file():
        raise UserError(f"model is {directory!r}; expected a transformers directory of a ViT: --set model=DIR")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = ViTForImageClassification.from_pretrained(
            directory, num_labels=task.classes, ignore_mismatched_sizes=True, local_files_only=True, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    model.vit.embeddings = Resized(model.vit.embeddings)
    pairs = [(x, y.long()) for x, y in (task.train, task.validation, task.test)]
    return Mirrored(model.eval(), *pairs, name=task.name, beside=task.beside)


def whole(task: Mirrored) -> nn.Module:
    """The whole model as full fine-tuning trains it, a copy."""
    return Logits(copy.deepcopy(task.model)).requires_grad_()
