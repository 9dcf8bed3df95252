"""What the study holds the solver against: diffusers' solvers on the same noise levels, exact mixtures, and cached statistics."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewer.data import WEIGHTS, folder_of, made_once
from fewer.diffusion._shared import GaussianMixture, NoiseSchedule
from fewer.diffusion.dpm_solver_v3.ems import EMS
from fewer.diffusion.dpm_solver_v3.estimation import Mode, estimate_ems

Denoise = Callable[[Tensor, Any], Tensor]


def noise_levels(sigma_max: float, sigma_min: float, steps: int) -> Tensor:
    """Equal steps of log sigma, float64 [steps + 1]."""
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), steps + 1, dtype=torch.float64).exp()


@torch.no_grad()
def by_diffusers(name: str, denoise: Denoise, x: Tensor, sigmas: Tensor) -> Tensor:
    """x of deviation sigmas[0] brought to sigmas[-1] by a solver of diffusers, one call a step.

    Args:
        name: "dpm++2m", "dpm++3m", "unipc-bh1", "unipc-bh2" or "ddim" (which is DPM-Solver++ of order 1).
    """
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    if name.startswith("unipc"):
        kind: Any = name[-3:]
        scheduler: Any = UniPCMultistepScheduler(solver_order=3, solver_type=kind, final_sigmas_type="sigma_min")
    else:
        order = {"ddim": 1, "dpm++2m": 2, "dpm++3m": 3}[name]
        scheduler = DPMSolverMultistepScheduler(solver_order=order, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    alphas = (1 + sigmas**2).rsqrt().tolist()  # diffusers' states are alpha x
    state = x * alphas[0]
    for t, sigma, alpha in zip(scheduler.timesteps, sigmas.tolist(), alphas, strict=False):
        eps = (state / alpha - denoise(state / alpha, sigma)) / sigma
        state = scheduler.step(eps, t, state, return_dict=False)[0]
    return state / alphas[-1]


@torch.no_grad()
def by_heun(denoise: Denoise, x: Tensor, sigma_max: float, sigma_min: float, calls: int) -> Tensor:
    """EDM's second-order solver: two calls a step; with an odd number of calls the last step has one."""
    sigmas = noise_levels(sigma_max, sigma_min, (calls + 1) // 2).tolist()
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        slope = (x - denoise(x, sigma)) / sigma
        moved = x + (following - sigma) * slope
        if 2 * i + 2 <= calls:
            moved = x + (following - sigma) * (slope + (moved - denoise(moved, following)) / following) / 2
        x = moved
    return x


@dataclass(frozen=True)
class Flow:
    """Something to sample: a denoiser, where its noise levels end, and its statistics without guidance.

    Attributes:
        reference: where noises end on the exact or converged flow.
    """

    denoise: Denoise
    schedule: NoiseSchedule
    reference: Callable[[Tensor], Tensor]

    @property
    def ends(self) -> tuple[float, float]:
        return self.schedule.t_max, self.schedule.t_min

    def epsilon(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = t.to(x)
        return (x - self.denoise(x, sigma)) / sigma


def random_mixture(dim: int, components: int) -> GaussianMixture:
    """Means 0.5 randn, variances (0.02 + 0.1 u_ci) u_i, weights softmax(randn)."""
    draw = torch.Generator().manual_seed(dim)
    means = 0.5 * torch.randn(components, dim, generator=draw, dtype=torch.float64)
    each, shared = (torch.rand(rows, dim, generator=draw, dtype=torch.float64) for rows in (components, 1))
    weights = torch.softmax(torch.randn(components, generator=draw, dtype=torch.float64), 0)
    return GaussianMixture(means, weights, (0.02 + 0.1 * each) * shared.clamp(min=0.01))


def exact_ends(data: GaussianMixture, x: Tensor, sigma_max: float, sigma_min: float) -> Tensor:
    """Where the exact flow takes noises x, made once on a machine."""
    digest = hashlib.sha256(b"".join(each.numpy().tobytes() for each in (data.means, data.weights, data.variances, x))).hexdigest()

    def make(folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({"x": data.transport(x, sigma_max, sigma_min)}, folder / WEIGHTS)

    from safetensors.torch import load_file

    return load_file(made_once(folder_of("flows", "mixture", {"of": digest, "ends": [sigma_max, sigma_min]}), make) / WEIGHTS)["x"]


def statistics_of(name: str, flow: Flow, data: Tensor, n: int, k: int, common: bool = True, mode: Mode = "forward", model: str = "") -> EMS:
    """EMS of a flow, estimated once on a machine."""
    digest = hashlib.sha256(data.numpy().tobytes()).hexdigest()
    what = {"version": 1, "data": digest, "model": model, "ends": flow.ends, "n": n, "k": k, "common": common}

    def make(folder: Path) -> None:
        from safetensors.torch import save_file

        draw = torch.Generator().manual_seed(1)
        ems = estimate_ems(flow.epsilon, flow.schedule, data, n, k, 512, common, draw, progress=False, mode=mode)
        save_file({each: getattr(ems, each).contiguous() for each in ("lambdas", "l", "s", "b")}, folder / WEIGHTS)

    from safetensors.torch import load_file

    read = load_file(made_once(folder_of("ems", name, what), make) / WEIGHTS)
    return EMS(read["lambdas"], read["l"], read["s"], read["b"])
