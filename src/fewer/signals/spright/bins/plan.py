"""How the function is subsampled and its bins are read: what is asked for, checked, and how many groups and bins it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import get_args

from fewer.checks import check_choice, check_not_negative, check_whole
from fewer.signals.spright.bins.hashing import Hashing
from fewer.signals.spright.bins.offsets import Design
from fewer.signals.spright.bins.queries import Executor

FIRST_BINS = 4  # of the rounds with an unknown sparsity
GROUPS = 3  # where nothing chooses them
LOADS = {3: 1.3, 4: 0.6}  # B / K: with 3 groups three times the threshold of density evolution (0.4073), with 4 nearly twice (0.3237)
TWINS = 0.007  # expected pairs of coefficients that share the bin in every group, which no peeling tells apart


@dataclass(frozen=True)
class WHTConfig:
    """What is seldom changed of a sparse transform.

    Args:
        hashing: "random" matrices of full rank, or "partition" into disjoint coordinates (needs groups x log2(bins) <= n).
        rate: outputs a step of the code of the design "so": 2, or 3 for more noise.
        min_magnitude: rho: smaller coefficients are taken for noise.
        batch_size: rows of a call of f.
        executor: with `map(f, batches)`, in order: concurrent.futures' executors, multiprocessing's or Ray's pools. The result is the same.
        device: a torch device on which the groups' transforms are made, such as "cuda"; by default NumPy arrays stay where they are.

    Raises:
        ValueError: a value out of range.
    """

    hashing: Hashing = "random"
    rate: int = 2
    min_magnitude: float = 0.0
    batch_size: int = 4096
    executor: Executor | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        check_choice(get_args(Hashing), hashing=self.hashing)
        check_choice((2, 3), rate=self.rate)
        check_not_negative(min_magnitude=self.min_magnitude)
        check_whole(batch_size=self.batch_size)


@dataclass(frozen=True)
class Plan:
    """A checked order for a sparse transform of n variables.

    Args:
        n, sparsity, noise_std, design, bins, max_queries, max_degree, config: as in `sparse_wht`.
        groups: C; None lets the sparsity choose.

    Raises:
        ValueError: the first argument out of range, by name.
    """

    n: int
    sparsity: int | None = None
    noise_std: float | None = None
    design: Design = "so"
    groups: int | None = None
    bins: int | None = None
    max_queries: int | None = None
    max_degree: int | None = None
    config: WHTConfig = field(default_factory=WHTConfig)

    def __post_init__(self) -> None:
        check_whole(n=self.n)
        check_choice(get_args(Design), design=self.design)
        check_whole(optional=("sparsity", "max_queries"), sparsity=self.sparsity, max_queries=self.max_queries)
        check_whole(least=0, optional=("max_degree",), max_degree=self.max_degree)
        check_whole(least=2, optional=("groups",), groups=self.groups)
        if self.noise_std is not None:
            check_not_negative(noise_std=self.noise_std)
        if self.sparsity is not None and self.sparsity > 2**self.n:
            raise ValueError(f"sparsity is {self.sparsity}; expected 1 to 2^{self.n}: the coefficients that matter")
        if self.bins is not None and (self.bins < 1 or self.bins & (self.bins - 1) or self.bins > 2**self.n):
            near = min(1 << max(self.bins, 1).bit_length(), 2**self.n)
            raise ValueError(f"bins is {self.bins}; expected a power of two up to 2^{self.n}, such as {near}")
        if self.design == "none" and self.noise_std:
            raise ValueError(f"noise_std is {self.noise_std} and design is 'none', which reads functions without noise; use 'so' or 'nso'")
        groups, width = self.size
        if self.config.hashing == "partition" and groups * (width.bit_length() - 1) > self.n:
            raise ValueError(
                f"hashing is 'partition' with {groups} groups of {width.bit_length() - 1} coordinates and n = {self.n}; "
                f"expected groups x log2(bins) <= n: use hashing='random', fewer bins or fewer groups"
            )

    @property
    def fixed(self) -> bool:
        """Whether there is one round, of known size."""
        return self.bins is not None or self.sparsity is not None

    @property
    def size(self) -> tuple[int, int]:
        """Groups and bins of the first round."""
        if self.bins is not None:
            return self.groups or GROUPS, self.bins
        if self.sparsity is None:
            return self.groups or GROUPS, min(FIRST_BINS, 2**self.n)
        if self.groups or self.config.hashing == "partition":
            groups = self.groups or GROUPS
            return groups, bins_for(self.sparsity, self.n, groups)
        return groups_and_bins(self.sparsity, self.n)

    @property
    def noiseless(self) -> bool:
        return self.design == "none" or self.noise_std == 0


def bins_for(sparsity: int, n: int, groups: int = GROUPS) -> int:
    """The smallest power of two >= 1.3 K (0.6 K with 4 groups or more), at most 2^n.

    >>> bins_for(40, 20), bins_for(3, 1), bins_for(100, 20, groups=4)
    (64, 2, 64)
    """
    return min(1 << max(0, math.ceil(math.log2(LOADS[3 if groups < 4 else 4] * sparsity))), 2**n)


def groups_and_bins(sparsity: int, n: int) -> tuple[int, int]:
    """The 3 or 4 groups, and their bins, that take fewest samples: enough for peeling, and so many that two coefficients seldom share all.

    The paper's 3 groups of 1.3 K bins fail in 1 % of cases at K = 32, for pairs that no bin keeps apart (not in the paper).

    >>> groups_and_bins(100, 20), groups_and_bins(4, 20), groups_and_bins(40, 3)
    ((4, 64), (4, 8), (3, 8))
    """
    chosen = []
    for groups in LOADS:
        width = bins_for(sparsity, n, groups)
        while width < 2**n and math.comb(sparsity, 2) > TWINS * width**groups:
            width *= 2
        chosen.append((groups * width, groups, width))
    return min(chosen)[1:]
