from . import smart_composites
from ._shared import LQR, PID, Trajectory, mass_spring_damper, simulate, tendon_finger, tune_lqr, tune_pid, van_der_pol
from .smart_composites import (
    CompiledController,
    CompiledNetwork,
    ForwardKinematics,
    PredictiveController,
    UnsupportedLayer,
    compile_controller,
    compile_to_c,
    excitation,
)

__all__ = [
    "LQR",
    "PID",
    "CompiledController",
    "CompiledNetwork",
    "ForwardKinematics",
    "PredictiveController",
    "Trajectory",
    "UnsupportedLayer",
    "compile_controller",
    "compile_to_c",
    "excitation",
    "mass_spring_damper",
    "simulate",
    "smart_composites",
    "tendon_finger",
    "tune_lqr",
    "tune_pid",
    "van_der_pol",
]
