"""Errors that a user can mend: shown as one line, exit status 2."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """A mistake that the user can mend; its message says what was given, what was expected, and what to do."""


class WorkFailed(Exception):
    """Work that was asked for came to grief through no mistake of the user's words: shown as it stands, exit status 1."""


class DataUnavailable(UserError):
    """A data set could be had from none of its sources; the message names them all, each with why it failed."""


class MissingExtra(UserError):
    """A library is not installed; the message has the command that installs it."""


def require(module: str, extra: str) -> ModuleType:
    """The module, imported.

    Args:
        module: its import name, such as "optuna".
        extra: fewer's extra that brings it, such as "tuning".

    Raises:
        MissingExtra: it is not installed.

    Examples:
        >>> require("json", "tuning").dumps([1])
        '[1]'
        >>> require("no_such_library", "tuning")
        Traceback (most recent call last):
        ...
        fewer.errors.MissingExtra: no_such_library is not installed; install it with: pip install 'fewer[tuning]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingExtra(f"{module} is not installed; install it with: pip install 'fewer[{extra}]'") from error
