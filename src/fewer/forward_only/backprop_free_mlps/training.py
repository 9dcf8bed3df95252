"""What the four trainers share: examples in batches, early stopping that restores the best state, and the history of a fit."""

from __future__ import annotations

import itertools
import math
import numbers
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from fewer.meters import memory_for


class Epoch(NamedTuple):
    """One line of a fit's history."""

    stage: str  # what was being trained: "network", "layer 1", "predictor 2", ...
    epoch: int  # from 1, within the stage
    train_loss: float  # mean over the epoch's batches
    validation_loss: float  # nan without validation data
    validation_accuracy: float  # fraction in 0..1, nan without validation data
    seconds: float  # since the fit began


Callback = Callable[[Epoch], None]
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass
class History:
    """What happened during a fit.

    Attributes:
        epochs: one `Epoch` per stage and epoch, in order.
        best: the epoch whose state each stage kept.
        notes: what the trainer did differently from what was asked, in words (a cache that did not fit, ...).
        cache_bytes: what the trainer held of its own to save time (the inputs of the layer being trained, ...).
        seconds: wall time of the whole fit.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cache_bytes: int = 0
    seconds: float = 0.0
    _started: float = field(default_factory=time.perf_counter, repr=False)

    def add(self, stage: str, epoch: int, train_loss: float, validation: tuple[float, float], callbacks: Iterable[Callback]) -> None:
        """Note one epoch and tell the callbacks; a loss that is not finite ends the fit with FloatingPointError."""
        self.seconds = time.perf_counter() - self._started
        line = Epoch(stage, epoch, train_loss, *validation, self.seconds)
        self.epochs.append(line)
        validated = not math.isnan(line.validation_accuracy)
        for loss, kind in [(train_loss, "loss"), (line.validation_loss if validated else 0.0, "validation loss")]:
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the {kind} of {stage} is {loss} in epoch {epoch}; expected a finite number, the last finite state is kept: try a lower lr"
                )
        for callback in callbacks:
            callback(line)

    def stop_clock(self) -> Self:
        """The same history, its `seconds` up to now."""
        self.seconds = time.perf_counter() - self._started
        return self


class EarlyStopping:
    """Keeps the best state seen and says when to stop: an epoch is better where it beats the best one by more than `min_delta`.

    Args:
        modules: the modules whose state is kept.
        patience: epochs without improvement before stopping; None keeps the best state but never stops.
        min_delta: by how much a score must beat the best one to count as better.
        stage: what is being trained, for the error message.

    Higher scores are better: pass the negative of a loss, or nan without validation data (each epoch then counts as better).
    As a context manager it puts the best state back at the end (the released code keeps the last), and on FloatingPointError
    the last finite one: that of the last epoch that `update` took, or the initial state.
    """

    def __init__(self, modules: Iterable[nn.Module], patience: int | None, min_delta: float = 0.0, stage: str = "the network") -> None:
        self.modules, self.patience, self.min_delta, self.stage = list(modules), patience, min_delta, stage
        self.best_score, self.best_epoch = -math.inf, 0
        self._best: list[dict[str, Tensor]] = []
        self._last = self._copy([])  # held only while it is not the best

    def update(self, score: float, epoch: int) -> bool:
        """Take in the score of an epoch (from 1); true when training should stop."""
        spoilt = next((name for state in self._states() for name, value in state.items() if not all_finite(value)), None)
        if spoilt:
            raise FloatingPointError(
                f"{spoilt} of {self.stage} is not finite after epoch {epoch}; the last finite state is kept: try a lower lr"
            )
        if not self._best or math.isnan(score) or score > self.best_score + self.min_delta:
            self.best_score, self.best_epoch = score, epoch
            self._best, self._last = self._copy(self._best or self._last), []
        else:
            self._last = self._copy(self._last)
        return self.patience is not None and epoch - self.best_epoch >= self.patience

    def restore(self) -> None:
        """Put the best state back."""
        self._load(self._best or self._last)

    def restore_last(self) -> None:
        """Put the last state back that `update` took."""
        self._load(self._last or self._best)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.restore()
        elif issubclass(kind, FloatingPointError):
            self.restore_last()

    def _states(self) -> list[dict[str, Tensor]]:
        return [module.state_dict() for module in self.modules]

    @torch.no_grad()
    def _copy(self, old: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """A copy of the present state, in the memory of the old one."""
        if not old:
            with memory_for("kept states"):
                return [{name: value.clone() for name, value in state.items()} for state in self._states()]
        for kept, state in zip(old, self._states(), strict=True):
            for name, value in state.items():
                kept[name].copy_(value)
        return old

    def _load(self, states: list[dict[str, Tensor]]) -> None:
        for module, state in zip(self.modules, states, strict=True):
            module.load_state_dict(state)


def train_stages(
    stages: Sequence[str],
    step: Callable[[Tensor, Tensor], Tensor],
    batches: Callable[[], Batches],
    evaluate: Callable[[], Sequence[tuple[float, float]]],
    *,
    stopping: EarlyStopping,
    epochs: int,
    history: History,
    callbacks: Iterable[Callback],
    score: Callable[[Epoch], float] = lambda line: -line.validation_loss,
) -> None:
    """Train stages that run side by side: at most `epochs` passes over the batches, the best state kept.

    Args:
        stages: their names in the history; the last one decides when to stop.
        step: takes a batch (x, y), updates the weights and returns the batch's mean loss for each stage [stages].
        batches: gives one epoch's batches.
        evaluate: gives (loss, accuracy) on the validation data for each stage, (nan, nan) without any.
        score: how good the last stage's epoch was; higher is better.
    """
    with stopping:
        for epoch in range(1, epochs + 1):
            total, rows = torch.zeros(len(stages)), 0
            for x, y in batches():
                losses = step(x, y)
                total, rows = total.to(losses.device) + losses * len(y), rows + len(y)
            for stage, loss, validation in zip(stages, (total / rows).tolist(), evaluate(), strict=True):
                history.add(stage, epoch, loss, validation, callbacks)
            if stopping.update(score(history.epochs[-1]), epoch):
                break
    history.best.update(dict.fromkeys(stages, stopping.best_epoch))


def train_stage(
    stage: str,
    step: Callable[[Tensor, Tensor], Tensor],
    batches: Callable[[], Batches],
    evaluate: Callable[[], tuple[float, float]],
    **settings: Any,
) -> None:
    """`train_stages` for one stage: `step` returns one loss, `evaluate` one (loss, accuracy)."""
    train_stages([stage], lambda x, y: step(x, y)[None], batches, lambda: [evaluate()], **settings)


@torch.no_grad()
def mean_losses_and_accuracies(scores: Callable[[Tensor], Sequence[Tensor]], batches: Batches, stages: int) -> list[tuple[float, float]]:
    """For each stage's scores: mean cross-entropy and the fraction of rows whose highest score is their label's; nan without rows."""
    totals, rows = torch.zeros(stages, 2), 0
    for x, y in batches:
        figures = [torch.stack([F.cross_entropy(given, y, reduction="sum"), (given.argmax(1) == y).sum()]) for given in scores(x)]
        totals, rows = totals.to(y.device) + torch.stack(figures), rows + len(y)
    return [(loss / rows, correct / rows) if rows else (math.nan, math.nan) for loss, correct in totals.tolist()]


def mean_loss_and_accuracy(scores: Callable[[Tensor], Tensor], batches: Batches) -> tuple[float, float]:
    """`mean_losses_and_accuracies` for one stage."""
    return mean_losses_and_accuracies(lambda x: [scores(x)], batches, 1)[0]


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


def all_finite(value: Tensor) -> bool:
    """Whether no entry is NaN or infinite. The sum tells, without a mask of the tensor's size, unless finite entries overflow it."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


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


