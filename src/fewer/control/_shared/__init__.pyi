from .plants import Controller, Plant, Trajectory, mass_spring_damper, simulate, tendon_finger, van_der_pol
from .regulators import LQR, PID, tune_lqr, tune_pid

__all__ = [
    "LQR",
    "PID",
    "Controller",
    "Plant",
    "Trajectory",
    "mass_spring_damper",
    "simulate",
    "tendon_finger",
    "tune_lqr",
    "tune_pid",
    "van_der_pol",
]
