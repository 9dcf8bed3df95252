"""Sampling and training diffusion models.

>>> from fewer import diffusion
>>> diffusion.preset(6)["corrector"]
'full'
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
