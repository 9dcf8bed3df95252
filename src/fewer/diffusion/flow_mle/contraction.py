"""A residual that contracts for every value of its parameters, and the measure that says whether the whole field does."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_choice, check_not_negative, check_whole
from fewer.diffusion.flow_mle.solver import Field, odeint
from fewer.diffusion.flow_mle.velocity import PAIRS, silence, with_clock

SLOPES = {"tanh": torch.tanh, "relu": torch.relu, "softplus": F.softplus}  # slopes in [0, 1], which the LMI asks for
SMALLEST = 1e-6  # multiplier, so that its inverse is finite whatever its parameter is


class ContractingResidual(nn.Module):
    """r(x) = gate (A x + B s(C x + b(t, cond)) + e(t, cond)), whose Jacobian's log-norm mu_2 is at most -gate * rate everywhere.

    With a multiplier Lambda = diag(l) > 0 that is so where

        [[A + A^T + 2 rate I, B + C^T Lambda], [B^T + Lambda C, -2 Lambda]] <= 0,

    which A is made to fulfil by construction (Schur complement): with M = B + C^T Lambda, S = U V^T - V U^T,

        A = -1/2 [Q Q^T + 2 rate I + M (2 Lambda)^-1 M^T] + S.

    B, C, l, Q, U, V and the networks b, e are free; nothing is projected. The paper names the LMI and a direct parameterisation; this
    one is ours. The bound speaks of r alone: the sum v + r contracts only where mu_2 of v's Jacobian is below gate * rate (`log_norm`).

    Args:
        dim: d, numbers of a sample; samples of other shapes are flattened and come back in their own.
        width: of s and of the hidden layers of b and e.
        rate: lambda >= 0, per unit of time.
        cond_dim: numbers of a condition; 0: none is taken.
        columns: rank of Q and, twice, of S; at most 64.
        activation: s, of slopes in [0, 1]: "tanh", "relu" or "softplus".
        gate: at first; `finetune` begins with 0, as A is never 0 for rate > 0. A negative one counts as 0.
        metric: T [d, d], invertible: contraction in |T x| instead of |x|, r(x) = T^-1 r'(T x).

    Raises:
        ValueError: rate below 0, a metric that is not square of side dim or not invertible, sizes that are no whole numbers.
    """

    metric: Tensor | None
    inverse: Tensor | None

    def __init__(
        self,
        dim: int,
        width: int = 64,
        rate: float = 1.0,
        cond_dim: int = 0,
        *,
        columns: int = 32,
        activation: str = "tanh",
        gate: float = 1.0,
        metric: Float[Tensor, "d d"] | None = None,
    ) -> None:
        super().__init__()
        check_whole(dim=dim, width=width, columns=columns)
        check_whole(least=0, cond_dim=cond_dim)
        check_not_negative(rate=rate, gate=gate)
        check_choice(SLOPES, activation=activation)
        self.config = {"dim": dim, "width": width, "rate": rate, "cond_dim": cond_dim, "columns": columns, "activation": activation}
        self.rate, self.slope = rate, SLOPES[activation]
        k = min(columns, dim, 64)
        self.B = nn.Parameter(0.1 * torch.randn(dim, width) / width**0.5)
        self.C = nn.Parameter(torch.randn(width, dim) / dim**0.5)
        self.Q, self.U, self.V = (nn.Parameter(0.1 * torch.randn(dim, k) / k**0.5) for _ in range(3))
        self.l = nn.Parameter(torch.full((width,), 0.5413))  # softplus(0.5413) = 1
        self.gate = nn.Parameter(torch.tensor(float(gate)))
        self.b, self.e = (nn.Sequential(nn.Linear(cond_dim + 2 * PAIRS, width), nn.SiLU(), nn.Linear(width, out)) for out in (width, dim))
        T = None if metric is None else checked_metric(metric, dim)
        self.register_buffer("metric", T)
        self.register_buffer("inverse", None if T is None else torch.linalg.inv(T.double()).to(T.dtype))

    @classmethod
    def viscosity(cls, dim: int, nu: float, cond_dim: int = 0) -> ContractingResidual:
        """r = -nu x: the paper's second version as the preset A = -nu I, with b = e = 0. Its gate alone can be trained."""
        check_not_negative(nu=nu)
        made = cls(dim, 1, nu, cond_dim, columns=1)
        silence(made)
        with torch.no_grad():
            made.gate.fill_(1.0)
        for name, weight in made.named_parameters():
            weight.requires_grad_(name == "gate")
        return made

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(B, C, l, M, Q, U V side by side) in a dtype."""
        B, C, Q, U, V = (each.to(dtype) for each in (self.B, self.C, self.Q, self.U, self.V))
        multiplier = F.softplus(self.l.to(dtype)) + SMALLEST
        return B, C, multiplier, B + C.T * multiplier, Q, torch.cat([U, V], dim=1)

    def assembled(self, dtype: torch.dtype) -> Float[Tensor, "d d"]:
        """A."""
        return self._assembled(*self.factors(dtype)[2:])

    def _assembled(self, multiplier: Tensor, M: Tensor, Q: Tensor, UV: Tensor) -> Tensor:
        U, V = UV.chunk(2, dim=1)
        skew = U @ V.T
        identity = torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
        return -0.5 * (Q @ Q.T + 2 * self.rate * identity + (M / (2 * multiplier)) @ M.T) + skew - skew.T

    def lmi(self) -> Float[Tensor, "d+width d+width"]:
        """The matrix that is never positive, in float64."""
        B, C, multiplier, M, _, _ = self.factors(torch.float64)
        A = self.assembled(torch.float64)
        corner = A + A.T + 2 * self.rate * torch.eye(len(A), dtype=torch.float64, device=A.device)
        return torch.cat([torch.cat([corner, M], dim=1), torch.cat([B.T + multiplier[:, None] * C, -2 * multiplier.diag()], dim=1)])

    @torch.no_grad()
    def certificate(self) -> float:
        """The smallest eigenvalue of minus the LMI's matrix: at least 0, up to rounding. It speaks of r, not of v + r."""
        return float(torch.linalg.eigvalsh(-self.lmi()).min())

    @property
    def certified_rate(self) -> float:
        """gate * rate: by how much r lowers mu_2 of any field that it is added to."""
        return max(float(self.gate.detach()), 0.0) * self.rate

    @torch.no_grad()
    def keep_gate(self) -> None:
        """max(gate, 0), after a step of the optimizer: a negative gate would turn the certificate round."""
        self.gate.clamp_(min=0)

    def forward(self, t: Float[Tensor, "B"], x: Float[Tensor, "B *shape"], cond: Tensor | None = None) -> Float[Tensor, "B *shape"]:
        return self.bound()(t, x, cond)

    def bound(self) -> Field:
        """r with its matrices made once, in two products of rows: A itself in few dimensions, its factors where they are cheaper, O(d k)."""
        dtype = torch.promote_types(self.Q.dtype, torch.float32)
        B, C, multiplier, M, Q, UV = self.factors(dtype)
        dim, k, cond_dim = len(Q), Q.shape[1], self.config["cond_dim"]
        dense = self.metric is not None or dim <= 2 * M.shape[1] + 6 * k
        gate = self.gate.to(dtype).clamp(min=0)
        b1, b1_bias, b2, b2_bias = (each.to(dtype) for each in self.b.parameters())
        e1, e1_bias, e2, e2_bias = (each.to(dtype) for each in self.e.parameters())
        first, first_bias = torch.cat([b1, e1]), torch.cat([b1_bias, e1_bias])
        leave = torch.cat([B, e2, self._assembled(multiplier, M, Q, UV)] if dense else [B, e2], dim=1)
        if self.metric is not None and self.inverse is not None:
            T, inverse = self.metric.to(dtype), self.inverse.to(dtype)
            C, e2_bias = C @ T, inverse @ e2_bias
            leave = torch.cat([inverse @ leave[:, :-dim], inverse @ leave[:, -dim:] @ T], dim=1)
        enter, leave, leave_bias = torch.cat([C, b2], dim=1), gate * leave, gate * e2_bias

        def field(t: Tensor, x: Tensor, cond: Tensor | None = None) -> Tensor:
            inputs, z = with_clock(t, None, cond, cond_dim).to(dtype), x.flatten(1).to(dtype)
            of_b, of_e = F.silu(F.linear(inputs, first, first_bias)).chunk(2, dim=1)
            s = self.slope(F.linear(torch.cat([z, of_b], dim=1), enter, b2_bias))
            r = F.linear(torch.cat([s, of_e, z] if dense else [s, of_e], dim=1), leave, leave_bias)
            if not dense:
                swapped = torch.cat([UV[:, k:], -UV[:, :k]], dim=1)
                left = -0.5 * ((z @ Q) @ Q.T + (z @ (M / (2 * multiplier))) @ M.T) - self.rate * z + (z @ swapped) @ UV.T
                r = r + gate * left
            return r.to(x.dtype).reshape(x.shape)

        return field


