from .ems import EMS, model_hash
from .estimation import estimate_ems
from .local_update import Point, local_update
from .multistep import SolverConfig, preset, sample
from .scheduler import DPMSolverV3Scheduler

__all__ = [
    "EMS",
    "DPMSolverV3Scheduler",
    "Point",
    "SolverConfig",
    "estimate_ems",
    "local_update",
    "model_hash",
    "preset",
    "sample",
]
