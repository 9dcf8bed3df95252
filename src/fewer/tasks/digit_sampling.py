"""Sampling along given noise levels by diffusers' schedulers: the one loop, and the converged solution that errors are taken from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

Denoise = Callable[[Tensor, Any], Tensor]  # (x, sigma) -> E[clean | x], x = clean + sigma * noise
SIGMA_MAX, SIGMA_MIN = 80.0, 0.02
REFERENCE_STEPS = 300


@torch.no_grad()
def follow_levels(
    scheduler: Any, denoise: Denoise, x: Float[Tensor, "B *shape"], sigmas: Float64[Tensor, "steps_plus_1"]
) -> Float[Tensor, "B *shape"]:
    """x of deviation sigmas[0] brought to sigmas[-1] by a scheduler whose `set_timesteps` was called, one call of `denoise` a step."""
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    alphas = (1 + sigmas**2).rsqrt().tolist()  # diffusers' states are alpha x, alpha^2 + (alpha sigma)^2 = 1
    state = x * alphas[0]
    for t, sigma, alpha in zip(scheduler.timesteps, sigmas[:-1].tolist(), alphas, strict=False):
        eps = (state / alpha - denoise(state / alpha, sigma)) / sigma
        state = scheduler.step(eps, t, state, return_dict=False)[0]
    return state / alphas[-1]


def unipc(
    denoise: Denoise,
    x: Float[Tensor, "B *shape"],
    steps: int = REFERENCE_STEPS,
    sigma_max: float = SIGMA_MAX,
    sigma_min: float = SIGMA_MIN,
) -> Float[Tensor, "B *shape"]:
    """From noise x of deviation sigma_max to sigma_min by UniPC of order 3, steps of equal length in log sigma."""
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        solver_order=3, prediction_type="epsilon", final_sigmas_type="sigma_min", use_exponential_sigmas=True
    )
    scheduler.set_timesteps(steps + 1)  # one more than is taken, so that none is of a lower order for being the last
    sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps + 1, dtype=torch.float64).exp()
    return follow_levels(scheduler, denoise, x, sigmas)
