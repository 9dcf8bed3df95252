"""Races: what a step costs beside diffusers' solver, what a search costs beside the network, and what is left of the error."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion._shared.peers import solve_by
from fewer.diffusion.solver_search.decisions import SolverSchedule
from fewer.diffusion.solver_search.problems import digits
from fewer.diffusion.solver_search.search import CANDIDATES, Predictor, ScheduleSearch
from fewer.diffusion.solver_search.solver import USFScheduler
from fewer.meters import median_seconds
from fewer.study import Bench

bench = Bench("solver-search")
STEPS, CALLS, EVALUATIONS = 10, 5, 200


@bench.race(
    f"{STEPS} steps of 2M with a network that costs nothing, 16 x 3 x 64 x 64", peer="diffusers DPMSolverMultistepScheduler", reach=1.0
)
def steps() -> tuple[Callable[[], object], Callable[[], object]]:
    x = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    schedule = SolverSchedule.preset("dpm++2m", STEPS, NoiseSchedule.from_diffusers(DDPMScheduler()))
    ours, theirs = USFScheduler(schedule), DPMSolverMultistepScheduler(final_sigmas_type="sigma_min")

    def loop(scheduler: USFScheduler | DPMSolverMultistepScheduler) -> Callable[[], object]:
        def run() -> object:
            scheduler.set_timesteps(STEPS)
            state = x
            for t in scheduler.timesteps:
                state = scheduler.step(x, t, state, return_dict=False)[0]
            return state

        return run

    return loop(ours), loop(theirs)


@bench.quantity("an evaluation on 64 digits, processor time", peer=f"its {CALLS - 1} network calls", unit="s", reach=1.1)
def evaluation() -> tuple[float, float]:
    problem = digits()
    objective, _ = problem.objectives(0)
    draw, space = random.Random(0), problem.space(afs={"none": 1.0})
    schedules = [space.random(CALLS, draw) for _ in range(20)]
    x, t = objective.noises, torch.tensor(1.0, dtype=torch.float64)
    objective(schedules[0])  # the first call, which all share

    def network() -> None:
        with torch.no_grad():
            for _ in range((CALLS - 1) * len(schedules)):
                problem.flow.epsilon(x, t)

    ours = median_seconds(lambda: [objective(each) for each in schedules], 5, processor=True)
    return ours / len(schedules), median_seconds(network, 5, processor=True) / len(schedules)


@bench.quantity("network calls of an evaluation", peer="the calls of a sample", unit="", reach=(CALLS - 1) / CALLS)
def shared_call() -> tuple[float, int]:
    problem = digits()
    objective, _ = problem.objectives(0)
    schedule = SolverSchedule.preset("dpm++2m", CALLS, problem.schedule)
    objective(schedule)
    before = objective.calls
    objective(schedule)
    return (objective.calls - before) / problem.search, CALLS


@bench.quantity(f"{CANDIDATES} candidates ranked", peer="a fifth of a second", unit="s", reach=1.0)
def ranking() -> tuple[float, float]:
    problem, draw = digits(), random.Random(0)
    schedules = [problem.space().random(CALLS, draw) for _ in range(CANDIDATES)]
    predictor = Predictor(0).fit(schedules[:50], [draw.random() for _ in range(50)])
    return median_seconds(lambda: predictor(schedules), 5), 0.2


@bench.quantity(
    f"error of {CALLS} calls on other noises, found by {EVALUATIONS} evaluations", peer="diffusers UniPC, log SNR grid", unit="", reach=0.6
)
def error() -> tuple[float, float]:
    problem = digits()
    objective, fresh = problem.objectives(0)
    found = ScheduleSearch(problem.space(), objective, CALLS, EVALUATIONS, rescore=fresh).run()
    judge = problem.judge
    theirs = solve_by("unipc-bh2")(problem.flow, judge.noises, CALLS)
    return judge(found.best), float((theirs - judge.reference).square().mean().sqrt())


@bench.quantity("a search in all, processor time", peer="its network calls", unit="s")
def search() -> tuple[float, float]:
    problem = digits()
    objective, _ = problem.objectives(0)
    started = time.process_time()
    ScheduleSearch(problem.space(), objective, CALLS, EVALUATIONS, predictor=False).run()
    spent, t = time.process_time() - started, torch.tensor(1.0, dtype=torch.float64)
    with torch.no_grad():
        call = median_seconds(lambda: problem.flow.epsilon(objective.noises, t), 9, processor=True)
    return spent, call * objective.calls / problem.search
