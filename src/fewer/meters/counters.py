"""Counters that a method feeds (network calls, bytes on the wire, queries, ...), and backward passes, which torch is watched for."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

_open: ContextVar[tuple[Counter[str], ...]] = ContextVar("open counters", default=())


def count(name: str, n: float = 1) -> None:
    """Add n to the counter `name` of every open `counting()` or `measure()` block; costs next to nothing where none is open."""
    for counter in _open.get():
        counter[name] += n  # pyright: ignore[reportArgumentType] - a Counter may count in fractions


@contextlib.contextmanager
def counting() -> Iterator[Counter[str]]:
    """Collect what is counted inside the block; blocks may be nested, and each sees what is counted in it.

    "backward_passes" is counted for any code: each call of `Tensor.backward`, `torch.autograd.backward` or `torch.autograd.grad`
    (but not through a name that was bound to one of these functions before the block).

    Examples:
        >>> with counting() as counts:
        ...     count("queries", 2)
        >>> counts["queries"], counts["backward_passes"]
        (2, 0)
    """
    counter = Counter[str](backward_passes=0)
    token = _open.set((*_open.get(), counter))
    try:
        with _watched_backward_passes():
            yield counter
    finally:
        _open.reset(token)


@contextlib.contextmanager
def _watched_backward_passes() -> Iterator[None]:
    """Count what goes through torch's two doors to the backward pass; nothing to watch where torch is not loaded."""
    autograd = getattr(sys.modules.get("torch"), "autograd", None)
    if autograd is None or getattr(autograd.backward, "counts_backward_passes", False):
        yield
        return
    doors: dict[str, Callable[..., Any]] = {name: getattr(autograd, name) for name in ("backward", "grad")}
    for name, door in doors.items():
        setattr(autograd, name, _counted(door))
    try:
        yield
    finally:
        for name, door in doors.items():
            setattr(autograd, name, door)


def _counted(door: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(door)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count("backward_passes")
        return door(*args, **kwargs)

    counted.__dict__["counts_backward_passes"] = True
    return counted
