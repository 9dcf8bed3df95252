"""A side-by-side comparison: a study declares a task, arms and claims; trials run each arm with each seed; a store keeps the figures.

This room knows no method. A method's `study.py` declares `study = Study(...)`; `fewer run SLUG` does the rest.

>>> from fewer.study import Study
>>> study = Study("guess", question="Which guess is nearer?", baseline="zero")
>>> @study.arm("zero")
... def zero(task, trial): trial.log("error", 3.0)
>>> list(study.arms)
['zero']
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
