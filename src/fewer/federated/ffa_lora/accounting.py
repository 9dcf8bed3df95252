"""What privacy costs: the noise for a budget and the budget of a noise, by Opacus' accountants.

A client's examples enter each step by themselves with probability q (Poisson sampling); two data sets are neighbours where one has one
example more than the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import numpy as np

from fewer.checks import check_choice, check_not_negative, check_positive, check_share, check_whole
from fewer.data.made_once import folder_of, measured_once

Accountant = Literal["rdp", "prv"]
TOLERANCE = 0.01  # of epsilon, in the search for sigma
FURTHER_ORDERS = [64, 80, 96, 128, 192, 256, 512]  # of Renyi divergences beside Opacus' own: few steps are told too dear without them


@dataclass(frozen=True)
class PrivacyConfig:
    """Example-level (epsilon, delta) differential privacy of the parameters that a client sends. How many examples it has is told as it is.

    Args:
        epsilon: the budget over all rounds; the noise follows from it.
        noise_multiplier: sigma itself in place of a budget; 0 clips and draws Poisson batches without noise (epsilon is then infinite).
        delta: of (epsilon, delta), below one over a client's number of examples.
        clip: C, the norm that an example's gradient is clipped to, over all trained numbers of all layers together.
        accountant: "rdp" (Renyi) or "prv" (numerical, tighter, slower).
        secure: draw batches and noise from seeds that the system gives anew, in place of the run's seed. A run's seed is for studies:
            whoever knows it, and Flower's server does, can take the noise away again. The generators are NumPy's and torch's, which are
            not cryptographic, and noise of floating-point numbers stays open to attacks on its last bits (Mironov 2012).

    Raises:
        ValueError: both or neither of epsilon and noise_multiplier are given, or a number is out of its range.

    Examples:
        >>> PrivacyConfig(epsilon=6.0).delta
        1e-05
    """

    epsilon: float | None = None
    noise_multiplier: float | None = None
    delta: float = 1e-5
    clip: float = 2.0
    accountant: Accountant = "rdp"
    secure: bool = False

    def __post_init__(self) -> None:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            given = "neither" if self.epsilon is None else "both"
            raise ValueError(f"{given} of epsilon and noise_multiplier given; expected one: a budget, or the noise itself")
        if self.epsilon is not None:
            check_positive(epsilon=self.epsilon)
        else:
            check_not_negative(noise_multiplier=self.noise_multiplier)
        check_share(ends=False, delta=self.delta)
        check_positive(clip=self.clip)
        check_choice(get_args(Accountant), accountant=self.accountant)

    def noise_for(self, sample_rate: float, steps: int) -> float:
        """sigma of a client that makes so many steps in all."""
        if self.epsilon is None:
            assert self.noise_multiplier is not None
            return self.noise_multiplier
        return noise_multiplier(self.epsilon, self.delta, sample_rate, steps, self.accountant)


@cache
def noise_multiplier(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant = "rdp") -> float:
    """sigma: the noise, in units of the clipping norm, with which so many steps spend at most (epsilon, delta), to within 0.01 of epsilon.

    It is kept in the cache of the machine, and held against the budget when it is read again.

    Args:
        epsilon, delta: the budget.
        sample_rate: q, the probability with which an example enters a step.
        steps: in all, over all rounds.
        accountant: "rdp" or "prv".

    Raises:
        ValueError: a number is out of its range, or the budget is out of reach of any noise.

    Examples:
        >>> round(noise_multiplier(6.0, 1e-5, sample_rate=600 / 67349, steps=10_000), 2)
        0.99
    """
    check_positive(epsilon=epsilon)
    _check(delta, sample_rate, steps, accountant)
    if steps == 0:
        return 0.0
    budget = {"epsilon": epsilon, "delta": delta, "sample_rate": sample_rate, "steps": steps, "accountant": accountant}

    def read(kept: dict[str, Any]) -> _Noise:
        spent = epsilon_spent(sigma := float(kept["sigma"]), delta, sample_rate, steps, accountant)
        if not epsilon - 2 * TOLERANCE <= spent <= epsilon:  # not what was written, so not to be relied on
            raise ValueError(f"sigma {sigma} spends {spent}; expected {epsilon}")
        return _Noise(sigma)

    return measured_once(folder_of("noise", "sigma", budget), read, lambda: _Noise(_search(**budget))).sigma


@dataclass(frozen=True)
class _Noise:
    """What is kept of a search, which takes a second: each of a Flower client's rounds is a process of its own."""

    sigma: float


def _search(epsilon: float, delta: float, sample_rate: float, steps: int, accountant: Accountant) -> float:
    from opacus.accountants.utils import get_noise_multiplier

    orders: dict[str, Any] = {"alphas": renyi_orders()} if accountant == "rdp" else {}
    found = get_noise_multiplier(
        target_epsilon=epsilon, target_delta=delta, sample_rate=sample_rate, steps=steps, accountant=accountant,
        epsilon_tolerance=min(TOLERANCE, epsilon / 100), **orders,
    )  # fmt: skip
    return float(found)


@cache
def epsilon_spent(noise_multiplier: float, delta: float, sample_rate: float, steps: int, accountant: Accountant = "rdp") -> float:
    """epsilon of so many steps at a noise: 0 before the first, infinite without noise.

    Args:
        noise_multiplier: sigma.
        delta: of (epsilon, delta).
        sample_rate: q, the probability with which an example enters a step.
        steps: so far, over all rounds.
        accountant: "rdp" or "prv".

    Raises:
        ValueError: a number is out of its range.

    Examples:
        >>> round(epsilon_spent(1.5, 1e-5, sample_rate=1.0, steps=10), 2)
        11.44
    """
    check_not_negative(noise_multiplier=noise_multiplier)
    _check(delta, sample_rate, steps, accountant)
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    if accountant == "prv":
        from opacus.accountants import PRVAccountant

        numerical = PRVAccountant()
        numerical.history = [(noise_multiplier, sample_rate, steps)]
        return float(numerical.get_epsilon(delta))
    from opacus.accountants.analysis.rdp import get_privacy_spent

    orders, one_step = _renyi(noise_multiplier, sample_rate)
    return float(get_privacy_spent(orders=orders, rdp=one_step * steps, delta=delta)[0])


def renyi_orders() -> list[float]:
    """Opacus' orders and some above them."""
    from opacus.accountants import RDPAccountant

    return [*RDPAccountant.DEFAULT_ALPHAS, *FURTHER_ORDERS]


@cache
def _renyi(noise_multiplier: float, sample_rate: float) -> tuple[list[float], Any]:
    """The orders, and the Renyi divergence of one step at each; those of more steps add up, so that a round more costs next to nothing."""
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = renyi_orders()
    return orders, np.asarray(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=orders))


def _check(delta: float, sample_rate: float, steps: int, accountant: str) -> None:
    check_share(ends=False, delta=delta)
    check_positive(sample_rate=sample_rate)
    check_share(sample_rate=sample_rate)
    check_whole(least=0, steps=steps)
    check_choice(get_args(Accountant), accountant=accountant)
