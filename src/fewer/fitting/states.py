"""States that a fit keeps and gives back: the best one seen, or, where numbers overflow, the last finite one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from fewer.meters import memory_for


def all_finite(value: Tensor) -> bool:
    """Whether no entry is NaN or infinite. The sum tells, without a mask of the tensor's size, unless finite entries overflow it."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def copy_of(modules: Iterable[nn.Module]) -> list[dict[str, Tensor]]:
    """A copy of the modules' present states."""
    with memory_for("kept states"), torch.no_grad():
        return [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]


def put_back(modules: Iterable[nn.Module], states: Iterable[dict[str, Tensor]]) -> None:
    """Load kept states."""
    for module, state in zip(modules, states, strict=True):
        module.load_state_dict(state)


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Modules in eval mode, each part given its own mode back at the end.

    >>> layer = nn.Dropout()
    >>> with evaluating(layer):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    parts = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in parts:
            part.training = training


class LastState:
    """Keeps the last finite state, and puts it back where the block ends by FloatingPointError.

    Args:
        modules: the modules whose state is kept.

    Examples:
        >>> layer = nn.Linear(1, 1)
        >>> try:
        ...     with LastState([layer]) as last:
        ...         last.keep()
        ...         _ = layer.weight.data.fill_(float("nan"))
        ...         raise FloatingPointError
        ... except FloatingPointError:
        ...     bool(layer.weight.isfinite())
        True
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self._last = copy_of(self.modules)

    def keep(self) -> None:
        """Take the present state, which is finite, for the last one."""
        self._last = copy_of(self.modules)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None and issubclass(kind, FloatingPointError):
            put_back(self.modules, self._last)


class BestState:
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
