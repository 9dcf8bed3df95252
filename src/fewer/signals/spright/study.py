"""How few queries find a sparse spectrum: against the full transform, LASSO on monomials, and sparse-transform.

Three parts: exact recovery over noise on functions that are sparse; time and queries over N; and functions that are what they are:
networks as cut functions, and tree ensembles trained on the breast-cancer data. Or one function of yours: `--set data=FILE.npy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewer.errors import UserError
from fewer.inputs import map_array
from fewer.meters import median_seconds
from fewer.signals.spright.bins.queries import ArrayFunction
from fewer.signals.spright.peers import PeerSignal, lasso_on_pairs
from fewer.signals.spright.problems import (
    LARGEST,
    Model,
    Network,
    Noisy,
    PythonFunction,
    Yours,
    exact_support,
    k_sparse,
    k_sparse_array,
    r_squared,
    trained_models,
)
from fewer.signals.spright.recovery import sparse_wht
from fewer.signals.spright.spectrum import SparseSpectrum
from fewer.signals.spright.transform import fwht
from fewer.study import Curve, Estimate, Figure, NotTestable, Results, Scale, Study, Trial

DECIBELS = (-5, -2.5, 0, 2.5, 5, 7.5, 10, 15)  # |X|^2 over the noise variance nu^2 of one of 64 bins
VARIABLES, SPARSITY, BINS = 20, 32, 64  # of the functions over noise
LENGTHS = (14, 16, 18, 20, 22, 24, 26)  # log2 N of the arrays
ARRAY_SPARSITY = 64
COUNTED = (12, 16, 20, 24, 28, 32, 36, 40)  # variables over which queries are counted
COUNTED_SPARSITY = 4  # small enough that even 2^12 points are not all asked
BUDGETS = (2_000, 8_000, 32_000)
BOOSTED, FOREST = ({"model": model, "budget": 8_000} for model in ("boosted trees", "random forest"))
REPEATS = 3  # of a timed transform, the median counts
YOURS = {"data": "yours"}
BUDGET = 8_000  # queries of LASSO and of sparse-transform on your function

study = Study(
    "spright",
    question="How few chosen queries give the spectrum that the full transform or a list of monomials would?",
    baseline="fwht",
    figures=[
        Figure("accuracy", "exact support at 10 dB", "%", "higher", at={"decibels": 10}),
        Figure("queries", "queries, 40 variables, K = 4", at={"variables": 40}),
        Figure("cpu_seconds", "processor time on 2^26 entries", "s", at={"n": 26}),
        Figure("queries", "entries of 2^26 read", at={"n": 26}),
        Figure("time_exponent", "e of time ~ N^e"),
        Figure("error", "1 - R^2, boosted trees, 8,000 queries", "%", at=BOOSTED),
        Figure("error", "1 - R^2, random forest, 8,000 queries", "%", at=FOREST),
        Figure("edges_right", "edges of Les Miserables right", "%", "higher", at={"network": "les-miserables"}),
        Figure("cut_queries", "cut queries, Les Miserables", at={"network": "les-miserables"}),
        Figure("accuracy", "exact support", "%", "higher"),
        Figure("error", "1 - R^2, your function", "%", at=YOURS),
        Figure("queries", "queries, your function", at=YOURS),
        Figure("cpu_seconds", "processor time, your function", "s", at=YOURS),
        Figure("queries", "queries"),
        Figure("cpu_seconds", "processor time on an array of 2^n", "s"),
        Figure("explain.seconds", "time to explain an ensemble", "s", detail=True),
    ],
    charts=[
        Curve("accuracy", over="decibels", title="Exact recovery over noise (n = 20, K = 32)"),
        Curve("cpu_seconds", over="n", log=True, title="Processor time on an array of 2^n (K = 64)"),
        Curve("queries", over="variables", log=True, title="Queries over the number of variables (K = 4)"),
    ],
    time_limit=3600,
)


study.option(
    "data",
    "",
    help="your own function of n bits: an .npy file of its 2^n values, the first bit the highest of the index, or module:name:BITS in Python",
)


@dataclass(frozen=True)
class Workload:
    """What all arms work on."""

    networks: dict[str, Network]
    models: dict[str, Model]
    yours: Yours | None = None


@study.task
def task(scale: Scale, data: str = "") -> Workload:
    if not data:
        return Workload({name: Network.named(name) for name in ("karate", "les-miserables")}, trained_models())
    try:
        yours = PythonFunction(data) if ":" in data else ArrayFunction(map_array(data, "the 2^n values of a function"))
        return Workload({}, {}, yours)
    except (OSError, ValueError) as mistake:  # in the user's own file
        raise UserError(str(mistake)) from mistake


SIZES = {"instances": 50, "largest": 26}
FULL = {"instances": 500, "largest": 28}


# What an arm does


def over_noise(trial: Trial, recover: Callable[..., SparseSpectrum]) -> None:
    """The fraction of functions whose support is found exactly, and the queries, over the noise."""
    for decibels in DECIBELS:
        std = math.sqrt(BINS / 10 ** (decibels / 10))  # nu^2 = sigma^2 / B, |X| = 1
        exact, queries = 0, 0
        for instance in range(trial.settings["instances"]):
            rng = np.random.default_rng([trial.seed, instance])
            true = k_sparse(VARIABLES, SPARSITY, rng)
            found = recover(Noisy(true, std, rng), VARIABLES, sparsity=SPARSITY, seed=int(rng.integers(2**31)))
            exact += exact_support(found, true)
            queries += found.queries
        trial.log("accuracy", exact / trial.settings["instances"], decibels=decibels)
        trial.log("queries", queries / trial.settings["instances"], decibels=decibels)


def over_lengths(trial: Trial, transform: Callable[[np.ndarray, int], int]) -> None:
    """Time, and queries over N, on arrays of 2^n."""
    lengths = [n for n in (*LENGTHS, 28) if n <= trial.settings["largest"]]
    seconds = []
    for n in lengths:
        _, array = k_sparse_array(n, ARRAY_SPARSITY, np.random.default_rng([trial.seed, n]))
        queries = transform(array, n)
        seconds.append(median_seconds(lambda: transform(array, n), REPEATS, processor=True))  # noqa: B023 - called at once
        trial.log("cpu_seconds", seconds[-1], n=n)
        trial.log("queries", queries, n=n)
    trial.log("time_exponent", np.polyfit(np.array(lengths) * math.log(2), np.log(seconds), 1)[0])


def over_variables(trial: Trial, design: Any) -> None:
    """Queries for the same sparsity as the variables grow."""
    for n in COUNTED:
        found = sparse_wht(lambda m: np.ones(len(m)), n, sparsity=COUNTED_SPARSITY, design=design, seed=trial.seed)
        trial.log("queries", found.queries, variables=n)


def on_networks(networks: dict[str, Network], trial: Trial, recover: Callable[[Network], SparseSpectrum]) -> None:
    """The edges of the networks, from the sizes of cuts."""
    for name, network in networks.items():
        found = recover(network)
        trial.log("edges_right", network.edges_right(found), network=name)
        trial.log("cut_queries", found.queries, network=name)
        trial.log("cut_queries_by_pairs", network.n * (network.n + 1) // 2, network=name)


def on_models(models: dict[str, Model], trial: Trial, explain: Callable[[Model, int], tuple[Model, int, int]]) -> None:
    """R^2 of an explanation of each trained model on fresh inputs; `explain` gives it with its queries and coefficients."""
    for name, model in models.items():
        for budget in BUDGETS:
            with trial.measure("explain", model=name, budget=budget):
                explanation, queries, coefficients = explain(model, budget)
            error = 1 - r_squared(explanation, model, 30, np.random.default_rng([trial.seed, 1]))
            trial.log("error", error, model=name, budget=budget)
            trial.log("queries", queries, model=name, budget=budget)
            trial.log("coefficients", coefficients, model=name, budget=budget)


def on_yours(f: Yours, trial: Trial, explain: Callable[[Yours], tuple[Model, int]]) -> None:
    """The share of your function's variance that is left, what was asked of it, and the processor time."""
    explanation, queries = explain(f)
    trial.log("cpu_seconds", median_seconds(lambda: explain(f), REPEATS, processor=True), **YOURS)
    trial.log("error", 1 - r_squared(explanation, f, f.n, np.random.default_rng([trial.seed, 1])), **YOURS)
    trial.log("queries", queries, **YOURS)


