"""Whether a short advice stands: the same question, asked with one seed and with several others, ranked alike or not."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewer import papers
from fewer.advise.advising import Question, advise
from fewer.advise.answer import Answer, Line
from fewer.advise.things import Thing
from fewer.study import Bars, Figure, Results, Study, Trial
from fewer.study.engines import InThisProcess
from fewer.study.results import bootstrap
from fewer.study.runner import Observer

SHORT, LENGTH = "short", "at-length"
SEEDS, FIRST = 2, 10  # of the advice at length: others than any of the short one
KEEP = 0.01


def study_of(slug: str, question: str, job: str) -> Study:
    """A study with the two arms and the claims; its task gives the thing.

    Args:
        job: what is ranked: lines of this job alone.
    """
    study = Study(
        slug,
        question=question,
        baseline=LENGTH,
        figures=[
            Figure("methods", "methods that were tried", "", "higher"),
            Figure("lines", "lines that were ranked", "", "higher"),
            Figure("cpu_seconds", "processor time", "s"),
            Figure("left", "what a method leaves of its costs at its best line", "", detail=True),
        ],
        charts=[Bars(("cpu_seconds",), title="Processor time beside the advice at length")],
        time_limit=3600,
    )

    def ask(thing: Thing, trial: Trial, seeds: int, first: int) -> Answer:
        methods = [card for card in papers.cards() if card.package.startswith("fewer.") and any(each.job == job for each in card.advise)]
        methods = [card for card in methods if trial.settings["only"] in ("", card.slug)]
        question = Question(keep=KEEP, seconds=math.inf, seeds=seeds, first_seed=first, replaced=False)
        with tempfile.TemporaryDirectory() as folder, trial.measure("advise") as cost:
            said = advise(thing, question, methods, Path(folder) / "store.sqlite", Observer(), engine=InThisProcess())
        trial.log("cpu_seconds", cost.figures()["cpu_seconds"])
        for slug, why in said.refused.items():
            trial.note(slug, why)
        lines = ranked(said, job)
        trial.log("methods", len({line.slug for line in lines}))
        trial.log("lines", len(lines))
        for place, line in enumerate(lines):
            trial.log("place", place, line=name_of(line))
            trial.log("left", line.left, line=name_of(line))
        if lines:
            trial.note("pick", name_of(lines[0]))
        return said

    study.option("only", "", help="one method alone")

    @study.arm(SHORT, label="one seed")
    def short(task: Any, trial: Trial) -> None:
        ask(task, trial, 1, trial.seed)

    @study.arm(LENGTH, against=LENGTH, label=f"{SEEDS} other seeds")
    def at_length(task: Any, trial: Trial) -> None:
        if trial.seed:
            trial.note("not repeated", "asked once, with seeds of its own")
            return
        ask(task, trial, SEEDS, FIRST)

    @study.claim(
        "The first pick of a short advice is the first at length, with every seed", if_fails="two lines lie closer than the seeds do"
    )
    def stands(results: Results) -> Any:
        return bootstrap(lambda same: same, same_pick(results), what="share of short advices whose pick is the one at length") >= 1

    @study.claim("All lines are ranked as at length: Kendall's tau at least 0.8", if_fails="lines that lie close together change places")
    def ranks(results: Results) -> Any:
        return bootstrap(lambda tau: tau, correlations(results), what="Kendall's tau of a short advice's order to that at length") >= 0.8

    @study.summary
    def summary(results: Results) -> str:
        same, tau = same_pick(results), correlations(results)
        return (
            f"Of {len(same)} short advices {int(same.sum())} picked first what {SEEDS} other seeds pick ({first_of(results, LENGTH, 0)}); the "
            f"order of all lines agrees by {tau.mean():.2f} (Kendall's tau). A short advice took {results.say('cpu_seconds', SHORT)}, that at "
            f"length {results.say('cpu_seconds', LENGTH)} of processor time."
        )

    return study


def ranked(said: Answer, job: str) -> list[Line]:
    """The methods' lines of a job, the best first: groups of other measures follow one another as the answer has them."""
    return [line for group in said.groups if group.job == job for line in group.lines if not line.replaced]


def name_of(line: Line) -> str:
    return " ".join([line.slug, *map(str, line.point.choice.values())])


def places(results: Results, arm: str, seed: int) -> dict[str, float]:
    """line -> its place in the order of a seed's advice."""
    return {dict(key)["line"]: by_seed[seed] for key, by_seed in results.curve("place", arm).items() if seed in by_seed}


def first_of(results: Results, arm: str, seed: int) -> str:
    return min(found, key=found.__getitem__) if (found := places(results, arm, seed)) else ""


def _seeds(results: Results) -> Sequence[int]:
    return sorted({row.seed for row in results.rows if row.arm == SHORT})


def same_pick(results: Results) -> Any:
    import numpy as np

    best = first_of(results, LENGTH, 0)
    return np.array([float(first_of(results, SHORT, seed) == best) for seed in _seeds(results)])


def correlations(results: Results) -> Any:
    """Kendall's tau of each short advice's order to that at length, over the lines that both have."""
    import numpy as np
    from scipy.stats import kendalltau

    whole, found = places(results, LENGTH, 0), []
    for seed in _seeds(results):
        mine = places(results, SHORT, seed)
        both = [line for line in whole if line in mine]
        tau: Any = kendalltau([whole[line] for line in both], [mine[line] for line in both])
        found.append(tau.statistic)
    return np.array(found, dtype=float)
