from .compensation import compensate
from .ratios import CascadePolynomial, Ratios
from .scheduler import DCSolverMultistepScheduler
from .search import Trajectory, reference_trajectory, search_ratios

__all__ = [
    "CascadePolynomial",
    "DCSolverMultistepScheduler",
    "Ratios",
    "Trajectory",
    "compensate",
    "reference_trajectory",
    "search_ratios",
]
