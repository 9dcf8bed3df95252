"""One step of every exponential solver: a Taylor polynomial of the chosen prediction, integrated exactly (arXiv 2312.07243, section 3).

With F^(k) the k-th lambda-derivative of the prediction at s, h = lambda_t - lambda_s:

    noise:  x_t = alpha_t / alpha_s x_s - sigma_t sum_k h^(k+1) phi_(k+1)(h) F^(k)
    data:   x_t = sigma_t / sigma_s x_s + alpha_t sum_k h^(k+1) phi_(k+1)(-h) F^(k)
    v3:     x_t = alpha_t A / alpha_s x_s - alpha_t (A int E B_s + sum_k A E_k g^(k)), as DPM-Solver-v3 has it

and F^(k) = sum_p a_p (F_p - F_s) over the active points: all of it is one linear combination of x_s and of the values F_p.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewer.diffusion.dpm_solver_v3 import EMS

TERMS = 20  # of the series of phi
INVERSE_FACTORIALS = tuple(1 / math.factorial(i) for i in range(TERMS + 8))
FACTORIALS = np.array([[math.factorial(i)] for i in range(1, 9)])
WORST_CONDITION = 1e8  # of the system for derivatives; beyond it they are rounding
KEPT_SLICES = 64  # integrals between two grid points that are kept: candidates of a search share many
RELAXATIONS = ("none", "linear", "dpmsolver-2", "unipc-bh1", "unipc-bh2", "+0.5exp", "-0.5exp")


def phi(k: int, z: float) -> float:
    """phi_0 = e^z, phi_(k+1) = (phi_k - 1/k!) / z; by its series near 0, where the recursion loses a digit a level for each factor 10.

    >>> round(phi(1, 1.0), 6), phi(3, 0.0) == 1 / 6
    (1.718282, True)
    """
    if abs(z) < 1:
        value = 0.0
        for i in reversed(range(TERMS)):
            value = value * z + INVERSE_FACTORIALS[i + k]
        return value
    if k == 0:
        return math.exp(z)
    value = math.expm1(z) / z
    for level in range(1, k):
        value = (value - 1 / math.factorial(level)) / z
    return value


@functools.lru_cache(1 << 15)
def derivative_weights(deltas: tuple[float, ...], k: int) -> tuple[float, ...]:
    """a_p with sum_p a_p delta_p^i / i! = [i = k] for i = 1 .. q, delta_p = lambda_p - lambda_s; ValueError where that is ill-conditioned.

    >>> derivative_weights((-0.5,), 1)
    (-2.0,)
    """
    if len(deltas) == 1:
        return (1 / deltas[0],)  # the slope between two points
    matrix, scale = derivative_system(deltas)
    return tuple((np.linalg.solve(matrix, np.arange(1, len(deltas) + 1) == k) / scale**k).tolist())


@functools.lru_cache(1 << 15)
def derivative_system(deltas: tuple[float, ...]) -> tuple[np.ndarray, float]:
    """The matrix delta_p^i / i! in units of the farthest point, and that; its condition says how near the points are to one another."""
    scale, powers = max(map(abs, deltas)), np.arange(1, len(deltas) + 1)
    matrix = (np.array(deltas) / scale) ** powers[:, None] / FACTORIALS[: len(deltas)]
    singular = np.linalg.svd(matrix, compute_uv=False)
    if not singular[0] <= WORST_CONDITION * singular[-1]:
        gaps = ", ".join(f"{delta:.3g}" for delta in deltas)
        raise ValueError(f"points at lambda {gaps} from the start; expected derivatives of condition below 1e8: points farther apart")
    return matrix, scale


def relaxation(name: str, z: float, h: float, c: float = 0.0) -> float:
    """The factor on F^(1), 1 + O(h); z = h for noise and v3, -h for data."""
    if name == "linear":
        return 1 + c * h
    if name in ("dpmsolver-2", "unipc-bh2"):
        return 0.5 * phi(1, z) / phi(2, z)  # 0.5 z expm1(z) / (expm1(z) - z), where nothing cancels
    if name == "unipc-bh1":
        return 0.5 / phi(2, z)  # 0.5 z^2 / (expm1(z) - z)
    return 1 + {"none": 0.0, "+0.5exp": 0.5, "-0.5exp": -0.5}[name] * math.expm1(z)


class Level(NamedTuple):
    """A time: lambda, alpha, sigma, and the EMS' grid point there (-1 without EMS)."""

    lambda_: float
    alpha: float
    sigma: float
    node: int = -1


class Slice(NamedTuple):
    """What a v3 step from s to t needs, float64 [*shape]: A, (A E_0, .., A E_4), A int E B_s."""

    a: Tensor
    e: tuple[Tensor, ...]
    e_b: Tensor