def yours_by_spright(work: Workload, trial: Trial, **settings: Any) -> bool:
    """Whether the run is about your function; if so, the arm on it."""

    def explain(f: Yours) -> tuple[Model, int]:
        found = sparse_wht(f, f.n, seed=trial.seed, progress=False, **settings)
        trial.note("found", f"{len(found)} coefficients, converged: {found.converged}")
        return found, found.queries

    if work.yours:
        on_yours(work.yours, trial, explain)
    return work.yours is not None


def by_spright(trial: Trial, **settings: Any) -> Callable[[Model, int], tuple[Model, int, int]]:
    def explain(model: Model, budget: int) -> tuple[Model, int, int]:
        found = sparse_wht(model, 30, max_queries=budget, seed=trial.seed, progress=False, **settings)
        return found, found.queries, len(found)

    return explain


# The arms


@study.arm("fwht", label="full transform", settings=SIZES, at_full=FULL)
def full(work: Workload, trial: Trial) -> None:
    def transform(array: np.ndarray, n: int) -> int:
        fwht(array)
        return 2**n

    def whole(f: Yours) -> tuple[Model, int]:
        values = fwht(fwht(f.array), normalize=False)
        return ArrayFunction(values), 2**f.n

    if work.yours and work.yours.n > LARGEST:
        return trial.note("left out", f"it would ask your function 2^{work.yours.n} times")
    if work.yours:
        return on_yours(work.yours, trial, whole)
    over_lengths(trial, transform)


