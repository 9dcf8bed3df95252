"""What several studies share and is made on the spot, then cached: a small language model, diffusion models of digits.

Each is built once on a machine from real data and kept under `fewer.data`'s cache folder (FEWER_CACHE moves it), in a folder that is
named by a hash of all that went into it: another recipe, other data or another interpreter's library give another folder.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
