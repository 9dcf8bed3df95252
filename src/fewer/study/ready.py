"""Importing this module does what is slow the first time, so that processes forked from this one need not: meters, torch's settings."""

import sys

from fewer.meters.energy import energy
from fewer.study.trial import make_torch_repeatable

with energy():
    pass

if "torch" in sys.modules:  # the study, which is imported before, uses it
    make_torch_repeatable()