@study.arm("spright-so", label="SPRIGHT, fewest queries", settings=SIZES, at_full=FULL)
def sample_optimal(work: Workload, trial: Trial) -> None:
    if yours_by_spright(work, trial):
        return
    over_noise(trial, sparse_wht)
    over_lengths(trial, _looked_up(trial, "so"))
    over_variables(trial, "so")
    on_networks(work.networks, trial, lambda f: sparse_wht(f, f.n, sparsity=f.edges + 1, seed=trial.seed))
    on_models(work.models, trial, by_spright(trial))


@study.arm("spright-nso", label="SPRIGHT, simple reading", settings=SIZES, at_full=FULL)
def near_linear(work: Workload, trial: Trial) -> None:
    if yours_by_spright(work, trial, design="nso"):
        return
    over_noise(trial, lambda f, n, **settings: sparse_wht(f, n, design="nso", **settings))
    over_variables(trial, "nso")


@study.arm("spright-none", label="SPRIGHT without noise", settings=SIZES, at_full=FULL)
def noiseless(work: Workload, trial: Trial) -> None:
    if yours_by_spright(work, trial, design="none"):
        return
    over_lengths(trial, _looked_up(trial, "none"))
    over_variables(trial, "none")
    on_networks(work.networks, trial, lambda f: sparse_wht(f, f.n, sparsity=f.edges + 1, design="none", seed=trial.seed))


@study.arm("spright-degree", against="lasso", label="SPRIGHT, degree <= 3")
def bounded(work: Workload, trial: Trial) -> None:
    if yours_by_spright(work, trial, max_degree=3):
        return
    on_networks(work.networks, trial, lambda f: sparse_wht(f, f.n, sparsity=f.edges + 1, max_degree=2, seed=trial.seed))
    on_models(work.models, trial, by_spright(trial, max_degree=3))


@study.arm("lasso", label="LASSO, degree <= 2")
def lasso(work: Workload, trial: Trial) -> None:
    def explain(model: Model, budget: int) -> tuple[Model, int, int]:
        explanation = lasso_on_pairs(model, 30, budget, np.random.default_rng([trial.seed, budget]))
        return explanation, budget, 1 + 30 + 435

    def yours(f: Yours) -> tuple[Model, int]:
        asked = min(BUDGET, 2**f.n)
        return lasso_on_pairs(f, f.n, asked, np.random.default_rng([trial.seed, asked])), asked

    on_yours(work.yours, trial, yours) if work.yours else on_models(work.models, trial, explain)


@study.arm("sparse-transform", against="lasso", label="sparse-transform")
def peer(work: Workload, trial: Trial) -> None:
    """Its noise level is not estimated: the best of four is taken by R^2 on inputs of its own, which are not counted as queries."""

    def explain(model: Model, budget: int, n: int = 30) -> tuple[Model, int, int]:
        bins = 1 << max(1, int(math.log2(budget / (3 * (n + 1)))))
        scale = float(model(np.random.default_rng(0).integers(0, 2, (500, n), dtype=np.uint8)).std())
        found = [PeerSignal(model, n, bins, noise_std=level * scale).recover() for level in (0.0, 0.1, 0.3, 1.0)]
        best = max(found, key=lambda each: r_squared(each, model, n, np.random.default_rng([trial.seed, 2])))
        return best, best.queries, len(best)

    on_yours(work.yours, trial, lambda f: explain(f, BUDGET, f.n)[:2]) if work.yours else on_models(work.models, trial, explain)


def _looked_up(trial: Trial, design: Any) -> Callable[[np.ndarray, int], int]:
    def transform(array: np.ndarray, n: int) -> int:
        found = sparse_wht(ArrayFunction(array), n, sparsity=ARRAY_SPARSITY, design=design, seed=trial.seed, progress=False)
        return found.queries

    return transform


# What the paper claims


