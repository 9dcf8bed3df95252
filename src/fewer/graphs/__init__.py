"""Learning on graphs.

>>> from fewer import graphs
>>> graphs.ForwardGNN(in_channels=8, hidden_channels=16, num_layers=2, num_classes=3).widths
[16, 16]
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
