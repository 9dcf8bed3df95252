"""fewer: the same machine learning with fewer backward passes, network calls, bits, bytes, parameters, samples and queries.

`fewer list` shows the methods, `fewer run SLUG` compares one with what it replaces on this machine. In Python, each method is
`fewer.<area>.<method>`, and an area offers its methods' public names; nothing heavy is imported before a name is touched.

>>> import fewer
>>> fewer.papers.find("backprop-free-mlps").area
'forward_only'
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
