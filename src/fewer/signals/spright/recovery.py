"""The sparse Walsh-Hadamard transform: subsample, transform, peel, refine; with an unknown sparsity, again with twice the bins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float64

from fewer.signals.spright.bins.bits import Bits, Words, pack, unpack
from fewer.signals.spright.bins.hashing import Hashing, add_columns, distinct_offsets, partition_columns, span
from fewer.signals.spright.bins.offsets import Design, Offsets, choose_offsets
from fewer.signals.spright.bins.peeling import ZERO, Limits, peel
from fewer.signals.spright.bins.queries import Executor, QueryLog
from fewer.signals.spright.bins.refining import refine as fit_together
from fewer.signals.spright.spectrum import SparseSpectrum
from fewer.signals.spright.transform import bins_of

BINS_PER_COEFFICIENT = 1.3  # B >= 1.3 K: with 3 groups three times the threshold of density evolution, 0.4073
FIRST_BINS = 4  # of the rounds with an unknown sparsity
MAX_QUERIES = 100_000  # of those rounds together, where the caller sets no limit
NEGLIGIBLE_NOISE = 1e-3  # of the spectrum's energy: with estimated noise above it, rounds go on while there are queries left
ROUNDING = 1e-12  # of the samples' root mean square: what is below is rounding
VARIANCE_FLOOR = 1e-24  # of the largest bin energy


@dataclass(frozen=True)
class Plan:
    """How the function is subsampled and its bins are read.

    Args:
        groups: C, at least 2.
        design: offsets "so", "nso" or "none".
        hashing: "random" or "partition".
        rate: of the code of "so": 2 or 3 outputs a step.
        noise_std: sigma of a sample; None estimates it.
        max_degree: the most ones an index may have, or None.
        min_magnitude: rho, the least magnitude of a coefficient, where it is known.
    """

    groups: int = 3
    design: Design = "so"
    hashing: Hashing = "random"
    rate: int = 2
    noise_std: float | None = None
    max_degree: int | None = None
    min_magnitude: float = 0.0


def sparse_wht(
    f: Callable[[Any], Any],
    n: int,
    *,
    sparsity: int | None = None,
    noise_std: float | None = None,
    design: Design = "so",
    groups: int = 3,
    bins: int | None = None,
    max_queries: int | None = None,
    max_degree: int | None = None,
    hashing: Hashing = "random",
    rate: int = 2,
    min_magnitude: float = 0.0,
    seed: int = 0,
    refine: bool = True,
    progress: bool = True,
    batch_size: int = 4096,
    executor: Executor | None = None,
    device: str | None = None,
) -> SparseSpectrum:
    """Find the few coefficients of f(m) = sum_k X[k] (-1)^<k,m> from O(K n) chosen queries (SPRIGHT, arXiv 1508.06336).

    With `sparsity` or `bins` there is one round. Without, the number of bins B doubles until no bin holds more than was found or the
    queries end. Rounds are nested: the samples of one are half of the next one's, so none is asked again, and what the first half
    suggested is verified on the second.

    Args:
        f: takes bit vectors [q, n] uint8 and returns q real numbers; called once a batch.
        n: variables; not limited by a word's 64 bits.
        sparsity: K, an upper limit of how many coefficients matter; B becomes the smallest power of two >= 1.3 K.
        noise_std: sigma of the noise on a sample; by default estimated from the emptiest bins. Known noise lets the rounds of an unknown
            sparsity stop early.
        design: offsets: "so" needs fewest queries, C B (2.5 n + 12); "nso" C B (n / 2) (n + 1), with a simpler reading; "none" C B
            (n + 17), for functions without noise.
        groups: C, at least 2.
        bins: B, a power of two, in place of the one that follows from `sparsity`.
        max_queries: the most points that may be asked; default 100,000 with unknown sparsity, no limit with a known one.
        max_degree: look only for indices of at most so many ones; needs far fewer queries where such indices are few.
        hashing: "random" matrices of full rank, or "partition" into disjoint coordinates (needs C log2(B) <= n).
        rate: outputs a step of the code of "so": 2, or 3 for more noise.
        min_magnitude: rho: smaller coefficients are taken for noise.
        seed: of the matrices and offsets.
        refine: fit all coefficients together at the end, in O(K^3), and drop those below 3 standard errors.
        progress: show a bar on a terminal when queries take more than a second.
        batch_size: rows of a call of f.
        executor: with `map(f, batches)`, in order: concurrent.futures' executors, multiprocessing's or Ray's pools. The result is the same.
        device: a torch device on which the groups' transforms are made, such as "cuda"; by default NumPy arrays stay where they are.

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
    plan = Plan(groups, design, hashing, rate, noise_std, max_degree, min_magnitude)
    check_arguments(plan, n, sparsity, bins, max_queries, batch_size)
    rng = np.random.default_rng(seed)
    offsets = choose_offsets(n, design, max_degree, rng, rate)
    log = QueryLog(f, n, batch_size, executor, progress)
    width = bins or bins_for(sparsity, n)
    fixed = width is not None
    budget = math.inf if fixed and max_queries is None else max_queries or MAX_QUERIES
    sampling = Sampling(plan, n, offsets)
    spectrum = None
    width = width or min(FIRST_BINS, 2**n)
    while sampling.grow(width, rng, log, budget):
        spectrum, explained = _recover(plan, n, sampling, log, sparsity, refine, device)
        if fixed or width == 2**n or (spectrum.converged and explained):
            break
        width *= 2
    if spectrum is None:
        raise ValueError(
            f"max_queries is {max_queries or MAX_QUERIES}, and one round needs {log.unasked} queries ({groups} groups x {width} bins x "
            f"{len(offsets.points)} offsets); raise max_queries to that, or use fewer bins or groups, or max_degree"
        )
    return spectrum


