from .declaration import Scale, Study
from .engines import LocalEngine, RayEngine
from .figures import Bars, Curve, Difference, Figure, Groups, Tradeoff
from .races import Bench, RaceOutcome
from .recording import Record, make_record, read_record
from .results import Estimate, NotTestable, Results
from .runner import plan, run
from .spaces import Choice, LogUniform, Uniform
from .store import Store
from .trial import SealedTestData, Trial
from .verdicts import Verdict, judge

__all__ = [
    "Bars", "Bench", "Choice", "Curve", "Difference", "Estimate", "Figure", "Groups", "LocalEngine", "LogUniform", "NotTestable", "RaceOutcome", "RayEngine",
    "Record", "Results", "Scale", "SealedTestData", "Store", "Study", "Tradeoff", "Trial", "Uniform", "Verdict", "judge", "make_record", "plan",
    "read_record", "run",
]  # fmt: skip
