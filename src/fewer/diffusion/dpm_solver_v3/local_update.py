"""One step of the solver (equations of section 3.3): x_t as a linear combination of x_s and of f at s and at other points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion.dpm_solver_v3.ems import EMS
from fewer.diffusion.dpm_solver_v3.integrals import Integrals, derivative_weights


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
