"""What methods of control share: plants to steer, regulators they are held against, C compilers and an emulated microcontroller."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
