"""A training loop with early stopping on a validation score, and the history that it leaves."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from fewer.graphs.forward_gnn.checks import check_positive, check_whole
from fewer.meters import memory_for


class Epoch(NamedTuple):
    """One line of a fit's history."""

    stage: str  # what was being trained: "layer 1", ..., or "network" where all layers train side by side
    epoch: int  # from 1, within the stage
    train_loss: float  # before the epoch's update; the mean over the layers where they train side by side
    validation: float  # accuracy of the nodes or AUC of the pairs, after the update; nan where it was not looked at
    seconds: float  # since the fit began


Callback = Callable[[Epoch], None]


@dataclass
class History:
    """What happened during a fit.

    Attributes:
        epochs: one `Epoch` per stage and epoch, in order.
        best: the epoch whose state each stage kept (its last one without validation data).
        seconds: wall time of the whole fit.
    """

    epochs: list[Epoch] = field(default_factory=list)
    best: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    _started: float = field(default_factory=time.perf_counter, repr=False)

    def best_validation(self, stage: str | None = None) -> float:
        """The validation score of the state that the stage kept; by default of the last stage."""
        stage = stage or self.epochs[-1].stage
        return next(line.validation for line in self.epochs if (line.stage, line.epoch) == (stage, self.best[stage]))

    def add(self, stage: str, epoch: int, train_loss: float, validation: float) -> Epoch:
        """Note one epoch."""
        self.seconds = time.perf_counter() - self._started
        self.epochs.append(Epoch(stage, epoch, train_loss, validation, self.seconds))
        return self.epochs[-1]

    def stop_clock(self) -> History:
        """The same history, its `seconds` up to now."""
        self.seconds = time.perf_counter() - self._started
        return self


@dataclass(frozen=True)
class Schedule:
    """How long a stage trains; the defaults are the paper's.

    Args:
        epochs: at most, for each stage.
        patience: epochs without a better validation score before a stage stops; None never stops and keeps the last state.
        lr: learning rate of Adam, which starts afresh for each layer.
        validate_every: epochs from one look at the validation nodes to the next.
        callbacks: each is called with every `Epoch` as it ends.

    Raises:
        ValueError: a value that cannot be used.
    """

    epochs: int = 1000
    patience: int | None = 100
    lr: float = 1e-3
    validate_every: int = 2
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        check_whole(epochs=self.epochs, validate_every=self.validate_every)
        check_positive(lr=self.lr)
        if self.patience is not None:
            check_whole(patience=self.patience)


def train(
    stage: str,
    modules: Iterable[nn.Module],
    step: Callable[[], float],
    validate: Callable[[], float] | None,
    schedule: Schedule,
    history: History,
) -> None:
    """Step until the validation score has not risen for `patience` epochs; then put the best state of the modules back.

    Args:
        step: updates the weights and returns the loss before the update.
        validate: gives the validation score, higher is better; None where there is nothing to validate on.

    Raises:
        FloatingPointError: a loss is not finite; the best state so far is put back.
    """
    modules = list(modules)
    best_score, best_epoch = -math.inf, 0
    with memory_for("kept states"):
        best_states = [copy.deepcopy(module.state_dict()) for module in modules]

    def restore() -> None:
        for module, state in zip(modules, best_states, strict=True):
            module.load_state_dict(state)

    selects = validate is not None and schedule.patience is not None
    for epoch in range(1, schedule.epochs + 1):
        loss = step()
        if not math.isfinite(loss):
            restore()
            raise FloatingPointError(
                f"the loss of {stage} is {loss} in epoch {epoch}; expected a finite number, the best state so far is kept: try a lower lr"
            )
        looks = validate is not None and (epoch % schedule.validate_every == 0 or epoch == schedule.epochs)
        score = validate() if validate is not None and looks else math.nan
        line = history.add(stage, epoch, loss, score)
        if selects and looks and score > best_score:
            best_score, best_epoch = score, epoch
            with memory_for("kept states"):
                best_states = [copy.deepcopy(module.state_dict()) for module in modules]
        for callback in schedule.callbacks:
            callback(line)
        if selects and schedule.patience is not None and epoch - best_epoch >= schedule.patience:
            break
    if selects:
        restore()
    history.best[stage] = best_epoch if selects else history.epochs[-1].epoch
