"""Fine-tuning flow matching on reconstructions: a trained flow's few-step output, made exact where it is used.

Flow matching trains a velocity v without ever running the solver, so the error of its output is never seen; it grows like exp(L). The
K-step Euler map phi that will be deployed is differentiable, so the likelihood of data under N(phi(x0), s^2) can be raised itself:

    loss = |phi_theta(x0) - x1|^2 / (2 s^2) + (d / 2) log s^2,   x0 = the exact flow's latent of x1 (or fresh noise, for precise policies)

over all of v (FT-FM), or over a residual r alone, v frozen (ResFT-FM); r may be one that contracts for every value of its parameters.
When to use it: a flow policy or generator is sampled in 1 to 10 steps, always the same number. When not: the number of steps varies.

The pairing of x0 with x1, the residual's parameterisation and all rates are ours: the paper's could not be checked.

Source: arXiv 2510.02081.

>>> import torch
>>> from fewer.diffusion import flow_mle
>>> torch.manual_seed(0) and None
>>> class Exact(torch.nn.Module):  # the flow from N(0, 1) to N(0, 1/4), which a trained network would stand for
...     def __init__(self):
...         super().__init__()
...         self.scale = torch.nn.Parameter(torch.zeros(()))
...     def forward(self, t, x):
...         return (self.scale + (1.25 * t - 1) / ((1 - t) ** 2 + t**2 / 4))[:, None] * x
>>> field, data = Exact(), 0.5 * torch.randn(256, 2)
>>> tuned = flow_mle.finetune(field, data, steps=2, config=flow_mle.FineTuneConfig(updates=200, lr=0.02))
>>> latents = flow_mle.invert(field, data)
>>> before, after = ((flow_mle.odeint(v, latents, 2) - data).square().mean().item() for v in (field, tuned.field))
>>> after < 0.1 * before
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
