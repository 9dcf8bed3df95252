"""The twin that the local learners are measured against: the same layers and a linear output layer, trained end to end with AdamW."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fewer.checks import check_not_negative, check_positive, check_whole, is_whole
from fewer.fitting import (
    Batches,
    BestState,
    Callback,
    Examples,
    History,
    check_features,
    check_validation,
    evaluating,
    fit_stages,
    mean_loss_and_accuracy,
    over_batches,
)
from fewer.tasks import networks


@dataclass(frozen=True)
class BackpropagationConfig:
    """How `fit_backpropagation` trains; the defaults are the release's tuned values for MNIST (Fashion-MNIST: 2.13e-4 and 2.7e-5).

    Args:
        lr: learning rate of AdamW.
        weight_decay: decoupled weight decay of AdamW.
        epochs: passes over the data at most.
        batch_size: rows in a batch; a DataLoader keeps its own.
        patience: epochs without improvement of the validation loss before stopping; None never stops early. The best state is kept.
        min_delta: by how much the validation loss must fall to count as better.

    Raises:
        ValueError: a value that cannot be used.
    """

    lr: float = 1.98e-4
    weight_decay: float = 7.5e-6
    epochs: int = 100
    batch_size: int = 128
    patience: int | None = 10
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        check_positive(lr=self.lr)
        check_not_negative(weight_decay=self.weight_decay, min_delta=self.min_delta)
        check_whole(optional=["patience"], epochs=self.epochs, batch_size=self.batch_size, patience=self.patience)


def mlp(in_features: int, hidden_sizes: Sequence[int], num_classes: int) -> nn.Sequential:
    """The twin of `MonoForwardMLP` and `ForwardForwardMLP`: their hidden layers (linear, ReLU), then a linear output layer.

    Args:
        in_features: entries of an example, flattened.
        hidden_sizes: widths of the hidden layers, at least one.
        num_classes: at least 2.

    Raises:
        ValueError: a size that cannot be used.

    Examples:
        >>> mlp(64, (32, 16), 10)(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 10])
    """
    check_sizes(in_features, hidden_sizes, num_classes)
    return networks.mlp((in_features,), num_classes, hidden_sizes)


def cnn(
    in_channels: int, image_size: int | tuple[int, int], channels: Sequence[int] = (32, 128, 512), num_classes: int = 10
) -> nn.Sequential:
    """The twin of `CascadedForwardCNN`: its blocks (3x3 convolution, ReLU, 2x2 maximum, batch norm), then a linear output layer.

    Args:
        in_channels: channels of an image.
        image_size: its height and width in pixels, one number if they are the same.
        channels: channels of the blocks, at least one; each block halves the image.
        num_classes: at least 2.

    Raises:
        ValueError: a size that cannot be used, or an image too small for the blocks.

    Examples:
        >>> cnn(1, 8, (4, 8), num_classes=10)(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    check_sizes(in_channels, channels, num_classes, names=("in_channels", "channels"))
    height, width = block_output_size(image_size, len(channels))
    blocks = [convolution_block(into, out) for into, out in itertools.pairwise([in_channels, *channels])]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(channels[-1] * height * width, num_classes))


