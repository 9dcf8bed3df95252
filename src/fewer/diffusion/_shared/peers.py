"""The samplers that a user has today, from diffusers, and what all of the area's samplers are judged by: the error after N network calls.

All take the same steps, equal in log sigma, from the same noises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fewer.checks import check_choice, check_whole
from fewer.diffusion._shared.problems import Flow
from fewer.diffusion._shared.spacing import noise_levels
from fewer.tasks.digit_sampling import Denoise, follow_levels

Solve = Callable[[Flow, Tensor, int], Tensor]  # (flow, noises, network calls) -> where they end
PEERS = {
    "dpm++2m": "DPM-Solver++ 2M",
    "dpm++3m": "DPM-Solver++ 3M",
    "unipc-bh1": "UniPC bh1",
    "unipc-bh2": "UniPC bh2",
    "ddim": "DDIM",
    "heun": "Heun",
}
ORDERS = {"ddim": 1, "dpm++2m": 2, "dpm++3m": 3}  # DDIM is DPM-Solver++ of order 1


def solve_by(name: str) -> Solve:
    """A peer, by its name in `PEERS`."""
    check_choice(PEERS, name=name)
    if name == "heun":
        return lambda flow, x, calls: by_heun(flow.denoise, x, *flow.ends, calls)
    return lambda flow, x, calls: by_diffusers(name, flow.denoise, x, noise_levels(*flow.ends, calls))


def errors_after(solve: Solve, flow: Flow, x: Float[Tensor, "B *shape"], calls: Iterable[int]) -> Iterator[tuple[int, float]]:
    """(N, the root of the mean squared distance to the reference trajectory's end after N network calls), for each N."""
    exact = flow.reference(x)
    for each in calls:
        yield each, float((solve(flow, x, each) - exact).square().mean().sqrt())


def by_diffusers(
    name: str, denoise: Denoise, x: Float[Tensor, "B *shape"], sigmas: Float64[Tensor, "steps_plus_1"]
) -> Float[Tensor, "B *shape"]:
    """x of deviation sigmas[0] brought to sigmas[-1] by a solver of diffusers, one call a step."""
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    if name.startswith("unipc"):
        kind: Any = name[-3:]
        scheduler: Any = UniPCMultistepScheduler(solver_order=3, solver_type=kind, final_sigmas_type="sigma_min")
    else:
        scheduler = DPMSolverMultistepScheduler(solver_order=ORDERS[name], final_sigmas_type="sigma_min")
    scheduler.set_timesteps(len(sigmas) - 1)
    return follow_levels(scheduler, denoise, x, sigmas)


@torch.no_grad()
def by_heun(denoise: Denoise, x: Float[Tensor, "B *shape"], sigma_max: float, sigma_min: float, calls: int) -> Float[Tensor, "B *shape"]:
    """EDM's second-order solver: two calls a step; with an odd number of calls the last step has one."""
    check_whole(calls=calls)
    sigmas = noise_levels(sigma_max, sigma_min, (calls + 1) // 2).tolist()
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        slope = (x - denoise(x, sigma)) / sigma
        moved = x + (following - sigma) * slope
        if 2 * i + 2 <= calls:
            moved = x + (following - sigma) * (slope + (moved - denoise(moved, following)) / following) / 2
        x = moved
    return x