def asked(results: Results) -> Results:
    """The results, unless they are about your own function, of which the paper claims nothing."""
    if any(row.coordinates.get("data") == "yours" for row in results.rows):
        raise NotTestable("this run was about your own function; the claim is about the study's")
    return results


@study.claim("at 10 dB the sample-optimal design finds the exact support in at least 95 % of cases", paper="failure probability O(1/K)")
def sample_optimal_success(results: Results) -> Any:
    return asked(results).mean("accuracy", "spright-so", decibels=10) >= 0.95


@study.claim("at 10 dB the near-linear time design finds the exact support in at least 95 % of cases", paper="failure probability O(1/K)")
def near_linear_success(results: Results) -> Any:
    return asked(results).mean("accuracy", "spright-nso", decibels=10) >= 0.95


@study.claim(
    "noise costs no more than a constant factor: queries(so) / queries(noiseless) changes by less than 1.5 from n = 12 to 40, K = 4",
    paper="O(K log N) samples with noise as without",
    if_fails="without noise, few variables take as many offsets as verification needs, and many take one each: the price of noise rises "
    "between the two and stays from there on; it was flat where every noiseless bin was verified by offsets that do not vote",
)
def constant_price(results: Results) -> Any:
    ratios = np.array([asked(results).ratio("queries", "spright-so", "spright-none", variables=n).per_seed for n in COUNTED])
    spread = ratios.max(axis=0) / ratios.min(axis=0)
    return Estimate(float(spread.mean()), float(spread.min()), float(spread.max()), spread, "largest / smallest price of noise") < 1.5


@study.claim("time grows slower than N (exponent of N below 1), with noise-robust offsets and without", paper="O(K log^2 N) time")
def sublinear_time(results: Results) -> Any:
    return (asked(results).mean("time_exponent", "spright-so") < 1) & (asked(results).mean("time_exponent", "spright-none") < 1)


@study.claim(
    "at 8,000 queries of boosted trees of depth 3, no more of the variance is left (1 - R^2) than by LASSO on pairs",
)
def boosted_trees(results: Results) -> Any:
    return asked(results).difference("error", "spright-degree", "lasso", model="boosted trees", budget=8_000) <= 0


@study.claim(
    "at 8,000 queries of a random forest, no more of the variance is left (1 - R^2) than by LASSO on pairs",
    if_fails="the forest is not sparse: the coefficients found explain as much as any as many do, and the rest lies in hundreds, each "
    "smaller than what all the others together leave in a bin; LASSO fits all single variables and pairs at once",
)
def random_forest(results: Results) -> Any:
    return asked(results).difference("error", "spright-degree", "lasso", model="random forest", budget=8_000) <= 0


@study.claim("every edge of the karate club and of Les Miserables is found with its weight from cut sizes alone, and no other")
def every_edge(results: Results) -> Any:
    def right(arm: str, network: str) -> Any:
        return asked(results).mean("edges_right", arm, network=network) >= 1

    return right("spright-so", "karate") & right("spright-so", "les-miserables") & right("spright-degree", "les-miserables")


@study.summary
def summary(results: Results) -> str:
    say = results.say
    if any(row.coordinates.get("data") == "yours" for row in results.rows):
        return (
            f"Of your function SPRIGHT asked {say('queries', 'spright-so', **YOURS)} values and left {say('error', 'spright-so', **YOURS)} of its "
            f"variance unexplained; the full transform asks {say('queries', 'fwht', **YOURS)}, LASSO on pairs left {say('error', 'lasso', **YOURS)}."
        )
    n = max(dict(point)["n"] for point in results.curve("cpu_seconds", "fwht"))
    faster = results.ratio("cpu_seconds", "fwht", "spright-none", n=n).value
    return (
        f"SPRIGHT found the exact spectrum of {say('accuracy', 'spright-so', decibels=10)} of functions of 20 variables at 10 dB. Of an array of "
        f"2^{n} entries it read {say('queries', 'spright-none', n=n)} and took 1/{faster:.0f} of the full transform's processor time. With 8,000 "
        f"queries it left {say('error', 'spright-degree', **BOOSTED)} of the variance of boosted trees unexplained (LASSO "
        f"{say('error', 'lasso', **BOOSTED)}) and {say('error', 'spright-degree', **FOREST)} of a random forest's (LASSO "
        f"{say('error', 'lasso', **FOREST)}). It found the edges of both networks from cut sizes, but took "
        f"{say('cut_queries', 'spright-degree', network='les-miserables')} cuts for Les Miserables, where asking every pair takes "
        f"{say('cut_queries_by_pairs', 'spright-degree', network='les-miserables')}."
    )
