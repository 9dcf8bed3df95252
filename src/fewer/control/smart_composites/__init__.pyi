from .baselines import LQR, PID, tune_lqr, tune_pid
from .compiler import CompiledNetwork, compile_to_c
from .controller import PredictiveController
from .controller_c import CompiledController
from .kinematics import ForwardKinematics, excitation
from .network import UnsupportedLayer
from .plants import Trajectory, mass_spring_damper, simulate, tendon_finger, van_der_pol

__all__ = [
    "LQR",
    "PID",
    "CompiledController",
    "CompiledNetwork",
    "ForwardKinematics",
    "PredictiveController",
    "Trajectory",
    "UnsupportedLayer",
    "compile_to_c",
    "excitation",
    "mass_spring_damper",
    "simulate",
    "tendon_finger",
    "tune_lqr",
    "tune_pid",
    "van_der_pol",
]
