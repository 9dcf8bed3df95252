"""Importing this module does what is slow the first time, so that processes forked from this one need not: meters, torch's settings."""

import pickle
import sys
from types import TracebackType

from fewer.meters.energy import energy
from fewer.study.trial import make_torch_repeatable

with energy():
    pass

if "torch" in sys.modules:  # the study, which is imported before, uses it
    make_torch_repeatable()


CUT_OFF = EOFError, pickle.UnpicklingError


def _quiet_without_parent(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The server that forks trials, and a process just forked, read what to do from the run; a run that ends in the middle of saying so
    leaves them an order cut off, and nobody whom a traceback would help. What ends a trial does not come here, and is told as before."""
    if not issubclass(kind, CUT_OFF):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet_without_parent
