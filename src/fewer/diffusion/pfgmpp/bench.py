"""Races: what the heavier tail costs a training step, the kernel's draws, the exact field, and the scheduler beside diffusers' own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from torch import Tensor, nn

from fewer.diffusion.pfgmpp.loss import PFGMPPLoss
from fewer.diffusion.pfgmpp.perturbation import perturb, posterior_mean, student_t_noise
from fewer.diffusion.pfgmpp.problems import BATCH, make_network, make_task
from fewer.diffusion.pfgmpp.scheduler import PFGMPPHeunScheduler
from fewer.meters import median_seconds
from fewer.study import Bench

bench = Bench("pfgmpp")
D, STEPS = 128, 18
PIXELS = 3 * 32 * 32


def training_step(extra: float) -> Callable[[], object]:
    """One of the study's, with D = `extra`."""
    task = make_task("", 0, large=False)
    model, loss, draw = make_network(task, 0), PFGMPPLoss(extra), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        value = loss(model, task.train[:BATCH], generator=draw).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


@bench.race(f"a training step of digits, batch {BATCH}, D = {D}", peer="the same step of EDM (D = inf)", reach=1.05)
def step() -> tuple[Callable[[], object], Callable[[], object]]:
    return training_step(D), training_step(math.inf)


@bench.quantity(f"what the tail adds to a batch of {BATCH}, processor time", peer="2 % of that training step", unit="s", reach=1.0)
def added() -> tuple[float, float]:
    shape, draw = (BATCH, 1, 8, 8), torch.Generator().manual_seed(0)
    with_tail, without = (median_seconds(lambda d=d: student_t_noise(shape, d, draw), 301, processor=True) for d in (D, math.inf))
    return with_tail - without, 0.02 * median_seconds(training_step(math.inf), processor=True)


@bench.race(f"perturbing {BATCH} images of 3 x 32 x 32", peer="the paper's form: Beta variables, points on a sphere", reach=1.0)
def perturbing() -> tuple[Callable[[], object], Callable[[], object]]:
    y, sigma = torch.zeros(BATCH, 3, 32, 32), torch.linspace(0.1, 20, BATCH)
    draw, beta = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def by_beta() -> Tensor:
        b = beta.beta(PIXELS / 2, D / 2, size=BATCH)
        radius = sigma * math.sqrt(D) * torch.from_numpy(np.sqrt(b / (1 - b))).float()
        g = torch.randn(BATCH, PIXELS, generator=draw)
        return y + (radius[:, None] * g / g.norm(dim=1, keepdim=True)).reshape(y.shape)

    return lambda: perturb(y, sigma, D, draw), by_beta


@bench.race("the exact field of 4,096 images of 3 x 32 x 32 at 256 states", peer="torch.cdist and a product of matrices", reach=1.5)
def field() -> tuple[Callable[[], object], Callable[[], object]]:
    draw = torch.Generator().manual_seed(0)
    x, data = (torch.randn(count, PIXELS, generator=draw, dtype=torch.float64) for count in (256, 4096))
    sigma = torch.linspace(0.1, 20, 256, dtype=torch.float64)
    return lambda: posterior_mean(x, sigma, data, D), lambda: torch.cdist(x, data) @ data


class Raw(nn.Module):
    """A network F(c_in x, c_noise), the same for all schedulers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 3, 1)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.body(x) + 1e-3 * t.float()


def sampling(scheduler: Any, steps: int) -> Callable[[], object]:
    """A pipeline's loop in float32."""
    torch.manual_seed(0)
    net, draw = Raw().eval().requires_grad_(False), torch.Generator().manual_seed(0)

    def run() -> Tensor:
        scheduler.set_timesteps(steps)
        x = student_t_noise((16, 3, 32, 32), D, draw) * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
        return x

    return run


@bench.race("35 network calls, a small network, 16 x 3 x 32 x 32", peer="diffusers EDMEulerScheduler", reach=1.0)
def beside_euler() -> tuple[Callable[[], object], Callable[[], object]]:
    return sampling(PFGMPPHeunScheduler(D), STEPS), sampling(EDMEulerScheduler(), 2 * STEPS - 1)


@bench.race("18 steps of Heun, a small network, 16 x 3 x 32 x 32", peer="diffusers HeunDiscreteScheduler", reach=1.0)
def beside_heun() -> tuple[Callable[[], object], Callable[[], object]]:
    return sampling(PFGMPPHeunScheduler(D), STEPS), sampling(HeunDiscreteScheduler(use_karras_sigmas=True), STEPS)
