from .engine.sampling import RaceConfig
from .search import beam, budget_forcing, ffs_generate, last_finish, majority_vote
from .serving.client import AsyncFFS, FFSError, ffs_request
from .theory import Diagnosis, Replay, diagnose, expected_min, ffs_accuracy, replay
from .traces import FFSResult, Trace

__all__ = [
    "AsyncFFS", "Diagnosis", "FFSError", "FFSResult", "RaceConfig", "Replay", "Trace", "beam", "budget_forcing", "diagnose", "expected_min",
    "ffs_accuracy", "ffs_generate", "ffs_request", "last_finish", "majority_vote", "replay",
]  # fmt: skip
