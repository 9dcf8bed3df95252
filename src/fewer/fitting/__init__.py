"""What every method that trains shares: histories, states that are kept, loops, batches. This room knows no method.

>>> from fewer.fitting import History
>>> History().epochs
[]
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
