"""Importing this module does what is slow the first time, so that processes forked from this one need not: meters, torch's settings."""

import os
import sys
from types import TracebackType

from fewer.meters.energy import energy
from fewer.study.trial import make_torch_repeatable

with energy():
    pass

if "torch" in sys.modules:  # the study, which is imported before, uses it
    make_torch_repeatable()


_SERVER = os.getpid()


def _quiet_without_parent(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The server that forks trials reads what to fork from the run; a run that is killed in the middle of saying so leaves it an end of
    file, and nobody whom a traceback would help. What ends a trial is told as before."""
    if not (kind is EOFError and os.getpid() == _SERVER):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet_without_parent
