"""What methods of the diffusion area share: noise schedules, what a network predicts, and a mixture of Gaussians whose flow is known.

Everywhere x_t = alpha x_0 + sigma noise, and lambda = log(alpha / sigma) rises while sampling.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
