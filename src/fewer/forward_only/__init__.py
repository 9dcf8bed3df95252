"""Learning without backward passes.

>>> from fewer import forward_only
>>> forward_only.MonoForwardMLP(in_features=8, hidden_sizes=(4,), num_classes=2).num_classes
2
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
