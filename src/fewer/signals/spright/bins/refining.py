"""Least squares for all found coefficients together, on all samples already taken, and their standard errors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64

from fewer.signals.spright.bins.bits import Words, signs
from fewer.signals.spright.bins.peeling import hash_all

SIGNIFICANT = 3.0  # standard errors that a coefficient must have to be kept
LEAST_WEIGHT = 1e-24  # of a bin that is not explained, where the others are free of noise

BinVectors = Float64[np.ndarray, "groups bins offsets"]


class Refined(NamedTuple):
    """Coefficients that stayed, packed [K, W], with values [K], standard errors [K], the noise variance nu^2 of a bin, and what is left [C, B, P]."""

    indices: Words
    values: Float64[np.ndarray, "coefficients"]
    stderr: Float64[np.ndarray, "coefficients"]
    bin_variance: float
    left: BinVectors


def refine(
    bins: BinVectors,
    left: BinVectors,
    settled: Bool[np.ndarray, "groups bins"],
    columns: Words,
    offsets: Words,
    indices: Words,
    repeats: float,
    rounding: float = 0.0,
) -> Refined:
    """Fit the values of the found coefficients to all bins, drop those below three standard errors, and fit again.

    The transform of a group is orthogonal, so the fit to bins is the fit to samples, though each bin involves only the few coefficients
    that fall into it. A bin that holds more than was found weighs less, by what is left in it (not in the paper).

    Args:
        bins: U before peeling.
        left: U after it.
        settled: the bins in which nothing is left.
        columns: of every M_c, packed [C, b, W].
        offsets: packed [P, W].
        indices: the found ones, packed [K, W].
        rounding: values up to it are none: where a ghost was found and taken back, it is what is left of both.
        repeats: samples for each distinct query: those at the same point carry the same noise.
    """
    weights = bin_weights(left, settled)
    trusted = settled if settled.any() else np.ones_like(settled)
    while True:
        values, covariance, residual = _solve(bins, weights, columns, offsets, indices)
        spare = trusted.sum() * len(offsets) - len(indices)
        variance = float((residual[trusted] ** 2).sum() / max(spare, 1))
        stderr = np.sqrt(variance * repeats * np.diag(covariance))
        kept = (np.abs(values) >= SIGNIFICANT * stderr) & (np.abs(values) > rounding)
        if kept.all():
            return Refined(indices, values, stderr, variance, residual)
        indices = indices[kept]


def bin_weights(left: BinVectors, settled: Bool[np.ndarray, "groups bins"]) -> Float64[np.ndarray, "groups bins"]:
    """1 for settled bins; for the others the noise's share of what is left in them."""
    energies = (left**2).mean(axis=2)
    if settled.all() or not settled.any():
        return np.ones_like(energies)
    noise = max(energies[settled].mean(), LEAST_WEIGHT * energies.max())
    return np.where(settled, 1.0, np.minimum(1.0, noise / np.maximum(energies, noise)))


def _solve(
    bins: BinVectors, weights: np.ndarray, columns: Words, offsets: Words, indices: Words
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weighted least squares: values [K], the inverse normal matrix [K, K], and the residual [C, B, P]."""
    signature = signs(indices, offsets)
    products = signature @ signature.T
    normal, right = np.zeros((len(indices), len(indices))), np.zeros(len(indices))
    hashed = [hash_all(group, indices) for group in columns]
    for c, bin_of in enumerate(hashed):
        normal += products * (bin_of[:, None] == bin_of) * weights[c, bin_of]
        right += (signature * bins[c, bin_of]).sum(axis=1) * weights[c, bin_of]
    covariance = np.linalg.inv(normal)
    values = covariance @ right
    residual = bins.copy()
    for c, bin_of in enumerate(hashed):
        np.subtract.at(residual[c], bin_of, values[:, None] * signature)
    return values, covariance, residual
