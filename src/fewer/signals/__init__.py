"""Transforms of signals and of functions: fewer samples, fewer queries.

>>> import numpy as np
>>> from fewer import signals
>>> signals.fwht(np.array([1.0, -1.0, 1.0, -1.0]))
array([0., 1., 0., 0.])
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
