"""Optimisers and pruning.

>>> import torch
>>> from fewer import optimization
>>> optimization.InverseFisher(torch.tensor([[2.0, 0.0]]), damping=1.0) @ torch.ones(2)
tensor([0.2000, 1.0000])
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
