from .decisions import SolverSchedule, StepDecision
from .evolution import SearchSpace
from .search import Objective, Predictor, ScheduleSearch, SearchResult, evaluate
from .solver import USFScheduler, sample

__all__ = [
    "Objective",
    "Predictor",
    "ScheduleSearch",
    "SearchResult",
    "SearchSpace",
    "SolverSchedule",
    "StepDecision",
    "USFScheduler",
    "evaluate",
    "sample",
]