def bins_for(sparsity: int | None, n: int) -> int | None:
    """The smallest power of two >= 1.3 K, at most 2^n.

    >>> bins_for(40, 20), bins_for(3, 1)
    (64, 2)
    """
    return None if sparsity is None else min(1 << math.ceil(math.log2(BINS_PER_COEFFICIENT * sparsity)), 2**n)


@dataclass
class Sampling:
    """The samples u[c, l, p] = f(M_c l + d_p), which grow with the columns of M_c."""

    plan: Plan
    n: int
    offsets: Offsets
    columns: list[Bits] = field(default_factory=list)
    values: Float64[np.ndarray, "groups bins offsets"] | None = None

    def grow(self, width: int, rng: np.random.Generator, log: QueryLog, budget: float) -> bool:
        """Take the samples for this many bins, as far as they are missing; False, with nothing asked, where the budget does not reach."""
        b = width.bit_length() - 1
        old = self.columns or [np.zeros((0, self.n), dtype=np.uint8)] * self.plan.groups
        if self.plan.hashing == "partition":
            if self.plan.groups * b > self.n:
                return False
            columns = [partition_columns(c, self.plan.groups, b, self.n) for c in range(self.plan.groups)]
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


def _recover(
    plan: Plan, n: int, sampling: Sampling, log: QueryLog, sparsity: int | None, refine: bool, device: str | None
) -> tuple[SparseSpectrum, bool]:
    """Transform the samples, peel the bins, fit what was found; and whether noise that had to be estimated is too little to go on for."""
    assert sampling.values is not None
    bins = bins_of(sampling.values, device)
    _, width, offsets = bins.shape
    energies = (bins**2).mean(axis=2)
    variance = 0.0 if plan.design == "none" else bin_variance(plan, n, energies, sparsity)
    columns, words = sampling.words, sampling.offsets.words
    limits = limits_of(plan, n, sampling, variance, rounding=ROUNDING * math.sqrt((sampling.values**2).mean()))
    left = bins.copy()
    found = peel(left, columns, sampling.offsets, n, limits)
    settled = found.state == ZERO
    if refine and len(found.indices):
        repeats = sampling.values.size / log.queries
        indices, values, stderr, variance = fit_together(bins, left, settled, columns, words, found.indices, repeats)
    else:
        kept = found.values != 0
        indices, values = found.indices[kept], found.values[kept]
        stderr = np.full(len(values), math.sqrt(variance / offsets))
    noise = variance * width
    rounding = VARIANCE_FLOOR * float(energies.max()) * width
    carried = float((values[indices.any(axis=1)] ** 2).sum())  # by the spectrum, the constant aside
    given = plan.design == "none" or plan.noise_std is not None
    order = np.argsort(-np.abs(values), kind="stable")
    spectrum = SparseSpectrum(
        unpack(indices, n)[order],
        values[order],
        stderr[order],
        queries=log.queries,
        residual_bins=int((~settled).sum()),
        converged=bool(settled.all() and (given or noise <= max(carried, rounding))),
        noise_std=math.sqrt(noise),
    )
    return spectrum, given or noise <= max(NEGLIGIBLE_NOISE * carried, rounding)


