"""Races: what a step costs beside the network, and what the statistics cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import nn

from fewer.diffusion._shared import NoiseSchedule, as_epsilon
from fewer.diffusion.dpm_solver_v3.ems import EMS
from fewer.diffusion.dpm_solver_v3.estimation import estimate_ems
from fewer.diffusion.dpm_solver_v3.scheduler import DPMSolverV3Scheduler
from fewer.meters import median_seconds
from fewer.study import Bench

bench = Bench("dpm-solver-v3")
STEPS = 10


def statistics(n: int, *shape: int) -> EMS:
    """Smooth ones of no model: what they say does not change the time."""
    schedule = NoiseSchedule.from_diffusers(DDPMScheduler())
    first, last = (float(schedule.lambda_(torch.tensor(t, dtype=torch.float64))) for t in (schedule.t_max, schedule.t_min))
    lambdas = torch.linspace(first, last, n + 1, dtype=torch.float64)
    l = torch.sigmoid(-lambdas).float().reshape(-1, *[1] * len(shape)).expand(-1, *shape).contiguous()  # noqa: E741
    return EMS(lambdas, l, -0.5 * l, 0.1 * l)


@bench.race(
    "10 steps with a network that costs nothing, 16 x 3 x 64 x 64, corrector on", peer="diffusers UniPCMultistepScheduler", reach=1.0
)
def steps() -> tuple[Callable[[], object], Callable[[], object]]:
    x = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ours = DPMSolverV3Scheduler(statistics(120, 3, 64, 64), corrector="full")
    theirs = UniPCMultistepScheduler(solver_order=3)

    def loop(scheduler: DPMSolverV3Scheduler | UniPCMultistepScheduler) -> Callable[[], object]:
        def run() -> object:
            state = x
            for t in scheduler.timesteps:
                state = scheduler.step(x, t, state, return_dict=False)[0]
            return state

        return run

    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    our_loop, their_loop = loop(ours), loop(theirs)

    def begin_ours() -> object:
        ours.restart()
        return our_loop()

    def begin_theirs() -> object:
        # what `set_timesteps` forgets, without the coefficients that it makes
        theirs._step_index, theirs.last_sample, theirs.lower_order_nums, theirs.model_outputs = None, None, 0, [None] * 3
        return their_loop()

    return begin_ours, begin_theirs


@bench.quantity("set_timesteps(20), statistics of 1,201 points, 3 x 32 x 32", peer="half a second", unit="s", reach=1.0)
def preparation() -> tuple[float, float]:
    scheduler = DPMSolverV3Scheduler(statistics(1200, 3, 32, 32), corrector="full")
    return median_seconds(lambda: scheduler.set_timesteps(20), 5), 0.5


@bench.race("a point of the statistics, an MLP 256-1024-1024-256, batch 256", peer="seven forward calls", reach=1.0)
def estimation() -> tuple[Callable[[], object], Callable[[], object]]:
    net = nn.Sequential(nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, 1024), nn.SiLU(), nn.Linear(1024, 256)).requires_grad_(False)
    data, points, count = torch.randn(256, 256), 4, 256
    schedule = NoiseSchedule.linear()

    def theirs() -> None:
        with torch.no_grad():
            for _ in range(7 * (points + 1)):
                net(data)

    return lambda: estimate_ems(lambda x, t: net(x), schedule, data, points, count, count, progress=False), theirs


@bench.quantity("a point of the statistics, a U-Net of diffusers, 8 x 3 x 32 x 32, processor time", peer="one forward call", unit="s")
def of_a_u_net() -> tuple[float, float]:
    torch.manual_seed(0)
    blocks: dict[str, Any] = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    net = UNet2DModel(sample_size=32, layers_per_block=1, block_out_channels=(32, 64), **blocks).eval().requires_grad_(False)
    data, scheduler, points = torch.randn(8, 3, 32, 32), DDPMScheduler(), 3
    eps = as_epsilon(net, scheduler)

    def estimate() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so few samples are for the time alone
            estimate_ems(eps, eps.schedule, data, points - 1, len(data), len(data), progress=False)

    with torch.no_grad():
        call = median_seconds(lambda: net(data, 500.0), 5, processor=True)
    return median_seconds(estimate, 5, processor=True) / points, call
