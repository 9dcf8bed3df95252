"""Features and labels in batches, in memory or behind a DataLoader, and what is asked of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fewer.fitting.states import all_finite

Batches = Iterable[tuple[Tensor, Tensor]]


class Examples:
    """Features and labels, in memory or behind a DataLoader, as batches on one device.

    Args:
        x: float tensor [N, ...], or a DataLoader that yields (x, y) batches (its own batch size and order are then used).
        y: integer tensor [N]; None with a DataLoader.
        num_classes: labels are 0..num_classes-1.
        in_features: entries that an example must have, flattened; None for any.
        name: what the error messages call x.
    """

    def __init__(
        self, x: Tensor | DataLoader, y: Tensor | None, *, num_classes: int, in_features: int | None = None, name: str = "x"
    ) -> None:
        self.loader = x if isinstance(x, DataLoader) else None
        self.x = self.y = None
        if isinstance(x, DataLoader):
            if y is not None:
                raise ValueError(f"{name} is a DataLoader, which brings its own labels, and y was given too; pass y=None")
        else:
            check_features(x, name)
            check_width(x, in_features, name)
            check_labels(y, len(x), num_classes)
            self.x, self.y = x, y
        self.num_classes, self.in_features, self.name = num_classes, in_features, name

    @classmethod
    def of_validation(
        cls, validation: tuple[Tensor, Tensor] | DataLoader | None, *, num_classes: int, in_features: int | None = None
    ) -> Examples | None:
        """The validation data as examples, or None."""
        if validation is None or (not isinstance(validation, DataLoader) and len(validation[0]) == 0):
            return None
        x, y = (validation, None) if isinstance(validation, DataLoader) else validation
        return cls(x, y, num_classes=num_classes, in_features=in_features, name="x of validation")

    def batches(
        self, batch_size: int, *, generator: torch.Generator | None = None, shuffle: bool = False, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(x, y) batches on `device`; shuffled with `generator` where asked (a DataLoader keeps its own order)."""
        if self.loader is not None:
            rows = 0
            for x, y in self.loader:
                rows += len(x)
                check_features(x, "a batch of x")
                check_width(x, self.in_features, "a batch of x")
                check_labels(y, len(x), self.num_classes)
                yield x.to(device), y.to(device, torch.long)
            if not rows:
                raise ValueError(f"{self.name} yields no batches; expected at least one: check the DataLoader")
            return
        assert self.x is not None
        assert self.y is not None
        yield from batches_of(self.x, self.y, batch_size, generator=generator, shuffle=shuffle, device=device)


def batches_of(
    x: Tensor,
    y: Tensor,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    shuffle: bool = False,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, y) batches on `device`, in order or shuffled with `generator`.

    The last may be shorter, but a single row joins the batch before: batch norm cannot train on one.
    """
    y = y.to(x.device)
    order = torch.randperm(len(x), generator=generator, device=generator.device if generator else None).to(x.device) if shuffle else None
    starts = list(range(0, len(x), batch_size))
    if len(starts) > 1 and len(x) - starts[-1] == 1 < batch_size:
        starts.pop()
    for start, end in itertools.pairwise([*starts, len(x)]):
        rows = slice(start, end) if order is None else order[start:end]
        yield x[rows].to(device), y[rows].to(device, torch.long)


def check_features(x: object, name: str = "x") -> None:
    """ValueError unless x is a float tensor with a first dimension of at least 1 and only finite values."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or len(x) == 0:
        given = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{name} is {given}; expected a float tensor [N, ...] with N >= 1: convert it with torch.as_tensor(x, dtype=torch.float32)"
        )
    if not all_finite(x):
        row = int((~x.flatten(1).isfinite().all(1)).nonzero()[0])
        raise ValueError(f"{name} has a NaN or infinite value in row {row}; expected finite values: clean or drop that row")


def check_width(x: Tensor, in_features: int | None, name: str = "x") -> None:
    """ValueError unless an example, flattened, has `in_features` entries."""
    width = math.prod(x.shape[1:])
    if in_features is not None and width != in_features:
        raise ValueError(f"{name} has {width} features an example; expected {in_features}: the model was built for that width")


def check_labels(y: object, rows: int, num_classes: int) -> None:
    """ValueError unless y is an integer tensor [rows] with values in 0..num_classes-1."""
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool or y.shape != (rows,):
        given = f"{tuple(y.shape)} {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"y is {given}; expected an integer tensor of shape ({rows},): one class number per row of x")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"y holds labels {low}..{high}; expected 0..{num_classes - 1}: renumber the classes or raise num_classes")


def check_validation(validation: tuple[Tensor, Tensor] | DataLoader | None, patience: int | None) -> None:
    """ValueError when early stopping is asked for without data to stop on."""
    if isinstance(validation, DataLoader):
        empty = not isinstance(validation.dataset, IterableDataset) and len(validation) == 0
    else:
        empty = validation is None or len(validation[0]) == 0
    if empty and patience is not None:
        raise ValueError("validation is empty while early stopping is on; pass validation=(x, y) or set patience=None in the config")
