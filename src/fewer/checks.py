"""What is refused at the door, in one line of three parts: what was given, what was expected, what to do.

A check names its value by the keyword it is given under: `check_positive(lr=lr)` says "lr is -1; expected ...". Names that are no
identifiers (a command's `--lr`) travel as `**{"--lr": lr}`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable
from typing import Any

from fewer.papers import did_you_mean


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, Python's or NumPy's; True and False are none.

    >>> is_whole(3), is_whole(3.0), is_whole(True)
    (True, False, False)
    """
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite real number, Python's or NumPy's; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_whole(least: int = 1, *, optional: Iterable[str] = (), **values: Any) -> None:
    """ValueError naming the first value that is not a whole number of at least `least`.

    Args:
        least: the smallest that will do.
        optional: names that may also be None.

    >>> check_whole(epochs=3, batch_size=1)
    >>> check_whole(optional=["patience"], patience=None)
    >>> check_whole(least=2, classes=1)
    Traceback (most recent call last):
    ...
    ValueError: classes is 1; expected a whole number of at least 2
    """
    may_be_none = set(optional)
    for name, value in values.items():
        if value is None and name in may_be_none:
            continue
        if not is_whole(value) or value < least:  # pyright: ignore[reportOptionalOperand]
            raise ValueError(f"{name} is {value!r}; expected a whole number of at least {least}")


def check_positive(**values: Any) -> None:
    """ValueError naming the first value that is not a finite number above zero."""
    for name, value in values.items():
        if not is_number(value) or value <= 0:
            raise ValueError(f"{name} is {value!r}; expected a finite number above 0")


def check_not_negative(**values: Any) -> None:
    """ValueError naming the first value that is not a finite number of at least zero."""
    for name, value in values.items():
        if not is_number(value) or value < 0:
            raise ValueError(f"{name} is {value!r}; expected a finite number of at least 0")


def check_share(*, ends: bool = True, **values: Any) -> None:
    """ValueError naming the first value that is not a share of a whole: a number from 0 to 1 (`ends=False`: between them)."""
    for name, value in values.items():
        if not is_number(value) or not (0 <= value <= 1 if ends else 0 < value < 1):
            raise ValueError(f"{name} is {value!r}; expected a number {'from 0 to 1' if ends else 'between 0 and 1'}")


def check_choice(choices: Collection[Any], **values: Any) -> None:
    """ValueError naming the first value that is not one of the choices, and the nearest of them.

    >>> check_choice(["mean", "sum"], reduction="men")
    Traceback (most recent call last):
    ...
    ValueError: reduction is 'men'; expected one of mean, sum: did you mean 'mean'?
    """
    for name, value in values.items():
        if value not in choices:
            near = did_you_mean(value, [each for each in choices if isinstance(each, str)]) if isinstance(value, str) else ""
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}{near}")
