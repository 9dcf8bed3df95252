"""The first to finish, voting, the last to finish, budget forcing, beams: how often each is right, how long one waits, how many tokens it costs.

A small reasoner writes out its sums step by step, briefly or at length as it happens to begin; each further step may slip. A second one,
whose brief traces were learnt with guesses in them, is the case where the first to finish is the wrong one to take.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fewer.inputs import read_pairs
from fewer.language._shared.model_directory import load_directory
from fewer.language.first_finish_search.engine.sampling import RaceConfig
from fewer.language.first_finish_search.problems import CHARACTERS, LETTERS, fetch_reasoner, final_answer, last_answer, steps_of, sums
from fewer.language.first_finish_search.search import beam, budget_forcing, ffs_generate, last_finish, majority_vote
from fewer.language.first_finish_search.serving.client import AsyncFFS
from fewer.language.first_finish_search.serving.server import Server
from fewer.language.first_finish_search.theory import diagnose, expected_min, replay
from fewer.language.first_finish_search.traces import FFSResult, choose
from fewer.study import Curve, Figure, Results, Scale, Study, Tradeoff, Trial
from fewer.study.results import NotTestable, bootstrap

N, RECORDED = 4, 8  # samples a race, and traces recorded of a problem
PROBLEMS = {Scale.QUICK: 300, Scale.FULL: 2000}
BEAM_PROBLEMS, SERVED_PROBLEMS, WARNING_PROBLEMS = 100, 40, 100  # enough to see what is large
FLIPPED: dict[str, Any] = {"reasoner": "flipped"}
CURVE = (1, 2, 4, 8)

study = Study(
    "first-finish-search",
    question="Of several samples, how good an answer is the first to finish, and what does stopping there save?",
    baseline="majority-vote",
    figures=[
        Figure("accuracy", "answers right", "%", "higher"),
        Figure("sequential_tokens", "tokens one after the other, a problem"),
        Figure("total_tokens", "tokens in all, a problem"),
        Figure("prefill_tokens", "prompt tokens read, a problem", detail=True),
        Figure("answer.seconds", "time for all problems", "s"),
        Figure("answer.cpu_seconds", "processor time for all problems", "s"),
        Figure("answer.peak_memory", "peak resident memory", "bytes", detail=True),
        Figure("answer.joules", "energy", "J", detail=True),
        Figure("gain", "more right than one sample", "%", "higher", detail=True),
    ],
    charts=[
        Tradeoff("accuracy", "sequential_tokens", title="Answers right against tokens one waits for"),
        Tradeoff("accuracy", "total_tokens", title="Answers right against tokens in all"),
        Curve("measured", over="n", title="Answers right over the number of samples"),
    ],
    objective="share of validation answers that are right",
)
study.option("model", "", help="a model directory, or a server's address up to /v1 (then also data), in place of the small reasoner")
study.option("served_model", "model", help="the model's name at that server")
study.option("data", "", help="a JSONL file of prompt and answer (two lines at least) for that model, in place of sums")
study.option("addends", 4, help="addends of a sum", least=2, most=8)
study.option(
    "max_new_tokens", 0, help="where a sample is cut off; 0: as late as the model's positions allow (a server: its own word)", least=0
)
study.option("temperature", 1.0, help="of sampling", least=0.01, most=10)
study.option("top_p", 1.0, help="of sampling", least=0.01, most=1)

Pairs = Sequence[tuple[str, str]]


@dataclass
class Task:
    """Who answers, and what.

    Attributes:
        place: a model directory, or a server's address.
        flipped: the directory of the second reasoner, None with a user's model.
        given: a user's problems; sums are drawn anew with each seed.
    """

    place: str
    name: str
    flipped: Path | None
    given: Pairs
    addends: int
    config: RaceConfig
    count: int

    @property
    def answer_fn(self) -> Callable[[str], str | None]:
        return final_answer if self.given else last_answer

    @property
    def is_server(self) -> bool:
        return self.place.startswith(("http://", "https://"))

    def problems(self, seed: int, other: bool = False) -> Pairs:
        """What is judged on, or the other half, on which traces are recorded."""
        drawn = self.given or sums(self.addends, 2 * self.count, seed)
        return drawn[1::2] if other else drawn[::2]


@study.task
def task(
    scale: Scale, model: str, served_model: str, data: str, addends: int, max_new_tokens: int, temperature: float, top_p: float
) -> Task:
    if bool(model) != bool(data):
        raise ValueError(
            "model and data belong together; expected both (--set model=... --set data=...), or neither for the small reasoner"
        )
    given = read_pairs(data, ("prompt", "answer")) if data else []
    if len(given) == 1:
        raise ValueError(f"{data} holds one problem; expected at least two: one half is raced on, on the other traces are recorded")
    config = RaceConfig(n=N, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens or None, max_rows=64 if model else 256)
    if not model:
        flipped = fetch_reasoner(addends, flipped=True)
        return Task(str(fetch_reasoner(addends)), "", flipped, [], addends, config, PROBLEMS[scale])
    if not model.startswith(("http://", "https://")):
        load_directory(model)
    return Task(model, served_model, None, given, addends, config, len(given))


class Racers:
    """One model, in this process or behind a server, raced in any way."""

    def __init__(self, task: Task, trial: Trial, place: str | Path) -> None:
        self.task, self.seed = task, trial.seed
        self.model, self.tokenizer = (None, None) if task.is_server else load_directory(place)
        if self.model is not None:
            self.model.to(trial.device)

    def race(self, pairs: Pairs, n: int = N, k: int = 1, whole: bool = False, longest: bool = False, **words: Any) -> list[FFSResult]:
        """FFS-k@n; `whole`: all run to their end; `longest`: and the k longest vote."""
        prompts, config = [prompt for prompt, _ in pairs], replace(self.task.config, n=n, k=k, seed=self.seed, **words)
        if self.model is not None:
            way = last_finish if longest else majority_vote if whole else ffs_generate
            return way(self.model, prompts, self.tokenizer, config, answer_fn=self.task.answer_fn)
        results = asyncio.run(self._ask(prompts, config, n if whole or longest else k))
        if not longest:
            return results
        chosen = []
        for result in results:
            finished = sorted((r for r in range(n) if result.rows[r].finished), key=lambda r: result.rows[r].tokens)
            row, answer = choose(result.rows, finished, k, self.task.answer_fn, True)
            chosen.append(replace(result, winner=row, answer=answer, text=result.rows[row].text, finished=result.rows[row].finished))
        return chosen

    async def _ask(self, prompts: Sequence[str], config: RaceConfig, wait: int) -> list[FFSResult]:
        sampling: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p}
        if config.max_new_tokens:
            sampling["max_tokens"] = config.max_new_tokens
        async with AsyncFFS(self.task.place, self.task.name, n=config.n, answer_fn=self.task.answer_fn) as ffs:
            return await ffs.map(prompts, seed=config.seed, k=wait if wait == config.n else config.k, wait=wait, **sampling)


def right(results: Sequence[FFSResult], pairs: Pairs) -> np.ndarray:
    """Which answers are right."""
    return np.array([result.answer == gold for result, (_, gold) in zip(results, pairs, strict=True)])


def log_results(trial: Trial, results: Sequence[FFSResult], pairs: Pairs, **at: Any) -> None:
    trial.log("accuracy", right(results, pairs).mean(), **at)
    for figure in ("sequential_tokens", "total_tokens", "prefill_tokens"):
        trial.log(figure, float(np.mean([getattr(result, figure) for result in results])), **at)


Way = Callable[[Racers, Pairs], list[FFSResult]]


def answers(
    task: Task, trial: Trial, way: Way, *, flipped: bool = False, count: int | None = None, seedless: bool = False, here: bool = False
) -> list[FFSResult]:
    """Answer all problems in one way.

    Args:
        flipped: with the second reasoner too.
        count: of problems, all by default.
        seedless: it draws nothing.
        here: it needs the model in this process.
    """
    if seedless and trial.seed:
        trial.note("not repeated", "this arm draws nothing: with the first seed alone")
        return []
    if here and task.is_server:
        trial.note("left out", "this arm needs the model in this process")
        return []
    pairs, racers = task.problems(trial.seed)[:count], Racers(task, trial, task.place)
    if not task.given:
        trial.note("reasoner", f"trained for {steps_of(Path(task.place))} steps")
    with trial.measure("answer"):
        results = way(racers, pairs)
    log_results(trial, results, pairs)
    if flipped and task.flipped:
        log_results(trial, way(Racers(task, trial, task.flipped), pairs), pairs, **FLIPPED)
    return results


def answer(task: Task, trial: Trial, way: Way, **words: Any) -> None:
    """`answers` as an arm."""
    answers(task, trial, way, **words)


def forced(racers: Racers, pairs: Pairs) -> list[FFSResult]:
    """One re-check of the last addend, or "Wait" for a user's model."""
    task = racers.task
    how: dict[str, Any] = {} if task.given else {"continuation": LETTERS[task.addends - 1], "before": [CHARACTERS.index("A")]}
    config = replace(task.config, seed=racers.seed)
    return budget_forcing(racers.model, [p for p, _ in pairs], racers.tokenizer, config, answer_fn=task.answer_fn, **how)


