"""How much of what is in the bins is noise: estimated where it is not given, and checked to look like noise (none of it is in the paper)."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from jaxtyping import Float64

from fewer.signals.spright.bins.plan import Plan

NEGLIGIBLE_NOISE = 1e-3  # of the spectrum's energy: with estimated noise above it, rounds go on while there are queries left
VARIANCE_FLOOR = 1e-24  # of the largest bin energy
ALIKE = 3.0  # standard deviations by which the energies of empty bins lie apart
LEVEL = 5.0  # standard deviations by which the spread of noise's energies may exceed its mean
ENOUGH = 64  # coefficients of a full transform that tell noise from a function

Energies = Float64[np.ndarray, "groups bins"]


def bin_variance(plan: Plan, energies: Energies, distinct: np.ndarray) -> float:
    """nu^2 = sigma^2 / B: given, or estimated from the bins' energies |U|^2 / P, in two ways of which the lower counts.

    One is the 25 % quantile, as long as a quarter of the bins are expected empty; where there are fewer, a quantile that half of those
    lie below; where there are none, rounding alone. The other is the mean of the bins that are as empty as the emptiest: where far more
    coefficients matter than were expected, the quantile is a coefficient's energy.
    """
    groups, width = energies.shape
    floor = VARIANCE_FLOOR * float(energies.max())
    if plan.noise_std is not None:
        return max(plan.noise_std**2 / width, floor)
    empty = (1 - (plan.sparsity or 0) / 2**plan.n) ** (2**plan.n / width)  # exp(-K / B) where 2^n is large
    if empty / 2 * groups * width < 1:
        return floor
    quantile = float(np.quantile(energies, 0.25 if empty >= 0.25 else empty / 2))
    apart = min(0.9, ALIKE * math.sqrt(2 / distinct.min()))
    emptiest = energies[energies <= energies.min() * (1 + apart) / (1 - apart)]
    return max(min(quantile, float(emptiest.mean())), floor)


def is_level(energies: Energies, distinct: np.ndarray) -> bool:
    """Whether bins of these energies hold white noise alone: then each is nu^2 (1 +- sqrt(2 / P)), whereas coefficients that were missed
    fall into some bins and not into others.

    The statistic P / 2 var(E) / mean(E)^2 is 1 on average for noise, with a variance of (2 + 12 / P) / (C B).
    """
    mean, spread = energies.mean(), energies.var()
    offsets = float(distinct.min())
    statistic = spread / mean**2 * offsets / 2 if mean > 0 else 0.0
    return bool(statistic <= 1 + LEVEL * math.sqrt((2 + 12 / offsets) / energies.size))


def luckiest(count: int) -> float:
    """Standard deviations that the largest of so many coefficients of noise exceeds in one case of a hundred.

    >>> round(luckiest(512), 2)
    4.27
    """
    return NormalDist().inv_cdf(1 - 0.005 / count)


def noise_of_spectrum(transform: np.ndarray, noise_std: float | None) -> float:
    """sigma^2 / N of a full transform: given, or by the median where few coefficients stand out of what looks like noise, and else zero:
    where all points are known and nothing else is, every coefficient counts.
    """
    if noise_std is not None:
        return noise_std**2 / len(transform)
    sizes = np.abs(transform)
    deviation = float(np.median(sizes)) / 0.6745  # of a Gaussian
    out = sizes > luckiest(len(sizes)) * deviation
    rest = transform[~out]
    if deviation == 0 or len(transform) < ENOUGH or (transform[out] ** 2).sum() < (rest**2).sum():
        return 0.0
    from scipy.stats import kstest

    return float((rest**2).mean()) if kstest(rest / deviation, "norm").pvalue > 0.01 else 0.0
