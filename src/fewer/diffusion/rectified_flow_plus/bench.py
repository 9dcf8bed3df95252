"""Races: what a step of training and of sampling costs beside plain flow matching's, and what the parts cost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from fewer.diffusion.rectified_flow_plus.premetric import LPIPSHuber, SquaredL2
from fewer.diffusion.rectified_flow_plus.problems import Task, of_digits
from fewer.diffusion.rectified_flow_plus.reflow import ReflowConfig, sample_t, train_reflow
from fewer.diffusion.rectified_flow_plus.sampler import grid, sample
from fewer.meters import median_seconds
from fewer.study import Bench

bench = Bench("rectified-flow-plus")
STEPS, BATCH, DRAWS = 20, 256, 1_000_000
CONFIG = ReflowConfig(steps=STEPS, batch_size=BATCH, lr=1e-3, warm_up=0, ema=0.995)
Racers = tuple[Callable[[], object], Callable[[], object]]


def digits() -> Task:
    return of_digits("digits8", 10_000)


def trained(job: Task, premetric: torch.nn.Module) -> Callable[[], object]:
    return lambda: train_reflow(job.teacher, job.pairs, CONFIG, premetric)


@bench.race(f"{STEPS} steps of training, squared L2, the digits' network", peer="a plain conditional flow matching loop by hand", reach=1.1)
def training() -> Racers:
    """The stand-in for torchcfm: its CIFAR-10 loop (draw, interpolate, regress, Adam, moving average) without the library."""
    job = digits()
    x_1, z_1 = job.pairs.batch(torch.arange(len(job.pairs)))

    def plain() -> None:
        net = copy.deepcopy(job.teacher).train().requires_grad_(True)
        average, optimizer = copy.deepcopy(net), torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
        for _ in range(STEPS):
            rows, t = torch.randint(len(x_1), (BATCH,)), torch.rand(BATCH)
            x, z, column = x_1[rows], z_1[rows], t.reshape(-1, 1, 1, 1)
            loss = (net((1 - column) * x + column * z, t) - (z - x)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for mean, weight in zip(average.parameters(), net.parameters(), strict=True):
                    mean.lerp_(weight, 0.005)

    return trained(job, SquaredL2()), plain


@bench.race(f"{STEPS} steps of training with the features of a classifier", peer="the same with squared L2", reach=1.8)
def premetric() -> Racers:
    job = digits()
    return trained(job, LPIPSHuber(job.distance, time_weight="1/t")), trained(job, SquaredL2())


@bench.race("4 steps of sampling, 256 digits, one network", peer="diffusers FlowMatchEulerDiscreteScheduler", reach=1.0)
def sampling() -> Racers:
    job, scheduler = digits(), cast(Any, FlowMatchEulerDiscreteScheduler())
    z = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def theirs() -> torch.Tensor:
        scheduler.set_timesteps(sigmas=grid(4)[:-1])
        x = z
        for t in scheduler.timesteps:
            x = scheduler.step(job.teacher(x, t / 1000), t, x, return_dict=False)[0]
        return x

    return lambda: sample(job.teacher, z, 4), theirs


@bench.race("a call of the digits' network as a velocity, 256 digits", peer="the bare network", reach=1.03)
def wrapper() -> Racers:
    job = digits()
    denoiser, t = job.teacher.denoiser, torch.full((BATCH,), 0.5)
    x = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = t / (1 - t)
    return torch.no_grad()(lambda: job.teacher(x, t)), torch.no_grad()(lambda: denoiser(x, sigma))


@bench.quantity(f"a time of the U-shaped law, {DRAWS:,} at once", peer="50 ns", unit="s", reach=1.0)
def times() -> tuple[float, float]:
    return median_seconds(lambda: sample_t(DRAWS), 5) / DRAWS, 50e-9


@bench.quantity("bytes that the noise of a pair takes in its file", peer="the noise itself", unit="bytes", reach=33 / 256)
def noise() -> tuple[float, float]:
    job = digits()
    _, z = job.pairs.batch(torch.arange(1))
    return job.pairs.z[:1].nbytes, z.nbytes
