"""The ODE sampler: EDM's grid and Heun's method, from the heavy-tailed prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from fewer.checks import check_choice, check_not_negative, check_positive, check_whole
from fewer.diffusion._shared.prediction import at_least_single
from fewer.diffusion.pfgmpp.loss import Denoiser, answer, check_range
from fewer.diffusion.pfgmpp.perturbation import student_t_noise
from fewer.fitting import evaluating

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0  # EDM's, which alignment keeps
SOLVERS = ("heun", "euler")


def noise_grid(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Float64[Tensor, "steps_plus_1"]:
    """sigma_max to sigma_min in equal steps of the rho-th root, then 0."""
    check_whole(least=2, steps=steps)
    check_range(sigma_min, sigma_max)
    check_positive(rho=rho)
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    roots = sigma_max ** (1 / rho) + share * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    return torch.cat([roots**rho, torch.zeros(1, dtype=torch.float64)])


def slope(x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
    """dx / dsigma = (x - D(x; sigma)) / sigma: E_x / E_r of the field, as r = sigma sqrt(D)."""
    return (x - denoised.to(x.dtype)) / sigma


def moved(x: Tensor, d: Tensor, sigma: float, following: float) -> Tensor:
    """The state after a step along d."""
    return x.add(d, alpha=following - sigma)


def check_finite(x: Tensor, step: int, sigma: float) -> None:
    """FloatingPointError naming the step where the state is not finite."""
    if not math.isfinite(float(x.sum(dtype=torch.float64))):
        raise FloatingPointError(
            f"the state is not finite after step {step} (sigma = {sigma:.4g}); expected finite numbers: look at the denoiser's answers there"
        )


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    shape: Sequence[int],
    D: float,
    steps: int = 18,
    sigma_min: float = SIGMA_MIN,
    sigma_max: float = SIGMA_MAX,
    rho: float = RHO,
    solver: str = "heun",
    generator: torch.Generator | None = None,
    *,
    return_trajectory: bool = False,
    injected: float = 0.0,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    **cond: Any,
) -> Float64[Tensor, "*steps_plus_1 B *shape"]:
    """Samples of a denoiser that was trained with `PFGMPPLoss(D)`: EDM's ODE, which stays the same, from sigma_max g sqrt(D / c).

    Args:
        denoiser: called as `denoiser(x, sigma, **cond)`, sigma [B]; in eval mode meanwhile, where it is a module.
        shape: (B, ...).
        D: that it was trained with; math.inf begins with Gaussian noise.
        steps: n, at least 2; 2 n - 1 network calls by "heun", n by "euler".
        sigma_min, sigma_max, rho: of the grid; the prior has the same sigma_max.
        solver: "heun" or "euler".
        generator: of all noise.
        return_trajectory: all states [steps + 1, B, ...], the noise first and the sample last, instead of the sample.
        injected: alpha of the robustness protocol: alpha sigma_i N(0, I) is added to the state before every step.
        dtype: that the denoiser is called in; by default its first parameter's, and float32 for a module without and a plain function.
        device: of the states; by default the generator's.

    Returns:
        float64, the type that states are kept in.

    Raises:
        ValueError: a setting out of range, or a denoiser's answer of another shape than x.
        FloatingPointError: a state is not finite; the message names the step.

    Examples:
        >>> ends = sample(lambda x, sigma: 0.5 + 0 * x, (3, 2), D=64, generator=torch.Generator().manual_seed(0))
        >>> bool((ends - 0.5).abs().max() < 1e-6)
        True
    """
    check_choice(SOLVERS, solver=solver)
    check_not_negative(injected=injected)
    grid = noise_grid(steps, sigma_min, sigma_max, rho).tolist()
    first = next(denoiser.parameters(), None) if isinstance(denoiser, nn.Module) else None
    called_in = dtype or (first.dtype if first is not None else torch.float32)
    if not called_in.is_floating_point:
        raise ValueError(f"dtype is {called_in}; expected a floating-point one, as the denoiser's weights are")
    x = sigma_max * student_t_noise(shape, D, generator, torch.float64, device)
    states = [x]

    def denoised(x: Tensor, sigma: float) -> Tensor:
        level = torch.full((len(x),), sigma, dtype=at_least_single(called_in), device=x.device)
        return answer(denoiser(x.to(called_in), level, **cond), x)

    with evaluating(*([denoiser] if isinstance(denoiser, nn.Module) else [])):
        for i, (sigma, following) in enumerate(pairwise(grid), start=1):
            if injected:
                x = x + injected * sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            d = slope(x, denoised(x, sigma), sigma)
            ahead = moved(x, d, sigma, following)
            if solver == "heun" and following > 0:
                d = (d + slope(ahead, denoised(ahead, following), following)) / 2
                ahead = moved(x, d, sigma, following)
            x = ahead
            check_finite(x, i, following)
            if return_trajectory:
                states.append(x)
    return torch.stack(states) if return_trajectory else x