def convolution_block(into: int, out: int) -> nn.Sequential:
    """3x3 convolution (padding 1, no bias, as batch norm follows), ReLU, 2x2 maximum, batch norm."""
    return nn.Sequential(nn.Conv2d(into, out, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(out))


def block_output_size(image_size: int | tuple[int, int], blocks: int) -> tuple[int, int]:
    """Height and width after so many blocks, each of which halves them; ValueError where nothing is left.

    >>> block_output_size(28, 3)
    (3, 3)
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 2**blocks:
        raise ValueError(
            f"an image of {height}x{width} pixels is too small for {blocks} blocks; expected at least {2**blocks} a side: use fewer blocks"
        )
    return height >> blocks, width >> blocks


def check_sizes(
    in_features: int, hidden_sizes: Iterable[int], num_classes: int, names: tuple[str, str] = ("in_features", "hidden_sizes")
) -> None:
    """ValueError unless every layer size is a positive integer and there is at least one hidden layer and two classes."""
    sizes = list(hidden_sizes)
    if not sizes or any(not is_whole(size) or size < 1 for size in sizes):
        raise ValueError(f"{names[1]} is {sizes}; expected at least one whole number above 0, such as (1000, 1000)")
    inputs: dict[str, Any] = {names[0]: in_features}
    check_whole(**inputs)
    check_whole(least=2, num_classes=num_classes)


def check_precision(model: nn.Module) -> None:
    """ValueError for a model in float16, whose steps are no numbers: Adam's epsilon of 1e-8 is 0 there."""
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        raise ValueError("the model is torch.float16; expected bfloat16, float32 or float64: train model.float() and convert it afterwards")


def fit_backpropagation(
    model: nn.Module,
    x: Float[Tensor, "rows ..."] | DataLoader,
    y: Int[Tensor, "rows"] | None,
    *,
    validation: tuple[Tensor, Tensor] | DataLoader | None,
    config: BackpropagationConfig | None = None,
    callbacks: Iterable[Callback] = (),
    generator: torch.Generator | None = None,
) -> History:
    """Train any module that maps x to class scores end to end: cross-entropy, AdamW, early stopping on the validation loss.

    Args:
        model: trained in place, where it is (CPU or CUDA) and in its dtype; left in evaluation mode.
        x: examples, or a DataLoader of (x, y) batches.
        y: labels 0..C-1; None with a DataLoader.
        validation: (x, y) or a DataLoader, for early stopping; None only with `patience=None`.
        config: default `BackpropagationConfig()`.
        callbacks: each is called with every `Epoch` as it ends.
        generator: shuffles the batches.

    Returns:
        The history, of one stage "network".

    Raises:
        ValueError: data that cannot be used.
        FloatingPointError: a loss or a weight is not finite; the message names the epoch, and the last finite state is kept.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(200, 4)
        >>> y = (x[:, 0] > 0).long()
        >>> config = BackpropagationConfig(lr=1e-2, epochs=20)
        >>> history = fit_backpropagation(mlp(4, (16,), 2), x[:150], y[:150], validation=(x[150:], y[150:]), config=config)
        >>> history.epochs[history.best["network"] - 1].validation_accuracy > 0.9
        True
    """
    config = config or BackpropagationConfig()
    check_precision(model)
    check_validation(validation, config.patience)
    weight = next(model.parameters())
    features, classes = _shape_of(model, x, weight)
    train = Examples(x, y, num_classes=classes)
    held_out = Examples.of_validation(validation, num_classes=classes, in_features=features)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    history = History()

    def batches(examples: Examples | None, shuffle: bool = False) -> Batches:
        if examples is not None:
            for xb, yb in examples.batches(config.batch_size, generator=generator, shuffle=shuffle, device=weight.device):
                yield xb.to(weight.dtype), yb

    def step(xb: Tensor, yb: Tensor) -> Tensor:
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(xb), yb)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def validate() -> list[tuple[float, float]]:
        with evaluating(model):
            return [mean_loss_and_accuracy(model, batches(held_out))]

    fit_stages(
        ["network"],
        over_batches(step, lambda: batches(train, shuffle=True)),
        validate,
        state=BestState([model], config.patience, config.min_delta),
        epochs=config.epochs,
        history=history,
        callbacks=list(callbacks),
    )
    optimizer.zero_grad()
    model.eval()
    return history.stop_clock()


@torch.no_grad()
def _shape_of(model: nn.Module, x: Tensor | DataLoader, weight: Tensor) -> tuple[int, int]:
    """How many entries an example of x has, flattened, and how many class scores the model gives; ValueError where it cannot take x."""
    first = next((xb for xb, _ in x), None) if isinstance(x, DataLoader) else x
    if first is None:
        raise ValueError("x yields no batches; expected at least one: check the DataLoader")
    check_features(first)
    try:
        with evaluating(model):
            scores = model(first[:1].to(weight.device, weight.dtype))
    except RuntimeError as error:
        raise ValueError(
            f"x is {tuple(first.shape)}, which the model cannot take ({error}); give x of the shape it was built for"
        ) from error
    if scores.ndim != 2:
        raise ValueError(f"the model gives {tuple(scores.shape)} for one example; expected scores [1, classes]: flatten its output")
    return math.prod(first.shape[1:]), scores.shape[1]
