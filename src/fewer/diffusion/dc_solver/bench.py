"""Races: what a step costs beside UniPC's, what is kept, and what the search costs beside the released one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from fewer.diffusion.dc_solver.problems import SEARCH_SEED, digits
from fewer.diffusion.dc_solver.scheduler import DCSolverMultistepScheduler
from fewer.diffusion.dc_solver.search import search_ratios
from fewer.study import Bench

bench = Bench("dc-solver")
STEPS, CALLS = 20, 6
SHAPE = (16, 4, 64, 64)


def loop(scheduler: DCSolverMultistepScheduler | UniPCMultistepScheduler) -> Callable[[], torch.Tensor]:
    x = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(0))

    def run() -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(x, t, state, return_dict=False)[0]
        return state

    return run


def both() -> tuple[DCSolverMultistepScheduler, UniPCMultistepScheduler]:
    return DCSolverMultistepScheduler(ratios=[1.0, 1.0] + [1.1] * (STEPS - 2)), UniPCMultistepScheduler(final_sigmas_type="sigma_min")


@bench.race(f"{STEPS} steps with a network that costs nothing, 16 x 4 x 64 x 64", peer="diffusers UniPCMultistepScheduler", reach=1.05)
def steps() -> tuple[Callable[[], object], Callable[[], object]]:
    ours, theirs = both()
    return loop(ours), loop(theirs)


@bench.quantity("tensors of a sample's size kept between steps", peer="UniPCMultistepScheduler, and one more", unit="", reach=1.0)
def kept() -> tuple[int, int]:
    ours, theirs = both()
    loop(ours)()
    loop(theirs)()
    state = ours._state
    buffered = [*state.outputs, state.x]
    return sum(each is not None for each in buffered), sum(each is not None for each in (*theirs.model_outputs, theirs.last_sample)) + 1


def searches() -> tuple[Callable[[], object], Callable[[], object], Callable[[object], float]]:
    """(by Brent, by 40 steps of AdamW, the error of ratios on other noises), on the digits."""
    network = digits()
    noise, condition = network.drawn(10, SEARCH_SEED, in_turn=True)
    reference, model = network.reference(1.0, noise, condition), network.model(1.0, condition)

    def search(optimizer: str) -> Callable[[], object]:
        return lambda: search_ratios(model, noise, reference, network.scheduler(), CALLS, optimizer=optimizer)

    def error(ratios: object) -> float:
        return network.error(network.scheduler(ratios=ratios), CALLS, 1.0)

    return search("brent"), search("adamw"), error


@bench.race(f"a search for {CALLS} calls on ten noises of digits", peer="the released search (AdamW, 40 iterations)", reach=0.25)
def search() -> tuple[Callable[[], object], Callable[[], object]]:
    ours, theirs, _ = searches()
    return ours, theirs


@bench.quantity("error of the ratios found, on other noises", peer="those of the released search", unit="", reach=1.02)
def found() -> tuple[float, float]:
    ours, theirs, error = searches()
    return error(ours()), error(theirs())
