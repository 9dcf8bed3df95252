"""The sparse Walsh-Hadamard transform: subsample, transform, peel, refine; with an unknown sparsity, again with twice the bins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from fewer.signals.spright.bins.bits import Bits, Words, pack, unpack
from fewer.signals.spright.bins.hashing import add_columns, distinct_offsets, partition_columns, span
from fewer.signals.spright.bins.noise import NEGLIGIBLE_NOISE, VARIANCE_FLOOR, bin_variance, is_level, luckiest, noise_of_spectrum
from fewer.signals.spright.bins.offsets import Design, Offsets, choose_offsets
from fewer.signals.spright.bins.peeling import ZERO, Limits, peel
from fewer.signals.spright.bins.plan import Plan, WHTConfig
from fewer.signals.spright.bins.queries import QueryLog
from fewer.signals.spright.bins.refining import refine as fit_together
from fewer.signals.spright.spectrum import SparseSpectrum
from fewer.signals.spright.transform import bins_of, fwht

MAX_QUERIES = 100_000  # of the rounds of an unknown sparsity together, where the caller sets no limit
ROUNDING = 1e-12  # of the samples' root mean square: what is below is rounding


def sparse_wht(
    f: Callable[[Any], Any],
    n: int,
    *,
    sparsity: int | None = None,
    noise_std: float | None = None,
    design: Design = "so",
    groups: int | None = None,
    bins: int | None = None,
    max_queries: int | None = None,
    max_degree: int | None = None,
    seed: int = 0,
    refine: bool = True,
    progress: bool = True,
    config: WHTConfig | None = None,
) -> SparseSpectrum:
    """Find the few coefficients of f(m) = sum_k X[k] (-1)^<k,m> from O(K n) chosen queries (SPRIGHT, arXiv 1508.06336).

    With `sparsity` or `bins` there is one round. Without, the number of bins B doubles until no bin holds more than was found or the
    queries end. Rounds are nested: the samples of one are half of the next one's, so none is asked again, and what the first half
    suggested is verified on the second. Where a round would take as many samples as f has points, all points are asked and transformed.

    Args:
        f: takes bit vectors [q, n] uint8 and returns q real numbers; called once a batch.
        n: variables; not limited by a word's 64 bits.
        sparsity: K, an upper limit of how many coefficients matter; it chooses groups and bins.
        noise_std: sigma of the noise on a sample; by default estimated from the emptiest bins. Known noise lets the rounds of an unknown
            sparsity stop early.
        design: offsets: "so" needs fewest queries, C B (2.5 n + 12); "nso" C B (n / 2) (n + 1), with a simpler reading; "none" C B
            max(n + 1, 28), for functions without noise.
        groups: C, at least 2; by default what takes fewest queries.
        bins: B, a power of two, in place of the one that follows from `sparsity`.
        max_queries: the most points that may be asked; default 100,000 with unknown sparsity, no limit with a known one.
        max_degree: look only for indices of at most so many ones; needs far fewer queries where such indices are few.
        seed: of the matrices and offsets.
        refine: fit all coefficients together at the end, in O(K^3), and drop those below 3 standard errors.
        progress: show a bar on a terminal when queries take more than a second.
        config: what is seldom changed.

    Returns:
        The spectrum, the largest coefficients first.

    Raises:
        ValueError: an argument out of range, too few queries for one round, or answers of f that are no finite real numbers.
        Exception: f's own, with a note of how many queries were spent.

    Examples:
        >>> def f(m): return 3.0 - 2.0 * (-1.0) ** (m[:, 0] + m[:, 199])
        >>> spectrum = sparse_wht(f, 200, sparsity=2)
        >>> spectrum.values.round(6).tolist(), [np.flatnonzero(k).tolist() for k in spectrum.indices]
        ([3.0, -2.0], [[], [0, 199]])
    """
    plan = Plan(n, sparsity, noise_std, design, groups, bins, max_queries, max_degree, config or WHTConfig())
    rng = np.random.default_rng(seed)
    offsets = choose_offsets(n, design, max_degree, rng, plan.config.rate)
    log = QueryLog(f, n, plan.config.batch_size, plan.config.executor, progress)
    budget = math.inf if plan.fixed and max_queries is None else max_queries or MAX_QUERIES
    groups, width = plan.size
    sampling = Sampling(plan, groups, offsets)
    spectrum = None
    while True:
        if groups * width * len(offsets.points) >= 2**n and 2**n <= budget:
            return _whole(plan, log)
        if not sampling.grow(width, rng, log, budget):
            break
        spectrum, explained = _recover(plan, sampling, log, refine)
        if plan.fixed or width == 2**n or (spectrum.converged and explained):
            break
        width *= 2
    if spectrum is None:
        raise ValueError(
            f"max_queries is {max_queries or MAX_QUERIES}, and one round needs {log.unasked} queries ({groups} groups x {width} bins x "
            f"{len(offsets.points)} offsets); raise max_queries to that, or use fewer bins or groups, or max_degree"
        )
    return spectrum


@dataclass
class Sampling:
    """The samples u[c, l, p] = f(M_c l + d_p), which grow with the columns of M_c."""

    plan: Plan
    groups: int
    offsets: Offsets
    columns: list[Bits] = field(default_factory=list)
    values: Float64[np.ndarray, "groups bins offsets"] | None = None

    def grow(self, width: int, rng: np.random.Generator, log: QueryLog, budget: float) -> bool:
        """Take the samples for this many bins, as far as they are missing; False, with nothing asked, where the budget does not reach."""
        b, n = width.bit_length() - 1, self.plan.n
        old = self.columns or [np.zeros((0, n), dtype=np.uint8)] * self.groups
        if self.plan.config.hashing == "partition":
            if self.groups * b > n:
                return False
            columns = [partition_columns(c, self.groups, b, n) for c in range(self.groups)]
        else:
            columns = [add_columns(each, b, rng) for each in old]
        points = np.stack([span(pack(each)) for each in columns])[:, :, None] ^ self.offsets.words
        numbers = log.number(points.reshape(-1, points.shape[-1])).reshape(points.shape[:-1])
        if log.queries + log.unasked > budget:
            return False
        self.columns, self.values = columns, log.answers(numbers)
        return True

    @property
    def words(self) -> Words:
        """The columns of every M_c, packed [C, b, W]."""
        b, words = len(self.columns[0]), self.offsets.words.shape[1]
        return np.stack([pack(each) for each in self.columns]) if b else np.zeros((len(self.columns), 0, words), dtype=np.uint64)

    @property
    def distinct(self) -> np.ndarray:
        """Offsets of each group [C] that differ modulo the span of M_c: the others see the same samples."""
        return np.array([distinct_offsets(columns, self.offsets.points) for columns in self.columns])


class Explained(NamedTuple):
    """A spectrum, and whether noise that had to be estimated is too little to go on for."""

    spectrum: SparseSpectrum
    enough: bool


def _recover(plan: Plan, sampling: Sampling, log: QueryLog, refine: bool) -> Explained:
    """Transform the samples, peel the bins, fit what was found, and check what is left."""
    assert sampling.values is not None
    bins = bins_of(sampling.values, plan.config.device)
    _, width, offsets = bins.shape
    energies, distinct = (bins**2).mean(axis=2), sampling.distinct
    variance = 0.0 if plan.design == "none" else bin_variance(plan, energies, distinct)
    columns, words = sampling.words, sampling.offsets.words
    limits = limits_of(plan, variance, distinct, rounding=ROUNDING * math.sqrt((sampling.values**2).mean()))
    left = bins.copy()
    found = peel(left, columns, sampling.offsets, plan.n, limits)
    settled = found.state == ZERO
    if refine and len(found.indices):
        repeats = sampling.values.size / log.queries
        fitted = fit_together(bins, left, settled, columns, words, found.indices, repeats, limits.floor)
        indices, values, stderr, variance, left = fitted
        if plan.design != "none":  # held against the fitted noise, which is not as low as the emptiest bins suggest
            settled |= (left**2).mean(axis=2) <= excess(distinct)[:, None] * variance
    else:
        kept = found.values != 0
        indices, values = found.indices[kept], found.values[kept]
        stderr = np.full(len(values), math.sqrt(variance / offsets))
    noise = variance * width
    rounding = VARIANCE_FLOOR * float(energies.max()) * width
    carried = float((values[indices.any(axis=1)] ** 2).sum())  # by the spectrum, the constant aside
    given = plan.design == "none" or plan.noise_std is not None
    checked = given or noise <= rounding or (noise <= carried and is_level((left**2).mean(axis=2), distinct))
    spectrum = _largest_first(plan.n, indices, values, stderr, log.queries, int((~settled).sum()), bool(settled.all() and checked), noise)
    return Explained(spectrum, given or noise <= max(NEGLIGIBLE_NOISE * carried, rounding))


def _largest_first(
    n: int, indices: Words, values: np.ndarray, stderr: np.ndarray, queries: int, residual_bins: int, converged: bool, noise: float
) -> SparseSpectrum:
    order = np.argsort(-np.abs(values), kind="stable")
    return SparseSpectrum(unpack(indices, n)[order], values[order], stderr[order], queries, residual_bins, converged, math.sqrt(noise))


def _whole(plan: Plan, log: QueryLog) -> SparseSpectrum:
    """The full transform of all 2^n points, less what noise alone would give."""
    points = span(pack(np.eye(plan.n, dtype=np.uint8)))  # bit i of the row number is m_i: the rows are indices, too
    answers = log.answers(log.number(points))
    transform = fwht(answers)
    least = ROUNDING * math.sqrt((answers**2).mean())
    variance = 0.0 if plan.noiseless else noise_of_spectrum(transform, plan.noise_std)
    stderr = math.sqrt(variance)
    kept = np.abs(transform) > max(least, luckiest(len(transform)) * stderr)
    kept &= np.abs(transform) >= plan.config.min_magnitude
    if plan.max_degree is not None:
        kept &= unpack(points, plan.n).sum(axis=1) <= plan.max_degree
    values = transform[kept]
    return _largest_first(plan.n, points[kept], values, np.full(len(values), stderr), log.queries, 0, True, variance * 2**plan.n)


def limits_of(plan: Plan, variance: float, distinct: np.ndarray, rounding: float) -> Limits:
    """(1 + gamma) nu^2 and rho_min. Below nu sqrt(2 n ln 2 / P) even the best of 2^n signatures is no more than what noise alone offers."""
    degree = plan.n if plan.max_degree is None else plan.max_degree
    if plan.design == "none":
        return Limits(True, rounding, np.zeros(len(distinct)), np.zeros(len(distinct)), degree)
    by_chance = np.sqrt(variance * 2 * plan.n * math.log(2) / distinct)
    return Limits(False, rounding, excess(distinct) * variance, np.maximum(by_chance, plan.config.min_magnitude), degree)


def excess(distinct: np.ndarray) -> np.ndarray:
    """1 + gamma, with gamma = 0.5 + 2 sqrt(2 / P) (not in the paper, which has some constant); P counts `Sampling.distinct` offsets."""
    return 1.5 + 2 * np.sqrt(2 / distinct)
