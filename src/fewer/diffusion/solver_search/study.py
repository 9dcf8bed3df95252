"""S3 beside named solvers on several grids, evolution without a predictor, random search and searches of a part: what 5 network calls leave.

All are held against converged solutions. Schedules are searched on 64 noises, the five best looked at again on 256, others in each seed;
all are judged on 300 further noises, the same in all seeds. The honest baseline is the best named solver on its best grid, with and without
lower orders at the end, chosen on the search noises too.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from fewer.diffusion.solver_search.decisions import GRIDS, PRESETS, SolverSchedule, grid
from fewer.diffusion.solver_search.problems import Problem, digits, of_pipeline
from fewer.diffusion.solver_search.search import Objective, ScheduleSearch, SearchResult, presets
from fewer.errors import UserError
from fewer.study import Curve, Figure, NotTestable, Results, Scale, Study, Trial
from fewer.tasks import frechet_distance

EVALUATIONS, PART = 400, 200  # of a search; of those that search a part
MARKS = (100, 150, 200, 250, 300, 350)  # evaluations at which the best so far is told
LONGER = (6, 8, 10)  # network calls of the best named solver, for what a search saves
SETTING = {Scale.QUICK: ((5, EVALUATIONS),), Scale.FULL: ((5, EVALUATIONS), (8, 800))}  # (calls, evaluations)

study = Study(
    "solver-search",
    question="How much error do 5 network calls leave, with a solver searched for the model?",
    baseline="best-preset",
    figures=[
        Figure("error", "RMSE to the converged image, 5 calls", at={"calls": 5}),
        Figure("error", "after 200 evaluations", at={"evaluations": PART}),
        Figure("gap", "error on the test noises / on the search noises"),
        Figure("frechet", "Frechet distance to held-out digits", detail=True),
        Figure("tau", "rank correlation of predicted and true scores", "", "higher"),
        Figure("calls", "network calls of the search and its references, in images"),
        Figure("cpu_seconds", "processor time of the search", "s"),
        Figure("error", "RMSE to the converged image"),
        Figure("on_grid", "RMSE on each grid", detail=True),
        Figure("found", "least error on the search noises"),
    ],
    charts=[Curve("found", over="evaluations", log=True, title="Least error so far on the search noises")],
    time_limit=4 * 3600,
)
study.option("pipeline", "", help="your own model: a diffusers directory")
study.option("data", "", help="a folder of images that it was trained on: their mean stands for the first call")


@study.task
def task(scale: Scale, pipeline: str, data: str) -> Problem:
    if not pipeline:
        job = digits()
        for seed in range(study.seeds):
            job.objectives(seed)  # the references, made once
        _ = job.judge
        return job
    try:
        return of_pipeline(pipeline, images=data)
    except (OSError, ValueError) as mistake:  # in the user's own files
        raise UserError(str(mistake)) from mistake


# The arms


def tell_frechet(job: Problem, trial: Trial, images: Any) -> None:
    """Show images, and tell how far they are from held-out digits; beside the floor, which as many real ones leave."""
    trial.show(images, "images after 5 calls")
    if job.digits is not None:
        real = job.digits.features(job.digits.data("test")[0][job.test : job.test + 2000])
        trial.log("frechet", frechet_distance(job.digits.features(images), real))


def judged(job: Problem, trial: Trial, schedule: SolverSchedule, **at: Any) -> float:
    error = job.judge(schedule)
    trial.log("error", error, **at)
    return error


def named(job: Problem, trial: Trial, name: str) -> None:
    """A named solver on each grid; its error is that on the grid that does best on the search noises."""
    objective, _ = job.objectives(trial.seed)
    options = [each for each in candidates(job, 5) if each.meta["preset"] == name]
    if not options:
        trial.note("left out", "this solver needs statistics of the model")
        return
    for spacing in GRIDS:
        best = min((each for each in options if each.meta["spacing"] == spacing), key=objective)
        trial.log("on_grid", job.judge(best), grid=spacing)
    judged(job, trial, min(options, key=objective), calls=5)


def candidates(job: Problem, calls: int) -> list[SolverSchedule]:
    """All named solvers on all grids, with lower orders at the end and without."""
    return [each for lower in (True, False) for each in presets(job.space(), calls, lower)]


def best_preset(job: Problem, trial: Trial) -> None:
    objective, _ = job.objectives(trial.seed)
    for calls in (5, *LONGER):
        chosen = min(candidates(job, calls), key=objective)
        judged(job, trial, chosen, calls=calls)
        if calls == 5:
            trial.note("chosen", f"{chosen.meta['preset']} on {chosen.meta['spacing']}")
            tell_frechet(job, trial, job.judge.ends(chosen))


def searched(job: Problem, trial: Trial, what: str = "all", guided: bool = True) -> None:
    """Search, and judge what was found."""
    for calls, evaluations in SETTING[trial.scale]:
        objective, fresh = job.objectives(trial.seed)
        search = search_of(job, trial, objective, fresh, what, guided, calls, evaluations)
        started = time.process_time()
        found = search.run()
        spent = time.process_time() - started
        score = objective(found.best)  # of a pick by a second look too
        error = judged(job, trial, found.best, calls=calls)
        report_course(job, trial, found, calls)
        if calls == 5:
            trial.log("gap", error / score)
            trial.log("calls", objective.calls + fresh.calls + job.reference_calls)
            trial.log("cpu_seconds", spent)
            if found.tau:
                trial.log("tau", sum(found.tau) / len(found.tau))
            tell_frechet(job, trial, job.judge.ends(found.best))
        trial.note(f"schedule of {calls} calls", found.best.table())


def report_course(job: Problem, trial: Trial, found: SearchResult, calls: int) -> None:
    """The least error on the search noises over evaluations, and the test error of what 200 of them found, without a second look."""
    history = found.history
    for mark in (*(mark for mark in MARKS if mark < len(history)), len(history)):
        if calls == 5:
            best = min(history[:mark], key=lambda each: each.score)
            trial.log("found", best.score, evaluations=mark)
            if mark == min(PART, len(history)):
                judged(job, trial, best.schedule, evaluations=PART)


def search_of(
    job: Problem, trial: Trial, objective: Objective, fresh: Objective, what: str, guided: bool, calls: int, evaluations: int
) -> ScheduleSearch:
    """A search of everything, by chance alone, or of a part: the grid with the decisions of the best named solver, or the decisions alone."""
    words: dict[str, Any] = {"predictor": guided, "seed": trial.seed, "rescore": fresh, "budget": evaluations}
    words["tell"] = lambda done, total, best: trial.progress(done, total, f"{best:.4f}")
    if what == "random":
        return ScheduleSearch(job.space(), objective, calls, starts=(), first_random=evaluations, **words)
    if what == "grid":
        best = min(candidates(job, calls), key=objective)
        space = job.space(decision_rate=0.0, insert=0.0, delete=0.0)
        starts = [replace(best, lambdas=tuple(grid(job.schedule, spacing, len(best.steps)).tolist())) for spacing in GRIDS]
        return ScheduleSearch(space, objective, calls, starts=[best, *starts], **words | {"budget": PART, "rescore": None})
    if what == "decisions":
        space = job.space(time_rate=0.0, insert=0.0, delete=0.0, afs={"none": 1.0})
        starts = [SolverSchedule.preset(name, calls, job.schedule) for name in PRESETS if job.ems is not None or name != "v3-3"]
        starts = [each for each in starts if each.meta["preset"] != "dpm-solver-2"]  # whose steps end elsewhere
        return ScheduleSearch(space, objective, calls, starts=starts, **words | {"budget": PART, "rescore": None})
    if what == "uniform":
        return ScheduleSearch(job.space(uniform=True), objective, calls, **words)
    space = job.space() if what == "all" else replace(job.space(), nodes=())
    return ScheduleSearch(space, objective, calls, **words)


def at_full(job: Problem, trial: Trial, what: str) -> None:
    if trial.scale is Scale.FULL:
        searched(job, trial, what)
    else:
        trial.note("left out", "searched at the full scale only")


def converged(job: Problem, trial: Trial) -> None:
    tell_frechet(job, trial, job.judge.reference)


def real(job: Problem, trial: Trial) -> None:
    """Other real digits: the floor of the distance."""
    if job.digits is not None:
        tell_frechet(job, trial, job.digits.data("test")[0][: job.test])


study.arm("best-preset", label="best named solver on its best grid")(best_preset)
study.arm_table(named, {name: {"label": f"{name}, best grid", "name": name} for name in PRESETS})
study.arm_table(
    searched,
    {
        "s3": {"label": "S3: evolution with a predictor"},
        "evolution": {"label": "evolution", "guided": False},
        "random": {"label": "random search", "what": "random", "guided": False},
        "grid-only": {"label": "only the grid", "what": "grid"},
        "decisions-only": {"label": "only the decisions, log SNR grid", "what": "decisions"},
    },
)
study.arm_table(
    at_full,
    {
        "no-v3": {"label": "S3 without v3 steps", "what": "no-v3"},
        "uniform": {"label": "equal decisions, free grid", "what": "uniform"},
    },
)
study.arm("converged", label="the converged solution")(converged)
study.arm("real", label="real digits")(real)


# What the paper claims

FID = "CIFAR-10 EDM: FID 3.93 against 12.45 with 5 calls"


@study.claim("5 calls: S3 with 400 evaluations leaves at most 0.6 of the honest baseline's error on other noises", paper=FID)
def at_5(results: Results) -> Any:
    return results.ratio("error", "s3", "best-preset", calls=5) <= 0.6


@study.claim("8 calls: S3 with 800 evaluations leaves at most 0.75", paper="CIFAR-10 EDM: FID 2.43 against 3.66 with 8 calls")
def at_8(results: Results) -> Any:
    if (("calls", 8),) not in results.curve("error", "s3"):
        raise NotTestable("searched at the full scale only")
    return results.ratio("error", "s3", "best-preset", calls=8) <= 0.75


@study.claim("What is found is not fitted to its noises: test error at most 1.2 of the search error")
def generalises(results: Results) -> Any:
    return results.mean("gap", "s3") <= 1.2


@study.claim("Random search loses to both evolutions", paper="the search is efficient")
def beats_chance(results: Results) -> Any:
    return (results.ratio("error", "s3", "random", calls=5) < 1) & (results.ratio("error", "evolution", "random", calls=5) < 1)


@study.claim(
    "With the predictor, 250 evaluations reach what evolution finds with 400",
    paper="the predictor makes the search cheap",
    if_fails="the predictor is trained on few schedules, most of them far worse than those it has to tell apart, while evolution learns "
    "from every score at once",
)
def predictor_saves(results: Results) -> Any:
    return results.threshold("found", "s3", over="evaluations", reach="evolution", better="lower") <= 250


@study.claim(
    "After 200 evaluations each, the grid alone and the decisions alone gain less than both",
    paper="timesteps, orders, predictions and correctors matter together",
    if_fails="a part is a smaller space, in which 200 evaluations go further",
)
def parts_gain_less(results: Results) -> Any:
    parts = [results.ratio("error", "s3", part, evaluations=PART) for part in ("grid-only", "decisions-only")]
    return (parts[0] < 1) & (parts[1] < 1)


@study.claim("FID on CIFAR-10, ImageNet, LSUN and Stable Diffusion", paper="the card's results")
def images(results: Results) -> Any:
    raise NotTestable(
        "their weights are not to be had here; and a schedule that is near the ODE's solution need not have the best FID, nor the other way "
        "round: the released schedules beat their own ODE"
    )


@study.summary
def summary(results: Results) -> str:
    def of(arm: str) -> str:
        return f"{results.ratio('error', arm, 'best-preset', calls=5).value:.2f}"

    found = float(results.mean("error", "s3", calls=5).value)
    same = next((calls for calls in LONGER if results.mean("error", "best-preset", calls=calls).value <= found), None)
    words = (
        f"With 5 network calls the schedule that S3 found left {of('s3')} of the error of the best named solver on its best grid (evolution "
        f"without a predictor {of('evolution')}, random search {of('random')}). The search and its converged "
        f"references took {results.say('calls', 's3')} calls of one image "
        f"and {results.say('cpu_seconds', 's3')} of a processor"
    )
    if same is None:
        return f"{words}; the best named solver needs more than {LONGER[-1]} calls for that error."
    even = results.mean("calls", "s3").value / (same - 5)
    return f"{words}; the best named solver needs {same} calls for that error, so the search has paid after {even:,.0f} images."
