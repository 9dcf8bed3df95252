"""USF and S3: a diffusion sampler as a list of decisions, searched for your checkpoint and number of network calls.

Every fast solver expands some prediction (noise, data, or what DPM-Solver-v3's statistics leave of the noise) about some point by some
derivatives, integrates that exactly, and may correct the state. Written as independent decisions a step, with the times, they can be
searched: evolution on the distance to a converged solution, where a small predictor ranks thousands of candidates so that few are scored.

    x_t = (sigma_t / sigma_s) x_s + alpha_t sum_k h^(k+1) phi_(k+1)(-h) d^(k)     (data; likewise for noise and v3)

When to use it: a fixed model is sampled often, with 3 to 10 calls. When not: each model is sampled seldom, or 20 calls are affordable.

Source: arXiv 2312.07243.

>>> import torch
>>> from fewer.diffusion import ScheduleSearch, SearchSpace, SolverSchedule
>>> from fewer.diffusion._shared import GaussianMixture, NoiseSchedule
>>> from fewer.diffusion.solver_search import Objective, sample
>>> draw = torch.Generator().manual_seed(0)
>>> means = 0.5 * torch.randn(5, 4, generator=draw, dtype=torch.float64)
>>> mixture = GaussianMixture(means, torch.full((5,), 0.2).double(), torch.full((5, 4), 0.05).double())
>>> noise_schedule = NoiseSchedule.edm(0.02, 20.0)
>>> eps = lambda x, t: (x - mixture.denoiser(x, t)) / t  # a network would stand here
>>> noises = 20 * torch.randn(64, 4, generator=draw, dtype=torch.float64)
>>> objective = Objective(eps, noises, mixture.transport(noises, 20.0, 0.02), noise_schedule)
>>> found = ScheduleSearch(SearchSpace(noise_schedule), objective, nfe=5, budget=120, predictor=False).run()
>>> other = 20 * torch.randn(200, 4, generator=draw, dtype=torch.float64)
>>> exact = mixture.transport(other, 20.0, 0.02)
>>> def error(schedule):
...     return float((sample(eps, other, schedule, noise_schedule) - exact).square().mean().sqrt())
>>> error(found.best) < 0.8 * error(SolverSchedule.preset("dpm++2m", 5, noise_schedule))
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