def beams(racers: Racers, pairs: Pairs) -> list[FFSResult]:
    task = racers.task
    return beam(racers.model, [prompt for prompt, _ in pairs], racers.tokenizer, task.config, answer_fn=task.answer_fn, length_penalty=1.0)


def random_of_all(racers: Racers, pairs: Pairs) -> list[FFSResult]:
    """One of n whole samples, drawn: all are paid for, none is chosen."""
    draw, results = np.random.default_rng(racers.seed), racers.race(pairs, k=1, longest=True)
    drawn = draw.integers(N, size=len(results))
    return [replace(r, answer=racers.task.answer_fn(r.rows[row].text), winner=int(row)) for r, row in zip(results, drawn, strict=True)]


study.arm_table(
    answer,
    {
        "simple": {"way": lambda racers, pairs: racers.race(pairs, n=1), "label": "one sample", "flipped": True},
        "greedy": {
            "way": lambda racers, pairs: racers.race(pairs, n=1, temperature=0.0),
            "label": "greedy",
            "seedless": True,
            "here": True,
        },
        "beam": {"way": beams, "label": "beam search, width 4", "count": BEAM_PROBLEMS, "seedless": True, "here": True},
        "budget-forcing": {"way": forced, "label": "budget forcing", "here": True},
        "majority-vote": {"way": lambda racers, pairs: racers.race(pairs, k=N, whole=True), "label": "majority vote @4", "flipped": True},
        "ffs-2": {"way": lambda racers, pairs: racers.race(pairs, k=2), "label": "FFS-2@4"},
        "last-finish": {"way": lambda racers, pairs: racers.race(pairs, longest=True), "label": "last finish @4"},
        "random": {"way": random_of_all, "label": "one of 4, drawn"},
    },
)


