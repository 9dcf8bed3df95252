from . import dpm_solver_v3
from .dpm_solver_v3 import EMS, DPMSolverV3Scheduler, Point, SolverConfig, estimate_ems, local_update, model_hash, preset, sample

__all__ = [
    "EMS",
    "DPMSolverV3Scheduler",
    "Point",
    "SolverConfig",
    "dpm_solver_v3",
    "estimate_ems",
    "local_update",
    "model_hash",
    "preset",
    "sample",
]
