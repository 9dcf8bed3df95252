"""The deployed sampler as a differentiable map: a K-step solver through which gradients flow, its inverse, its likelihood, its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from fewer.checks import check_choice, check_not_negative, check_positive, check_share, check_whole
from fewer.fitting import evaluating

Field = Callable[..., Tensor]  # (t [B], x [B, ...]) or (t, x, cond) -> dx/dt [B, ...]
Step = Callable[[Callable[[float, Tensor], Tensor], float, float, Tensor], Tensor]
LIMIT = 1e3  # of |x|: data are scaled to about 1, so what is beyond it has diverged
INVERSION_STEPS = 40  # of RK4; the deployed solver is too coarse to give the latents


def euler(v: Callable[[float, Tensor], Tensor], t: float, h: float, x: Tensor) -> Tensor:
    return x + h * v(t, x)


def midpoint(v: Callable[[float, Tensor], Tensor], t: float, h: float, x: Tensor) -> Tensor:
    return x + h * v(t + h / 2, x + h / 2 * v(t, x))


def rk4(v: Callable[[float, Tensor], Tensor], t: float, h: float, x: Tensor) -> Tensor:
    k1 = v(t, x)
    k2 = v(t + h / 2, x + h / 2 * k1)
    k3 = v(t + h / 2, x + h / 2 * k2)
    k4 = v(t + h, x + h * k3)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


METHODS: dict[str, tuple[Step, int]] = {"euler": (euler, 1), "midpoint": (midpoint, 2), "rk4": (rk4, 4)}  # name -> step, calls a step


def odeint(
    field: Field,
    x: Float[Tensor, "B *shape"],
    steps: int,
    t0: float = 0.0,
    t1: float = 1.0,
    method: str = "euler",
    checkpoint: bool = False,
    cond: Any = None,
) -> Float[Tensor, "B *shape"]:
    """Where dx/dt = field(t, x, cond) takes x from t0 to t1 in equal steps. Gradients flow through every step.

    Args:
        field: called as `field(t, x)`, or `field(t, x, cond)` where a condition is given, t [B] in x's dtype. One that has
            `bound()` (`ResidualField`, `ContractingResidual`) is bound once, so that what does not depend on x is computed once a solve.
        x: float16 and bfloat16 states are held in float32 between the calls.
        steps: K.
        t0, t1: in [0, 1]; 0 is noise, 1 is data.
        method: "euler" (one call a step), "midpoint" (2) or "rk4" (4).
        checkpoint: keep one state a step instead of the network's activations; the backward pass calls the field once more a step.

    Raises:
        ValueError: no steps, a time outside [0, 1], an unknown method, or a field whose answer has another shape than x.
        FloatingPointError: |x| exceeds 1,000 or is not finite; the step is named.
    """
    check_whole(steps=steps)
    check_share(t0=t0, t1=t1)
    check_choice(METHODS, method=method)
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; expected floating-point numbers: convert it")
    f, dtype, h = bound(field), x.dtype, (t1 - t0) / steps

    def velocity(t: float, state: Tensor) -> Tensor:
        times = torch.full((len(state),), t, dtype=dtype, device=state.device)
        given = state.to(dtype)
        v = f(times, given) if cond is None else f(times, given, cond)
        if v.shape != state.shape:
            raise ValueError(f"the field gives {tuple(v.shape)} for x {tuple(state.shape)}; expected the same shape: dx/dt of each x")
        return v.to(state.dtype)

    step, _ = METHODS[method]
    state, sizes = x.to(torch.promote_types(dtype, torch.float32)), []
    for j in range(steps):
        t = t0 + j * h
        state = recomputed(step, velocity, t, h, state, use_reentrant=False) if checkpoint else step(velocity, t, h, state)
        sizes.append(largest(state))
    for j, size in enumerate(torch.stack(sizes).tolist(), 1):  # one transfer for all steps
        if not size <= LIMIT:  # NaN is not
            raise FloatingPointError(
                f"|x| is {size:g} after step {j} of {steps}; expected at most {LIMIT:g}: scale the data to about 1, or take more steps"
            )
    return state.to(dtype)


def largest(state: Tensor) -> Tensor:
    """max |x|, NaN where there is one."""
    low, high = torch.aminmax(state.detach()) if state.numel() else (torch.zeros(()),) * 2
    return torch.maximum(high, -low)


def bound(field: Field) -> Field:
    """The field with what does not depend on x computed, where it knows how; else the field itself."""
    return field.bound() if isinstance(field, nn.Module) and hasattr(field, "bound") else field  # pyright: ignore[reportCallIssue]


@torch.no_grad()
def invert(field: Field, x1: Float[Tensor, "B *shape"], cond: Any = None, steps: int = INVERSION_STEPS) -> Float[Tensor, "B *shape"]:
    """The latents x0 that the exact flow takes to x1: RK4 from 1 back to 0, without gradients, a module in eval mode.

    The deployed solver with few steps would give other latents than the flow's (and is not its own inverse).

    Args:
        steps: of RK4, four calls each; 40 and 40 back come to 1e-6 on a field of Lipschitz constant 3.
    """
    with evaluating(*([field] if isinstance(field, nn.Module) else [])):
        return odeint(field, x1, steps, 1.0, 0.0, "rk4", cond=cond)


def flow_matching_loss(field: Field, x0: Tensor, x1: Tensor, t: Tensor, cond: Any = None) -> Tensor:
    """mean |v(t, (1 - t) x0 + t x1, cond) - (x1 - x0)|^2."""
    at = t.reshape(-1, *[1] * (x1.ndim - 1))
    x = (1 - at) * x0 + at * x1
    v = field(t, x) if cond is None else field(t, x, cond)
    return (v - (x1 - x0)).square().mean()


class ReconstructionMLE(nn.Module):
    """Minus the log-likelihood of x1 under N(phi(x0), s^2), a dimension, phi being the solver that will be used: no step is detached.

        |phi(x0) - x1|^2 / (2 s^2) + (d / 2) log s^2, over d; with a fixed s the mean squared error itself

    Args:
        steps: K of deployment.
        method: of `odeint`.
        sigma: "fixed", or "learned": one scalar, `log_sigma`, to be trained too.
        fm_weight: of the flow-matching loss on fresh noise, an anchor that keeps sampling in many steps alive (0.1 does; ours).
    """

    def __init__(
        self,
        steps: int,
        method: str = "euler",
        sigma: Literal["fixed", "learned"] = "fixed",
        fm_weight: float = 0.0,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_whole(steps=steps)
        check_choice(METHODS, method=method)
        check_choice(("fixed", "learned"), sigma=sigma)
        check_not_negative(fm_weight=fm_weight)
        self.steps, self.method, self.fm_weight, self.checkpoint = steps, method, fm_weight, checkpoint
        self.log_sigma = nn.Parameter(torch.zeros(())) if sigma == "learned" else None

    def forward(
        self, field: Field, x0: Float[Tensor, "B *shape"], x1: Float[Tensor, "B *shape"], cond: Any = None, generator: Any = None
    ) -> Float[Tensor, ""]:
        """The loss of pairs; the generator draws the anchor's noise and times, on x1's device."""
        error = (odeint(field, x0, self.steps, method=self.method, checkpoint=self.checkpoint, cond=cond) - x1).square().mean()
        loss = error if self.log_sigma is None else error / (2 * (2 * self.log_sigma).exp()) + self.log_sigma
        if self.fm_weight:
            how: dict[str, Any] = {"generator": generator, "device": x1.device, "dtype": x1.dtype}
            fresh, t = torch.randn(x1.shape, **how), torch.rand(len(x1), **how)
            loss = loss + self.fm_weight * flow_matching_loss(field, fresh, x1, t, cond)
        return loss


def error_bound(L: float, delta: float, M: float, steps: int, start: float = 0.0) -> float:
    """Theorem 1: how far K Euler steps of a learned field may end from the true flow.

        |eps_N| <= exp(L t_{N-1}) sum_j (delta tau + M tau^2 / 2) + exp(L t_N) |eps_0|,   tau = 1 / K

    The paper prints |eps_0| without its factor; it grows like everything else.

    Args:
        L: Lipschitz constant in x of the true field.
        delta: sup |learned - true field|.
        M: max |d^2 psi / dt^2| along the flow.
        steps: K.
        start: |eps_0|.

    Examples:
        >>> round(error_bound(L=1.0, delta=0.1, M=0.0, steps=10), 4)
        0.246
    """
    check_whole(steps=steps)
    check_not_negative(L=L, delta=delta, M=M, start=start)
    tau = 1 / steps
    return math.exp(L * (1 - tau)) * steps * (delta * tau + M * tau**2 / 2) + math.exp(L) * start


def iss_bound(distance: float, disturbance: float, rate: float, t: float = 1.0) -> float:
    """Input-to-state stability: how far two runs are apart at t where mu_2 of the field's Jacobian is at most -rate < 0.

        exp(-c t) |x - x'| + D (1 - exp(-c t)) / c

    Args:
        distance: |x - x'| at time 0.
        disturbance: D, the largest norm of what is added to one run's field.
        rate: c.
    """
    check_not_negative(distance=distance, disturbance=disturbance, t=t)
    check_positive(rate=rate)
    return math.exp(-rate * t) * distance - disturbance * math.expm1(-rate * t) / rate
