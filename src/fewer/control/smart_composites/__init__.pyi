from .controller import PredictiveController
from .controller_c.compiled import CompiledController, compile_controller
from .kinematics import ForwardKinematics, excitation
from .to_c.compiled import CompiledNetwork
from .to_c.compiler import compile_to_c
from .to_c.network import UnsupportedLayer

__all__ = [
    "CompiledController",
    "CompiledNetwork",
    "ForwardKinematics",
    "PredictiveController",
    "UnsupportedLayer",
    "compile_controller",
    "compile_to_c",
    "excitation",
]
