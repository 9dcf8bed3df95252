"""DPM-Solver-v3: diffusion sampling in 5 to 12 network calls, with the linear part of the network measured once.

Fast samplers solve the diffusion ODE as if the network were linear in noise or in data. Three curves over lambda = log(alpha / sigma)
(l, s, b: empirical model statistics, EMS), from Jacobian-vector products, say what it is; what they leave over is smaller and smoother:

    f = (sigma eps - l x) / alpha,   g = exp(-int s) f - int exp(-int s) b,
    x_t = alpha_t A [x_s / alpha_s - int E (g + B_s) dlambda],   A = exp(-int l),   E = exp(int (l + s)),

g is taken as a polynomial through the last points. When to use it: a fixed model is sampled often, in few steps. When not: another
model each time, more than 20 steps, or a model without a derivative.

Source: arXiv 2310.13268.

>>> import torch
>>> from fewer.diffusion import EMS, estimate_ems, sample
>>> from fewer.diffusion._shared import GaussianMixture, NoiseSchedule
>>> draw = torch.Generator().manual_seed(0)
>>> means = 0.5 * torch.randn(5, 4, generator=draw, dtype=torch.float64)
>>> mixture = GaussianMixture(means, torch.full((5,), 0.2).double(), torch.full((5, 4), 0.05).double())
>>> schedule = NoiseSchedule.edm(sigma_min=0.02, sigma_max=20.0)
>>> eps = lambda x, t: (x - mixture.denoiser(x, t)) / t  # a network would stand here
>>> ems = estimate_ems(eps, schedule, mixture.draw(256, draw), num_timesteps=60, num_samples=256, generator=draw, progress=False)
>>> noise = 20 * torch.randn(64, 4, generator=draw, dtype=torch.float64)
>>> exact = mixture.transport(noise, 20.0, 0.02)
>>> def error(ems):
...     return float((sample(eps, noise, schedule, ems, 6, corrector="full") - exact).square().mean().sqrt())
>>> error(ems) < 0.5 * error(EMS.data_prediction(ems.lambdas))
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
