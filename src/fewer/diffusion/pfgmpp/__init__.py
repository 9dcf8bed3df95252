"""PFGM++: a diffusion model whose noise has a heavier tail, so that it bears the errors of its sampler and of its weights.

Data are charges in N + D dimensions; the D extra ones count by their norm r = sigma sqrt(D) alone. Everything of EDM stays but the noise:

    x = y + sigma g sqrt(D / c),   g ~ N(0, I_N),   c ~ chi-square(D), one a sample,
    loss = lambda(sigma) ||D_theta(x; sigma) - y||^2,   dx / dsigma = (x - D_theta(x; sigma)) / sigma,

in training and in the prior. D = math.inf is EDM, D = 1 is PFGM. When to use it: a diffusion model is trained, and will be sampled in rough
conditions. When not: a trained model stands (it must be trained for its D), or samples are drawn exactly and in many steps.

Source: arXiv 2302.04265.

>>> import torch
>>> from fewer.diffusion import pfgmpp
>>> data = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).double()
>>> def denoiser(x, sigma):  # a network trained by `PFGMPPLoss(D=16)` would stand here
...     return pfgmpp.posterior_mean(x, sigma, data, D=16)
>>> loss = pfgmpp.PFGMPPLoss(D=16)(denoiser, data)
>>> loss.shape
torch.Size([200])
>>> ends = pfgmpp.sample(denoiser, (50, 2), D=16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
>>> bool(torch.cdist(ends, data).amin(1).max() < 1e-3)
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