def checked_metric(metric: Tensor, dim: int) -> Tensor:
    if metric.shape != (dim, dim):
        raise ValueError(f"metric is {tuple(metric.shape)}; expected a square matrix ({dim}, {dim})")
    if not bool(metric.isfinite().all()) or int(torch.linalg.matrix_rank(metric.double())) < dim:
        raise ValueError(f"metric has rank below {dim}, or numbers that are not finite; expected an invertible matrix")
    return metric.detach().clone() if metric.is_floating_point() else metric.to(torch.get_default_dtype())


def log_norm(
    field: Field,
    t: Float[Tensor, "B"],
    x: Float[Tensor, "B *shape"],
    iters: int = 20,
    *,
    cond: Any = None,
    metric: Float[Tensor, "d d"] | None = None,
) -> Float[Tensor, "B"]:
    """mu_2(J), the largest eigenvalue of (J + J^T) / 2, J = d field / dx at each x: below -c everywhere, runs approach at rate c.

    Krylov vectors of the symmetric part (Lanczos, with full orthogonalisation): exact from `iters` >= d on, from below before. One call
    of the field; each iteration takes a product with J and one with J^T.

    Args:
        field: acts on each sample by itself.
        t, x: float32 or float64.
        iters: products with the symmetric part.
        metric: T, where contraction is meant in |T x|: mu_2 of T J T^-1.
    """
    check_whole(iters=iters)
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"x is {x.dtype}; expected float32 or float64: convert it and the field, products of half precision say too little"
        )
    if not bool(x.isfinite().all()):
        raise ValueError(
            "x has a NaN or infinite number; expected finite ones, at which a Jacobian can be taken: see where the path diverged"
        )
    rows = x.detach().flatten(1)
    T = None if metric is None else checked_metric(metric, rows.shape[1]).to(x)
    with torch.enable_grad():
        z = (rows if T is None else rows @ T.T).clone().requires_grad_()  # T x, in which the metric is the plain one
        at = (z if T is None else z @ torch.linalg.inv(T).T).reshape(x.shape)
        y = (field(t, at) if cond is None else field(t, at, cond)).flatten(1)
        y = y if T is None else y @ T.T
        if not y.requires_grad:  # a field that x says nothing to
            return torch.zeros(len(x), dtype=x.dtype, device=x.device)
        u = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, z, u, create_graph=True, materialize_grads=True)  # J^T u, linear in u

    def product(q: Tensor) -> Tensor:
        (jt,) = torch.autograd.grad(y, z, q, retain_graph=True, materialize_grads=True)
        if not pulled.requires_grad:
            return torch.zeros_like(q)
        (j,) = torch.autograd.grad(pulled, u, q, retain_graph=True, materialize_grads=True)
        return (j + jt) / 2

    return largest_ritz_value(product, rows, iters)


