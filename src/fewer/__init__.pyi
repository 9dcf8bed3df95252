from . import (
    control,
    data,
    diffusion,
    errors,
    federated,
    forward_only,
    graphs,
    language,
    lowbit,
    meters,
    optimization,
    papers,
    report,
    signals,
    study,
    tasks,
)

__version__: str
__all__ = [
    "control", "data", "diffusion", "errors", "federated", "forward_only", "graphs", "language", "lowbit", "meters", "optimization", "papers", "report",
    "signals", "study", "tasks",
]  # fmt: skip