def check_positive(**values: float) -> None:
    """ValueError naming the first value that is not a finite number above zero."""
    for name, value in values.items():
        if not value > 0 or not math.isfinite(value):
            raise ValueError(f"{name} is {value}; expected a finite number above 0")


def check_not_negative(**values: float) -> None:
    """ValueError naming the first value that is not a finite number of at least zero."""
    for name, value in values.items():
        if not value >= 0 or not math.isfinite(value):
            raise ValueError(f"{name} is {value}; expected a finite number of at least 0")


def is_whole(value: object) -> bool:
    """Whether it is a whole number; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_whole(least: int = 1, **values: int) -> None:
    """ValueError naming the first value that is not a whole number of at least `least`."""
    for name, value in values.items():
        if not is_whole(value) or value < least:
            raise ValueError(f"{name} is {value}; expected a whole number of at least {least}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def check_sizes(
    in_features: int, hidden_sizes: Iterable[int], num_classes: int, names: tuple[str, str] = ("in_features", "hidden_sizes")
) -> None:
    """ValueError unless every layer size is a positive integer and there is at least one hidden layer and two classes."""
    sizes = list(hidden_sizes)
    if not sizes or any(not is_whole(size) or size < 1 for size in sizes):
        raise ValueError(f"{names[1]} is {sizes}; expected at least one whole number above 0, such as (1000, 1000)")
    check_whole(**{names[0]: in_features})
    check_whole(least=2, num_classes=num_classes)
