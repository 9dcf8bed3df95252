"""Numbers of few bits: formats, casts, and what they cost a model.

>>> import torch
>>> from fewer import lowbit
>>> packed = lowbit.quantize(torch.tensor([0.1, 0.9, -3.2, 7.0]), "mxfp4")
>>> packed.nbytes, packed.dequantize()
(3, tensor([ 0.,  1., -3.,  6.]))
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