class Integrals:
    """The integrals of DPM-Solver-v3 between grid points of the EMS, by trapezoids."""

    def __init__(self, ems: EMS) -> None:
        self.lambdas, self.l, s = ems.lambdas, ems.l.double(), ems.s.double()
        self.spacing = float(ems.lambdas[-1] - ems.lambdas[0]) / ems.num_timesteps
        self.big_l, self.big_s = self._running(self.l), self._running(s)
        # taken about their middles once, so that a slice needs products alone; sums are over slices, where nothing cancels
        self.big_l, self.big_s = (each - each.mean(0) for each in (self.big_l, self.big_s))
        self._up, self._down = torch.exp(self.big_l + self.big_s), torch.exp(-self.big_s) * ems.b.double()
        self._kept: dict[tuple[int, int], Slice] = {}

    def _running(self, values: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(values[:1]), torch.cumulative_trapezoid(values, dx=self.spacing, dim=0)])

    def node(self, lambda_: float) -> int:
        """The nearest grid point; ValueError outside the EMS' range."""
        node = round((lambda_ - float(self.lambdas[0])) / self.spacing)
        if not 0 <= node < len(self.lambdas):
            low, high = float(self.lambdas[0]), float(self.lambdas[-1])
            raise ValueError(f"lambda {lambda_:.4g} with v3 steps; expected {low:.4g} to {high:.4g}, where the EMS are: estimate others")
        return node

    def between(self, s: int, t: int) -> Slice:
        """Of the step from grid point s to t."""
        if (s, t) not in self._kept:
            part = slice(s, t + 1)
            a_e = self._up[part] * torch.exp(-self.big_l[t] - self.big_s[s])
            weights = torch.full((t - s + 1,), self.spacing, dtype=torch.float64)
            weights[[0, -1]] /= 2
            powers = (self.lambdas[part] - self.lambdas[s]) ** torch.arange(5)[:, None] * weights
            e = (powers @ a_e.flatten(1)).reshape(5, *a_e.shape[1:])
            b_s = self._running(self._down[part]) * torch.exp(self.big_s[s])
            e_b = (weights @ (a_e * b_s).flatten(1)).reshape(a_e.shape[1:])
            if len(self._kept) >= KEPT_SLICES:
                del self._kept[next(iter(self._kept))]
            of_k = tuple(each / math.factorial(k) for k, each in enumerate(e))
            self._kept[s, t] = Slice(torch.exp(self.big_l[s] - self.big_l[t]), of_k, e_b)
        return self._kept[s, t]

    def from_f(self, p: int, s: int) -> tuple[Tensor, Tensor]:
        """(r, o) with g_p = r f_p - o relative to s: exp(S_s - S_p), and the integral from s to p of exp(S_s - S) b."""
        part = slice(min(p, s), max(p, s) + 1)
        offset = torch.trapezoid(self._down[part], dx=self.spacing, dim=0) * torch.exp(self.big_s[s])
        return torch.exp(self.big_s[s] - self.big_s[p]), offset if p > s else -offset


@dataclass(frozen=True)
class Combination:
    """x_t = of_x x_s + constant + sum_p c_p V_p, V the values alpha d, e or alpha f of points; coefficients are numbers, tensors for v3.

    Attributes:
        prediction: which value of a point is meant.
        start: the point s.
        terms: (point, coefficient).
    """

    prediction: str
    start: int
    of_x: Any
    terms: tuple[tuple[int, Any], ...]
    constant: Tensor | None = None

    def __call__(self, states: Sequence[Tensor], values: Sequence[Mapping[str, Tensor]]) -> Tensor:
        x = states[self.start]
        if self.constant is None:
            result = x * self.of_x
            for p, coefficient in self.terms:
                result.add_(values[p][self.prediction], alpha=coefficient)
            return result
        result = torch.addcmul(self.constant, self.of_x, x)
        for p, coefficient in self.terms:
            result.addcmul_(values[p][self.prediction], coefficient)
        return result

    def to(self, like: Tensor) -> Combination:
        """Its tensors in the type and on the device of `like`."""
        if self.constant is None:
            return self
        terms = tuple((p, coefficient.to(like)) for p, coefficient in self.terms)
        return replace(self, of_x=self.of_x.to(like), terms=terms, constant=self.constant.to(like))


def combination(
    prediction: str,
    levels: Sequence[Level],
    start: int,
    target: int,
    sets: Sequence[Sequence[int]],
    factor: float,
    integrals: Integrals | None,
) -> Combination:
    """The coefficients of the step from point `start` to `target`.

    Args:
        levels: of all points.
        sets: the active points of F^(1), F^(2), ..., never `start`.
        factor: on F^(1).
        integrals: for v3.
    """
    s, t = levels[start], levels[target]
    h = t.lambda_ - s.lambda_
    part = integrals.between(s.node, t.node) if integrals is not None and prediction == "v3" else None
    if part is not None:
        of_x, scale, psi = t.alpha / s.alpha * part.a, -t.alpha, part.e
    elif prediction == "noise":
        of_x, scale, psi = t.alpha / s.alpha, -t.sigma, [h ** (k + 1) * phi(k + 1, h) for k in range(len(sets) + 1)]
    else:
        of_x, scale, psi = t.sigma / s.sigma, t.alpha, [h ** (k + 1) * phi(k + 1, -h) for k in range(len(sets) + 1)]
    of: dict[int, Any] = {start: scale * psi[0]}
    for k, points in enumerate(sets, start=1):
        weights = derivative_weights(tuple(levels[p].lambda_ - s.lambda_ for p in points), k)
        of_k = scale * (factor if k == 1 else 1.0) * psi[k]
        for p, weight in zip(points, weights, strict=True):
            of[p] = of.get(p, 0.0) + of_k * weight
            of[start] = of[start] - of_k * weight
    constant = None
    if part is not None and integrals is not None:
        constant = -t.alpha * part.e_b
        for p in of:
            if p != start:
                ratio, offset = integrals.from_f(levels[p].node, s.node)
                constant, of[p] = constant - of[p] * offset, of[p] * ratio
    scaled = {p: c if prediction == "noise" else c / levels[p].alpha for p, c in of.items()}  # points keep alpha d and alpha f
    return Combination(prediction, start, of_x, tuple(scaled.items()), constant)
