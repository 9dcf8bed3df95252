from . import data, errors, forward_only, meters, papers, report, study, tasks

__version__: str
__all__ = ["data", "errors", "forward_only", "meters", "papers", "report", "study", "tasks"]
