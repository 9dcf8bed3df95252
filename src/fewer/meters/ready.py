"""Importing this module makes the energy meter look around once, so that processes forked from this one need not."""

from fewer.meters.energy import energy

with energy():
    pass
