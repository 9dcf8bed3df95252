"""A training loop with early stopping on a validation score, and the history that it leaves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from fewer.checks import check_positive, check_whole
from fewer.fitting.states import copy_of, evaluating, put_back


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
        check_whole(optional=["patience"], patience=self.patience)
        check_positive(lr=self.lr)


def train(
    stage: str,
    modules: Sequence[nn.Module],
    step: Callable[[], float],
    validate: Callable[[], float] | None,
    schedule: Schedule,
    history: History,
) -> None:
    """Step until the validation score has not risen for `patience` epochs; then put the best state of the modules back.

    Steps run in train mode, validation in eval mode, and the modules are given their own mode back. A stage ends at a look at the
    validation data alone, so that at least one state has been judged; without a score that is a number the last state is kept.

    Args:
        step: updates the weights and returns the loss before the update.
        validate: gives the validation score, higher is better; None where there is nothing to validate on.

    Raises:
        FloatingPointError: a loss is not finite; the best state so far is put back.
    """
    best_score, best_epoch = -math.inf, 0

    best_states = copy_of(modules)
    selects = validate is not None and schedule.patience is not None
    with evaluating(*modules):  # for the mode that is given back
        for epoch in range(1, schedule.epochs + 1):
            for module in modules:
                module.train()
            loss = step()
            if not math.isfinite(loss):
                put_back(modules, best_states)
                raise FloatingPointError(
                    f"the loss of {stage} is {loss} in epoch {epoch}; expected a finite number, the best state so far is kept: try a lower lr"
                )
            score = math.nan
            if validate is not None and (epoch % schedule.validate_every == 0 or epoch == schedule.epochs):
                with evaluating(*modules), torch.no_grad():
                    score = validate()
            line = history.add(stage, epoch, loss, score)
            if selects and score > best_score:
                best_score, best_epoch, best_states = score, epoch, copy_of(modules)
            for callback in schedule.callbacks:
                callback(line)
            if selects and best_epoch and not math.isnan(score) and epoch - best_epoch >= (schedule.patience or 0):
                break
    if selects and best_epoch:
        put_back(modules, best_states)
    history.best[stage] = best_epoch or history.epochs[-1].epoch