def bin_variance(plan: Plan, n: int, energies: Float64[np.ndarray, "groups bins"], sparsity: int | None) -> float:
    """nu^2 = sigma^2 / B: given, or the 25 % quantile of the bins' energies |U|^2 / P, as long as a quarter of them are expected empty
    (not in the paper); where there are fewer, a quantile that half of those lie below; where there are none, rounding alone."""
    groups, width = energies.shape
    floor = VARIANCE_FLOOR * float(energies.max())
    if plan.noise_std is not None:
        return max(plan.noise_std**2 / width, floor)
    empty = (1 - (sparsity or 0) / 2**n) ** (2**n / width)  # exp(-K / B) where 2^n is large
    if empty / 2 * groups * width < 1:
        return floor
    return max(float(np.quantile(energies, 0.25 if empty >= 0.25 else empty / 2)), floor)


def limits_of(plan: Plan, n: int, sampling: Sampling, variance: float, rounding: float) -> Limits:
    """(1 + gamma) nu^2 with gamma = 0.5 + 2 sqrt(2 / P) (not in the paper, which has some constant), and rho_min.

    P counts offsets that differ modulo the span of M_c: the others see the same samples. Below nu sqrt(2 n ln 2 / P) even the best of
    2^n signatures is no more than what noise alone offers.
    """
    groups = len(sampling.columns)
    degree = n if plan.max_degree is None else plan.max_degree
    if plan.design == "none":
        return Limits(True, rounding, np.zeros(groups), np.zeros(groups), degree)
    effective = np.array([distinct_offsets(columns, sampling.offsets.points) for columns in sampling.columns])
    gamma = 0.5 + 2 * np.sqrt(2 / effective)
    luckiest = np.sqrt(variance * 2 * n * math.log(2) / effective)
    return Limits(False, 0.0, (1 + gamma) * variance, np.maximum(luckiest, plan.min_magnitude), degree)


def check_arguments(plan: Plan, n: int, sparsity: int | None, bins: int | None, max_queries: int | None, batch_size: int) -> None:
    """ValueError naming the first argument out of range."""
    if n < 1:
        raise ValueError(f"n is {n}; expected at least 1 variable")
    if sparsity is not None and not 1 <= sparsity <= 2**n:
        raise ValueError(f"sparsity is {sparsity}; expected 1 to 2^{n}: the coefficients that matter")
    if plan.groups < 2:
        raise ValueError(f"groups is {plan.groups}; expected at least 2: a coefficient found in one is taken out of the others")
    if bins is not None and (bins < 1 or bins & (bins - 1) or bins > 2**n):
        raise ValueError(f"bins is {bins}; expected a power of two up to 2^{n}, such as {min(1 << max(bins, 1).bit_length(), 2**n)}")
    width = bins or bins_for(sparsity, n) or min(FIRST_BINS, 2**n)
    if plan.hashing == "partition" and plan.groups * (width.bit_length() - 1) > n:
        raise ValueError(
            f"hashing is 'partition' with {plan.groups} groups of {width.bit_length() - 1} coordinates and n = {n}; "
            f"expected groups x log2(bins) <= n: use hashing='random', fewer bins or fewer groups"
        )
    if plan.noise_std is not None and not 0 <= plan.noise_std < math.inf:
        raise ValueError(f"noise_std is {plan.noise_std}; expected a finite number of at least 0, or None to estimate it")
    if plan.design == "none" and plan.noise_std:
        raise ValueError(f"noise_std is {plan.noise_std} and design is 'none', which reads functions without noise; use 'so' or 'nso'")
    for name, value, choices in (
        ("design", plan.design, ("so", "nso", "none")),
        ("hashing", plan.hashing, ("random", "partition")),
        ("rate", plan.rate, (2, 3)),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, choices))}")
    if plan.max_degree is not None and plan.max_degree < 0:
        raise ValueError(f"max_degree is {plan.max_degree}; expected at least 0 ones, or None for no limit")
    for name, value in (("max_queries", max_queries), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
