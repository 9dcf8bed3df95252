"""One step of the solver (section 3): x_t as a linear combination of x_s and of f at s and at other points, with exact integrals.

The integrals of section 3.1 are taken by the trapezoidal rule on the grid of the EMS, in float64. E and A span many powers of e, so every
exponent is taken relative to the ends of its own slice: A E(lambda) = exp(L_lambda - L_t + S_lambda - S_s) stays near 1 where L = int l and
S = int s themselves may not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion.dpm_solver_v3.ems import EMS


@dataclass(frozen=True)
class SliceIntegrals:
    """What a step from s to t needs, each float64 [*shape].

    Attributes:
        a: A = exp(-int_s^t l).
        e: A E_k = A int E (lambda - lambda_s)^k / k!, for k = 0 .. n.
        e_b: A int E B_s.
    """

    a: Tensor
    e: tuple[Tensor, ...]
    e_b: Tensor


class Integrals:
    """The EMS and their running integrals, from which those between any two grid points follow."""

    def __init__(self, ems: EMS) -> None:
        self.lambdas = ems.lambdas
        self.l, self.b = ems.l.double(), ems.b.double()
        self.spacing = float(ems.lambdas[-1] - ems.lambdas[0]) / ems.num_timesteps
        self.big_l = running_trapezoid(self.l, self.spacing)  # L, from lambda_T
        self.big_s = running_trapezoid(ems.s.double(), self.spacing)  # S
        self._cache: dict[tuple[int, int], tuple[Tensor, Tensor, dict[int, Tensor]]] = {}

    def between(self, s: int, t: int, orders: int) -> SliceIntegrals:
        """The integrals over the grid points s .. t, E_k for k below `orders`."""
        if (s, t) not in self._cache:
            part = slice(s, t + 1)
            big_s = self.big_s[part] - self.big_s[s]
            a_e = torch.exp(self.big_l[part] - self.big_l[t] + big_s)
            b_s = running_trapezoid(torch.exp(-big_s) * self.b[part], self.spacing)
            self._cache[s, t] = (a_e, trapezoid(a_e * b_s, self.spacing), {})
        a_e, e_b, known = self._cache[s, t]
        for k in range(orders):
            if k not in known:
                powers = (self.lambdas[s : t + 1] - self.lambdas[s]) ** k / math.factorial(k)
                known[k] = trapezoid(a_e * powers.reshape(-1, *[1] * (a_e.ndim - 1)), self.spacing)
        return SliceIntegrals(torch.exp(self.big_l[s] - self.big_l[t]), tuple(known[k] for k in range(orders)), e_b)

    def ratio(self, i: int, s: int) -> Float64[Tensor, "*shape"]:
        """exp(S_s - S_i)."""
        return torch.exp(self.big_s[s] - self.big_s[i])

    def offset(self, i: int, s: int) -> Float64[Tensor, "*shape"]:
        """exp(S_s) (B_i - B_s): the integral from s to i of exp(S_s - S) b, whichever comes first."""
        first, last = min(i, s), max(i, s) + 1
        value = trapezoid(torch.exp(self.big_s[s] - self.big_s[first:last]) * self.b[first:last], self.spacing)
        return value if i > s else -value

    def forget_slices(self) -> None:
        """Give the memory of the slices back."""
        self._cache.clear()


def trapezoid(values: Tensor, spacing: float) -> Tensor:
    """The integral over the first axis."""
    return torch.trapezoid(values, dx=spacing, dim=0)


def running_trapezoid(values: Tensor, spacing: float) -> Tensor:
    """The integral from the first point to each, along the first axis."""
    return torch.cat([torch.zeros_like(values[:1]), torch.cumulative_trapezoid(values, dx=spacing, dim=0)])


def derivative_weights(lambdas: Sequence[float], pseudo: bool) -> Float64[Tensor, "n_plus_1 n_plus_1"]:
    """Row k has the weights of g_s, g_i1, .., g_in in the k-th derivative of g at s.

    Either the Vandermonde system sum_k delta_i^k g^(k) / k! = g_i - g_s, which is the full order; or g^(k) = k! times the divided
    difference of the nearest k + 1 points, the pseudo order (appendix): more stable where steps are long.
    """
    delta = torch.tensor([value - lambdas[0] for value in lambdas], dtype=torch.float64)
    count = len(lambdas)
    weights = torch.zeros(count, count, dtype=torch.float64)
    weights[0, 0] = 1
    if pseudo:
        differences = list(torch.eye(count, dtype=torch.float64))  # D_l^(0) = g_l, as weights
        for k in range(1, count):
            differences = [(differences[i + 1] - differences[i]) / (delta[i + k] - delta[i]) for i in range(count - k)]
            weights[k] = math.factorial(k) * differences[0]
    elif count > 1:
        k = torch.arange(1, count)
        vandermonde = delta[1:, None] ** k / torch.tensor([math.factorial(int(each)) for each in k], dtype=torch.float64)
        weights[1:, 1:] = torch.linalg.inv(vandermonde)
        weights[1:, 0] = -weights[1:, 1:].sum(1)
    return weights


@dataclass(frozen=True)
class Point:
    """A place of the trajectory: its grid point, the state x [B, *shape] and the noise eps [B, *shape] that the network saw in it."""

    node: int
    x: Tensor
    eps: Tensor


@dataclass(frozen=True)
class Combination:
    """x_t = of_x x_s + constant + sum_j of_f[j] f_j; the coefficients are [*shape]."""

    of_x: Tensor
    constant: Tensor
    of_f: tuple[Tensor, ...]

    def __call__(self, x: Tensor, f: Sequence[Tensor]) -> Tensor:
        result = torch.addcmul(self.constant, self.of_x, x)
        for coefficient, value in zip(self.of_f, f, strict=True):
            result.addcmul_(coefficient, value)
        return result

    def to(self, like: Tensor) -> Combination:
        """In the type and on the device of `like`."""
        return Combination(self.of_x.to(like), self.constant.to(like), tuple(each.to(like) for each in self.of_f))


def linear_rest(eps: Tensor, x: Tensor, l: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:  # noqa: E741
    """f = (sigma eps - l x) / alpha: what is left of the noise when its linear part is taken off."""
    return (sigma / alpha) * eps - (l / alpha) * x


def combination(integrals: Integrals, alphas: tuple[float, float], nodes: Sequence[int], target: int, pseudo: bool) -> Combination:
    """The coefficients of x_t = alpha_t A [x_s / alpha_s - int E B_s - sum_k g^(k) E_k], order n + 1.

    Args:
        alphas: alpha at s and at t.
        nodes: the grid points s, i_1, .., i_n.
        target: the grid point t.
    """
    s, (alpha_s, alpha_t) = nodes[0], alphas
    part = integrals.between(s, target, len(nodes))
    weights = derivative_weights([float(integrals.lambdas[node]) for node in nodes], pseudo)
    of_f, constant = [], part.e_b
    for j, node in enumerate(nodes):
        of_g = torch.stack([weights[k, j] * part.e[k] for k in range(len(nodes))]).sum(0)
        of_f.append(-alpha_t * of_g * integrals.ratio(node, s))  # g_i = exp(S_s - S_i) f_i - exp(S_s) (B_i - B_s)
        if node != s:
            constant = constant - of_g * integrals.offset(node, s)
    return Combination(alpha_t / alpha_s * part.a, -alpha_t * constant, tuple(of_f))


def local_update(points: Sequence[Point], target: int, ems: EMS, schedule: NoiseSchedule, pseudo: bool = False) -> Tensor:
    """x at a grid point, from the point s and n others: order n + 1.

    Args:
        points: s first. For a predictor the others are earlier ones, newest first; for a corrector the target itself, then earlier ones.
        target: the index of the grid point in `ems.lambdas`, after s.
        pseudo: take the k-th derivative from the nearest k + 1 points alone.

    Examples:
        >>> schedule = NoiseSchedule.edm(0.02, 20.0)
        >>> ems = EMS.data_prediction(torch.linspace(*[float(schedule.lambda_(t)) for t in (20.0, 0.02)], 241, dtype=torch.float64))
        >>> x = torch.full((1, 2), 20.0).double()
        >>> x_t = local_update([Point(0, x, x / 20)], 240, ems, schedule)  # all of x is noise, the data are 0
        >>> bool((x_t - 0.02).abs().max() < 1e-4)
        True
    """
    times = schedule.inverse(ems.lambdas)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    f = [linear_rest(p.eps, p.x, ems.l[p.node].to(p.x), alpha[p.node].to(p.x), sigma[p.node].to(p.x)) for p in points]
    nodes, s = [p.node for p in points], points[0].node
    if not s < target <= ems.num_timesteps or len(set(nodes)) != len(nodes):
        raise ValueError(f"points at {nodes}, target {target}; expected distinct grid points and a target after the first of them")
    made = combination(Integrals(ems), (float(alpha[s]), float(alpha[target])), nodes, target, pseudo)
    return made.to(points[0].x)(points[0].x, f)
