"""DC-Solver: a predictor-corrector sampler whose buffered network outputs are compensated by one searched number a step.

UniPC corrects the state but keeps the network's output at the uncorrected one; recomputing would double the calls. Before each predictor
the newest output is replaced by what the last three say at a slightly shifted time:

    m_i <- sum_k m_{i-k} prod_{l != k} (t' - t_{i-l}) / (t_{i-k} - t_{i-l}),   t' = t_{i-1} + rho_i (t_i - t_{i-1})

rho_i is found on ten noises, or predicted by a polynomial in the number of steps and the guidance scale. When to use it: a fixed model is
sampled often, with 5 to 10 calls. When not: more than 20 calls are affordable, or a better spacing of the steps gains more.

Source: arXiv 2409.03755.

>>> import torch
>>> from fewer.diffusion import DCSolverMultistepScheduler, reference_trajectory, search_ratios
>>> from fewer.diffusion._shared import GaussianMixture, NoiseSchedule
>>> draw = torch.Generator().manual_seed(0)
>>> means = 0.5 * torch.randn(5, 4, generator=draw, dtype=torch.float64)
>>> mixture = GaussianMixture(means, torch.full((5,), 0.2).double(), torch.full((5, 4), 0.05).double())
>>> scheduler = DCSolverMultistepScheduler()
>>> schedule = NoiseSchedule.from_diffusers(scheduler)
>>> def model(x, t):  # a network that predicts noise would stand here
...     alpha, sigma = schedule.alpha(schedule.time(t)), schedule.sigma(schedule.time(t))
...     return (x - alpha * mixture.denoiser(x / alpha, sigma / alpha)) / sigma
>>> noise = torch.randn(10, 4, generator=draw, dtype=torch.float64)
>>> ratios = search_ratios(model, noise, reference_trajectory(model, noise, scheduler, 6, 200), scheduler, 6)
>>> other = torch.randn(100, 4, generator=draw, dtype=torch.float64)
>>> exact = reference_trajectory(model, other, scheduler, 6, 200).states[-1]
>>> def error(scheduler):
...     scheduler.set_timesteps(6)
...     x = other
...     for t in scheduler.timesteps:
...         x = scheduler.step(model(x, t), t, x).prev_sample
...     return float((x - exact).square().mean())
>>> error(DCSolverMultistepScheduler(ratios=ratios)) < 0.8 * error(scheduler)
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