def along_paths(field: Field, x0: Float[Tensor, "B *shape"], times: int, cond: Any = None) -> Float[Tensor, "times B"]:
    """`log_norm` where the field's own paths from x0 are at t = 0, 1 / times, ...: four Euler steps from each to the next."""
    state, found = x0, []
    for j in range(times):
        found.append(log_norm(field, torch.full((len(x0),), j / times).to(state), state, cond=cond))
        with torch.no_grad():
            state = odeint(field, state, 4, j / times, (j + 1) / times, cond=cond)
    return torch.stack(found)


def largest_ritz_value(product: Any, like: Float[Tensor, "B d"], iters: int) -> Float[Tensor, "B"]:
    """Of symmetric maps, a row each, in the Krylov space of a random start."""
    draw, (rows, dim) = torch.Generator().manual_seed(0), like.shape
    count = min(iters, dim)
    basis: list[Tensor] = []
    diagonal, beside = [], []

    def fresh(w: Tensor) -> Tensor:
        for _ in range(2):  # once leaves rounding errors behind
            for q in basis:
                w = w - (w * q).sum(1, keepdim=True) * q
        return w

    q = F.normalize(torch.randn(rows, dim, generator=draw).to(like), dim=1)
    for j in range(count):
        basis.append(q)
        w = product(q)
        diagonal.append((w * q).sum(1))
        if j == count - 1:
            break
        size = w.norm(dim=1)
        w = fresh(w)
        beta = w.norm(dim=1)
        ended = beta <= 1e-6 * size  # an invariant space: go on in another one, not with noise
        other = fresh(torch.randn(rows, dim, generator=draw).to(like))
        q = F.normalize(torch.where(ended[:, None], other, w), dim=1)
        beside.append(beta.masked_fill(ended, 0.0))
    matrix = torch.diag_embed(torch.stack(diagonal, 1))
    if beside:
        off = torch.stack(beside, 1)
        matrix = matrix + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    return torch.linalg.eigvalsh(matrix).amax(1)
