"""Language models: fewer parameters, bytes and seconds.

>>> from fewer import language
>>> language.allocate([0.1, 0.3], ratio=0.5, intermediate_size=64, multiple_of=16)
[16, 48]
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
