"""The loops of a fit: epochs over batches until the best state has stood long enough, or a number of steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fewer.fitting.examples import Batches
from fewer.fitting.history import Callback, Epoch, History
from fewer.fitting.states import BestState


def fit_stages(
    stages: Sequence[str],
    epoch_of: Callable[[], Sequence[float]],
    validate: Callable[[], Sequence[tuple[float, float]]],
    *,
    state: BestState,
    epochs: int,
    history: History,
    callbacks: Iterable[Callback] = (),
    score: Callable[[Epoch], float] = lambda line: -line.validation_loss,
) -> None:
    """Train stages that run side by side: at most `epochs` epochs, the best state kept.

    Args:
        stages: their names in the history; the last one decides when to stop.
        epoch_of: trains for one epoch and gives the mean loss of each stage (`over_batches` makes one of a step).
        validate: gives (loss, accuracy) on the validation data for each stage, (nan, nan) without any.
        state: what is kept, and how long without improvement.
        score: how good the last stage's epoch was; higher is better.
    """
    with state:
        for epoch in range(1, epochs + 1):
            for stage, loss, validation in zip(stages, epoch_of(), validate(), strict=True):
                history.add(stage, epoch, loss, validation, callbacks)
            if state.update(score(history.epochs[-1]), epoch):
                break
    history.best.update(dict.fromkeys(stages, state.best_epoch))


def over_batches(step: Callable[[Tensor, Tensor], Tensor], batches: Callable[[], Batches]) -> Callable[[], list[float]]:
    """An epoch for `fit_stages`: `step` takes a batch (x, y), updates the weights and returns its mean loss, one or one a stage."""

    def epoch() -> list[float]:
        total, rows = torch.zeros(()), 0
        for x, y in batches():
            losses = step(x, y).detach()
            total, rows = total.to(losses.device) + losses * len(y), rows + len(y)
        return (total / rows).reshape(-1).tolist()

    return epoch


def fit_steps(
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[..., Tensor],
    batches: Iterable[object],
    steps: int,
    *,
    schedule: Callable[[int], float] | None = None,
    clip: float | None = None,
    tell: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Take a number of steps, going round the batches; the loss of each.

    Args:
        optimizer: updates its parameters.
        loss_of: a batch's loss, a scalar with a graph; a batch that is a tuple is unpacked.
        batches: gone through again and again, or an iterator with as many as there are steps.
        schedule: step (from 0) -> the factor on each group's learning rate.
        clip: the largest norm that the gradients together may have.
        tell: called with the step (from 1) and its loss.

    Raises:
        FloatingPointError: a loss is not finite; the state before that step is kept.
        ValueError: the batches end too early.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor(1.0))
        >>> optimizer = torch.optim.SGD([weight], lr=0.25)
        >>> fit_steps(optimizer, lambda x: (weight * x) ** 2, [torch.tensor(1.0)], 3)
        [1.0, 0.25, 0.0625]
    """
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    rates = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    for step, batch in zip(range(steps), _round_and_round(batches), strict=False):
        with torch.enable_grad():  # whoever only asks for a trained model may stand in no_grad
            loss = loss_of(*batch) if isinstance(batch, tuple) else loss_of(batch)
        if not math.isfinite(value := loss.item()):
            raise FloatingPointError(
                f"the loss is {value} in step {step + 1}; expected a finite number, the state before is kept: try a lower lr"
            )
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        if schedule is not None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * schedule(step)
        optimizer.step()
        losses.append(value)
        if tell is not None:
            tell(step + 1, value)
    optimizer.zero_grad()
    return losses


def _round_and_round(batches: Iterable[object]) -> Iterator[object]:
    """The batches again and again; ValueError where a round has none."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("there are no batches left; expected at least one a round: give a list or a DataLoader instead of an iterator")


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
