"""What happened during a fit: a line an epoch, and who is told of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Self


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
