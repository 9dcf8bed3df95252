from . import dc_solver, dpm_solver_v3
from .dc_solver import CascadePolynomial, DCSolverMultistepScheduler, Ratios, Trajectory, compensate, reference_trajectory, search_ratios
from .dpm_solver_v3 import EMS, DPMSolverV3Scheduler, Point, SolverConfig, estimate_ems, local_update, model_hash, preset, sample

__all__ = [
    "EMS",
    "CascadePolynomial",
    "DCSolverMultistepScheduler",
    "DPMSolverV3Scheduler",
    "Point",
    "Ratios",
    "SolverConfig",
    "Trajectory",
    "compensate",
    "dc_solver",
    "dpm_solver_v3",
    "estimate_ems",
    "local_update",
    "model_hash",
    "preset",
    "reference_trajectory",
    "sample",
    "search_ratios",
]
