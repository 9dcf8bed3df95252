"""Tuning: every arm gets the same number of Optuna trials, judged on validation data; test data are sealed until settings are chosen."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable
from typing import Any

from fewer.errors import UserError, require
from fewer.study.declaration import Arm
from fewer.study.engines import Engine
from fewer.study.runner import Plan
from fewer.study.spaces import Choice, LogUniform, Space
from fewer.study.store import Tuning
from fewer.study.trial import FinishedEvent, ObjectiveEvent, ReportEvent, TrialSpec

WARM_UP_TRIALS = 4  # trials that are never pruned, for a median to compare with
Observe = Callable[[str, int, int, str, float | None], None]  # arm, trial (from 1), of, status, objective


def tune_arm(plan: Plan, arm: Arm, engine: Engine, *, trials: int, observe: Observe | None = None) -> Tuning:
    """The best settings for one arm within `trials` trials (TPE, median pruner, all with the plan's first seed).

    The first trial takes the arm's defaults, so that tuning never ends below them.

    Raises:
        UserError: no trial told an objective (its message has the last error), or `trials` is below 1.
    """
    if trials < 1:
        raise UserError(f"--trials {trials}: expected at least 1")
    optuna: Any = require("optuna", "tuning")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    base = next(spec for spec in plan.specs if spec.arm == arm.name)
    start = dict(plan.options) | arm.defaults(plan.scale, plan.options)
    search = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=base.seed, n_startup_trials=max(1, trials // 4)),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=WARM_UP_TRIALS, n_warmup_steps=1),
    )
    search.enqueue_trial({name: start[name] for name in arm.space})
    pruned, last_error = 0, "no trial ran to its end"
    for number in range(1, trials + 1):
        candidate = search.ask()
        drawn = {name: _draw(candidate, name, space) for name, space in arm.space.items()}
        spec = TrialSpec(base.module, base.slug, arm.name, base.seed, base.scale, start | drawn, base.device, base.threads, tuning=True)
        objective, finished = _try(spec, candidate, engine, plan.study.time_limit)
        state = _state(optuna, objective, finished)
        search.tell(candidate, objective if state is optuna.trial.TrialState.COMPLETE else None, state=state)
        pruned += finished.status == "pruned"
        last_error = finished.error or last_error
        if finished.user_error:
            raise UserError(finished.error)
        if observe:
            observe(arm.name, number, trials, finished.status, objective)
    if not search.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        raise UserError(
            f"tuning {arm.name}: none of {trials} trials told an objective ({last_error.strip().splitlines()[-1]}); mend the arm"
        )
    return Tuning(dict(search.best_params), search.best_value, trials, pruned, datetime.date.today().isoformat())


def _try(spec: TrialSpec, candidate: Any, engine: Engine, time_limit: float) -> tuple[float | None, FinishedEvent]:
    """Run one trial; its objective and how it ended. Optuna's pruner answers the trial's reports."""

    def answer(_: TrialSpec, report: ReportEvent) -> bool:
        candidate.report(float("nan") if report.value is None else report.value, report.step)
        return not candidate.should_prune()

    objective, finished = None, FinishedEvent("failed", 0.0, 0, "the trial said nothing")
    with contextlib.closing(engine.run([spec], time_limit=time_limit, answer=answer)) as events:
        for _, event in events:
            if isinstance(event, ObjectiveEvent):
                objective = event.value
            if isinstance(event, FinishedEvent):
                finished = event
    return objective, finished


def _state(optuna: Any, objective: float | None, finished: FinishedEvent) -> Any:
    if finished.status == "done" and objective is not None:
        return optuna.trial.TrialState.COMPLETE
    return optuna.trial.TrialState.PRUNED if finished.status == "pruned" else optuna.trial.TrialState.FAIL


def _draw(candidate: Any, name: str, space: Space) -> Any:
    if isinstance(space, Choice):
        return candidate.suggest_categorical(name, list(space.values))
    return candidate.suggest_float(name, space.low, space.high, log=isinstance(space, LogUniform))
