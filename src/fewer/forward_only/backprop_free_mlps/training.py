"""What the four trainers share: examples in batches, early stopping that restores the best state, and the history of a fit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


class Epoch(NamedTuple):
    """One line of a fit's history."""

    stage: str  # what was being trained: "network", "layer 1", "predictor 2", ...
    epoch: int  # from 1, within the stage
    train_loss: float  # mean over the epoch's batches
    validation_loss: float  # nan without validation data
    validation_accuracy: float  # fraction in 0..1, nan without validation data
    seconds: float  # since the fit began


Callback = Callable[[Epoch], None]


@dataclass
class History:
    """What happened during a fit.

    Attributes:
        epochs: one `Epoch` per stage and epoch, in order.
        best: the epoch whose state each stage kept.
        notes: what the trainer did differently from what was asked, in words (a cache that did not fit, ...).
        seconds: wall time of the whole fit.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    _started: float = field(default_factory=time.perf_counter, repr=False)

    def add(self, stage: str, epoch: int, train_loss: float, validation: tuple[float, float], callbacks: Iterable[Callback]) -> None:
        """Note one epoch and tell the callbacks; a loss that is not finite ends the fit with FloatingPointError."""
        self.seconds = time.perf_counter() - self._started
        line = Epoch(stage, epoch, train_loss, *validation, self.seconds)
        self.epochs.append(line)
        if not math.isfinite(train_loss):
            raise FloatingPointError(f"the loss of {stage} is {train_loss} in epoch {epoch}; the last finite state is kept: try a lower lr")
        for callback in callbacks:
            callback(line)


class EarlyStopping:
    """Keeps the best state seen and says when to stop.

    Args:
        modules: the modules whose state is kept.
        patience: epochs without improvement before stopping; None keeps the best state but never stops.
        min_delta: by how much a score must beat the best one to count as better.

    Higher scores are better: pass the negative of a loss. `restore` puts the best state back (the released code keeps the last).
    """

    def __init__(self, modules: Iterable[nn.Module], patience: int | None, min_delta: float = 0.0) -> None:
        self.modules, self.patience, self.min_delta = list(modules), patience, min_delta
        self.best_score, self.best_epoch = -math.inf, 0
        self._state: list[dict[str, Tensor]] = []

    def update(self, score: float, epoch: int) -> bool:
        """Take in the score of an epoch (from 1); true when training should stop."""
        if score > self.best_score + self.min_delta or not self._state:
            self.best_score, self.best_epoch = score, epoch
            self._state = [{name: value.detach().clone() for name, value in module.state_dict().items()} for module in self.modules]
        return self.patience is not None and epoch - self.best_epoch >= self.patience

    def restore(self) -> None:
        for module, state in zip(self.modules, self._state, strict=bool(self._state)):
            module.load_state_dict(state)


class Examples:
    """Features and labels, in memory or behind a DataLoader, as batches on one device.

    Args:
        x: float tensor [N, ...], or a DataLoader that yields (x, y) batches (its own batch size and order are then used).
        y: integer tensor [N]; None with a DataLoader.
    """

    def __init__(self, x: Tensor | DataLoader, y: Tensor | None, *, num_classes: int, name: str = "x") -> None:
        self.loader = x if isinstance(x, DataLoader) else None
        self.x = self.y = None
        if isinstance(x, DataLoader):
            if y is not None:
                raise ValueError(f"{name} is a DataLoader, which brings its own labels, and y was given too; pass y=None")
        else:
            check_features(x, name)
            check_labels(y, len(x), num_classes)
            self.x, self.y = x, y
        self.num_classes = num_classes

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None, shuffle: bool = False, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y) batches on `device`; shuffled with `generator` where asked (a DataLoader keeps its own order)."""
        if self.loader is not None:
            for x, y in self.loader:
                check_features(x, "a batch of x")
                check_labels(y, len(x), self.num_classes)
                yield x.to(device), y.to(device)
            return
        assert self.x is not None
        assert self.y is not None
        order = torch.randperm(len(self.x), generator=generator) if shuffle else None
        for start in range(0, len(self.x), batch_size):
            if order is None:
                xb, yb = self.x[start : start + batch_size], self.y[start : start + batch_size]
            else:
                index = order[start : start + batch_size].to(self.x.device)
                xb, yb = self.x[index], self.y[index]
            yield xb.to(device), yb.to(device)


def check_features(x: object, name: str = "x") -> None:
    """ValueError unless x is a float tensor with a first dimension of at least 1 and only finite values."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or len(x) == 0:
        given = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} is {given}; expected a float tensor [N, ...] with N >= 1: convert it with torch.as_tensor(x, dtype=torch.float32)")
    rows = x.flatten(1).isfinite().all(1)
    if not rows.all():
        row = int((~rows).nonzero()[0])
        raise ValueError(f"{name} has a NaN or infinite value in row {row}; expected finite values: clean or drop that row")


def check_labels(y: object, rows: int, num_classes: int) -> None:
    """ValueError unless y is an integer tensor [rows] with values in 0..num_classes-1."""
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.shape != (rows,):
        given = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y is {given}; expected an integer tensor of shape ({rows},): one class number per row of x")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"y holds labels {low}..{high}; expected 0..{num_classes - 1}: renumber the classes or raise num_classes")


def check_validation(validation: object, patience: int | None) -> None:
    """ValueError when early stopping is asked for without data to stop on."""
    empty = validation is None or (isinstance(validation, tuple) and len(validation[0]) == 0)
    if empty and patience is not None:
        raise ValueError("validation is empty while early stopping is on; pass validation=(x, y) or set patience=None in the config")


def check_positive(**values: float) -> None:
    """ValueError naming the first value that is not a finite number above zero."""
    for name, value in values.items():
        if not value > 0 or not math.isfinite(value):
            raise ValueError(f"{name} is {value}; expected a finite number above 0")


def check_sizes(in_features: int, hidden_sizes: Iterable[int], num_classes: int) -> None:
    """ValueError unless every layer size is a positive integer and there is at least one hidden layer and two classes."""
    sizes = list(hidden_sizes)
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"hidden_sizes is {sizes}; expected at least one positive integer, such as (1000, 1000)")
    if in_features < 1 or num_classes < 2:
        raise ValueError(f"in_features is {in_features} and num_classes {num_classes}; expected at least 1 and at least 2")
