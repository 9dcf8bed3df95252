"""Prediction and control on small computers.

>>> from fewer import control
>>> control.mass_spring_damper().inputs
1
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