@study.arm("ffs", label="FFS@4")
def ffs(task: Task, trial: Trial) -> None:
    log_foresight(task, trial, task.place)
    if task.flipped:
        log_foresight(task, trial, task.flipped, WARNING_PROBLEMS, **FLIPPED)
    results = answers(task, trial, lambda racers, pairs: racers.race(pairs), flipped=True)
    racers, pairs = Racers(task, trial, task.place), task.problems(trial.seed)
    first, one = (right(each, pairs).astype(float) for each in (results, racers.race(pairs, n=1)))
    gain = first - one
    drawn = np.random.default_rng(0).integers(len(gain), size=(2000, len(gain)))
    trial.log("gain", gain.mean())
    trial.log("gain_low", np.quantile(gain[drawn].mean(1), 0.1))  # one-sided 90 %, paired over problems
    for n in CURVE:
        trial.log("measured", (first if n == N else one if n == 1 else right(racers.race(pairs, n=n), pairs)).mean(), n=n)


def log_foresight(task: Task, trial: Trial, place: str | Path, count: int | None = None, **at: Any) -> None:
    """What traces recorded on the other half of the problems say before any race is run."""
    pairs, racers = task.problems(trial.seed, other=True)[:count], Racers(task, trial, place)
    recorded = racers.race(pairs, n=RECORDED, k=RECORDED, whole=True)
    lengths = [[row.tokens for row in result.rows] for result in recorded]
    answers = [[task.answer_fn(row.text) if row.finished else None for row in result.rows] for result in recorded]
    correct = [[each == gold for each in said] for said, (_, gold) in zip(answers, pairs, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diagnosis = diagnose(lengths, correct)
    trial.log("warned", len(diagnosis.warnings), **at)
    trial.note("diagnosis" + ", flipped" * bool(at), str(diagnosis).replace("\n", "; "))
    pooled = np.array(lengths, dtype=float)
    trial.log("law", expected_min(pooled.mean(), max(pooled.std(), 1e-6), N) / pooled.mean(), **at)
    table = [
        (problem, sample, lengths[problem][sample], answers[problem][sample], gold)
        for problem, (_, gold) in enumerate(pairs)
        for sample in range(RECORDED)
    ]
    for n in CURVE:
        trial.log("replayed", replay(table, n).ffs.accuracy, n=n, **at)
        if n in diagnosis.predicted:
            trial.log("predicted", diagnosis.predicted[n], n=n, **at)


@study.arm("ffs-served", label="FFS@4 over a server")
def ffs_served(task: Task, trial: Trial) -> None:
    """The same model behind the smallest server: what the server generates when the losers' connections are closed, and when they are not."""
    if task.is_server:
        answer(task, trial, lambda racers, pairs: racers.race(pairs))
        return
    model, tokenizer = load_directory(task.place)
    pairs, config = task.problems(trial.seed)[:SERVED_PROBLEMS], task.config

    async def ask(wait: int) -> tuple[list[FFSResult], int]:
        server = Server(model.to(trial.device), tokenizer)
        sampling: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p}
        async with server.running() as url, AsyncFFS(url, "model", n=N, chat=False, answer_fn=task.answer_fn) as client:
            results = await client.map([p for p, _ in pairs], concurrency=1, seed=trial.seed * 10**6, wait=wait, **sampling)
        return results, server.generated

    with trial.measure("answer"):
        results, generated = asyncio.run(ask(1))
    log_results(trial, results, pairs)
    trial.log("generated", generated / len(pairs))
    trial.log("generated_whole", asyncio.run(ask(N))[1] / len(pairs))


# What the paper claims

SHORTER = "R1 on AIME24: 6.1k tokens one after the other at n = 8, against 9.3k (one sample) and 13.2k (vote)"


def reasoner_only(results: Results) -> None:
    if not any("reasoner" in row.coordinates for row in results.rows):
        raise NotTestable("needs the second reasoner, which a model of your own has not")


@study.claim(
    "The first of 4 is at least as often right as one sample (paired over problems, one-sided 90 %)",
    paper="R1: 82.23 % on AIME24 and AIME25, about 15 % over one sample",
)
def right_as_often(results: Results) -> Any:
    return results.mean("gain_low", "ffs") >= 0


@study.claim("It takes fewer tokens one after the other than one sample, a vote of 4 and budget forcing", paper=SHORTER)
def waits_less(results: Results) -> Any:
    one, vote, budget = (results.ratio("sequential_tokens", "ffs", other) for other in ("simple", "majority-vote", "budget-forcing"))
    return (one < 1) & (vote < 1) & (budget < 1)


@study.claim(
    "Its tokens in all are the share of a vote's that the length law foretells, to within 10 %",
    paper="up to 45 % fewer tokens than voting or budget forcing",
    if_fails="the law is that of normal lengths, and those of written-out sums come in a few sizes",
)
def tokens_by_law(results: Results) -> Any:
    values = (results.values(*each) for each in (("total_tokens", "ffs"), ("total_tokens", "majority-vote"), ("law", "ffs")))
    return bootstrap(lambda mine, vote, law: mine / vote / law, *values, what="tokens in all, FFS@4 / vote @4 / the law").between(0.9, 1.1)


@study.claim(
    "The last of 4 to finish is the worst of the parallel ways", paper="R1: short traces 95 % (easy) and 61 % right, long ones 72 and 48 %"
)
def last_is_worst(results: Results) -> Any:
    first, second, vote, drawn = (
        results.difference("accuracy", "last-finish", o) <= 0 for o in ("ffs", "ffs-2", "majority-vote", "random")
    )
    return first & second & vote & drawn


@study.claim(
    "Where brief traces were learnt with guesses, the first of 4 is less often right than one sample, and the diagnosis warns before",
    paper="Qwen3-32B on AIME24: 70.8 % with one sample, 40.0 % with FFS@8",
)
def loses_where_it_must(results: Results) -> Any:
    reasoner_only(results)
    return (results.difference("accuracy", "ffs", "simple", **FLIPPED) < 0) & (results.mean("warned", "ffs", **FLIPPED) >= 1)


@study.claim(
    "Replayed traces of other problems foretell its accuracy at n = 1, 2, 4 and 8 to within 5 points",
    paper="replayed: 75.0, 79.1, 82.9 and 86.7 % at n = 1, 2, 4 and 8 (R1, AIME24)",
)
def replay_foretells(results: Results) -> Any:
    def miss(n: int) -> Any:
        pair = results.values("measured", "ffs", n=n), results.values("replayed", "ffs", n=n)
        return bootstrap(lambda a, b: a - b, *pair, what=f"answers right, measured - replayed (n {n})").between(-0.05, 0.05)

    one, two, four, eight = (miss(n) for n in CURVE)
    return one & two & four & eight


@study.claim(
    "A server generates at most 0.9 of the tokens when the losers' connections are closed", paper="servers abort a request on disconnect"
)
def cancellation_saves(results: Results) -> Any:
    pair = results.values("generated", "ffs-served"), results.values("generated_whole", "ffs-served")
    return bootstrap(lambda a, b: a / b, *pair, what="tokens generated by the server, losers closed / not") <= 0.9


@study.summary
def summary(results: Results) -> str:
    def say(figure: str, arm: str, **at: Any) -> str:
        return results.say(figure, arm, **at)

    text = (
        f"The first of 4 samples to finish was right in {say('accuracy', 'ffs')} of problems (one sample {say('accuracy', 'simple')}, a vote of "
        f"4 {say('accuracy', 'majority-vote')}, the last of 4 {say('accuracy', 'last-finish')}) after {say('sequential_tokens', 'ffs')} tokens "
        f"one after the other (one sample {say('sequential_tokens', 'simple')}, a vote {say('sequential_tokens', 'majority-vote')}), for "
        f"{say('total_tokens', 'ffs')} in all (a vote {say('total_tokens', 'majority-vote')})."
    )
    if ("reasoner", "flipped") in {pair for point in results.curve("accuracy", "ffs") for pair in point}:
        text += (
            f" A reasoner whose brief traces were learnt with guesses was right in {say('accuracy', 'ffs', **FLIPPED)} so, and in "
            f"{say('accuracy', 'simple', **FLIPPED)} with one sample."
        )
    return text
