"""StableSPAM: Adam on gradients whose spikes are clipped, whose norm is smoothed, and whose moments are forgotten now and then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fewer.checks import check_not_negative, check_positive, check_whole, is_number
from fewer.lowbit._shared.formats import compute_dtype


def clip_spikes(g: Tensor, largest: Tensor, theta: float, t: int) -> Tensor:
    """g with entries above the running maximum brought down to it, and the running maximum `largest` moved on in place.

    M <- theta M + (1 - theta) max|g|, M^ = M / (1 - theta^t); where |g| > M^: g M^ / max|g|.
    """
    highest = g.abs().amax()
    largest.mul_(theta).add_(highest, alpha=1 - theta)
    allowed = largest / (1 - theta**t)
    return torch.where(g.abs() > allowed, g * (allowed / highest), g)


def smooth_norm(g: Tensor, m: Tensor, v: Tensor, gamma1: float, gamma2: float, t: int, eps: float) -> Tensor:
    """g brought to the running norm m^ / (sqrt(v^) + eps), whose two moments are moved on in place; a zero gradient stays zero."""
    norm = torch.linalg.vector_norm(g)
    m.mul_(gamma1).add_(norm, alpha=1 - gamma1)
    v.mul_(gamma2).addcmul_(norm, norm, value=1 - gamma2)
    wanted = (m / (1 - gamma1**t)) / ((v / (1 - gamma2**t)).sqrt() + eps)
    return torch.where(norm > 0, g * (wanted / norm), g)


class StableSPAM(torch.optim.Optimizer):
    """AdamW behind two guards against spikes of the gradient, for training in few bits.

    Per tensor: entries above the bias-corrected running maximum are scaled down to it, the whole is divided by its norm and multiplied by
    m^ / (sqrt(v^) + eps) of the running first and second moment of norms, and AdamW takes the step (decoupled decay first). Every
    `reset_every` steps, before that step's update, Adam's moments are zeroed and the count of steps that all corrections share begins
    again at 1. Its state is float32 (float64 of float64 parameters).

    Args:
        params: tensors, or groups of them.
        lr, betas, eps, weight_decay: AdamW's.
        gamma1, gamma2, theta: decay of the norm's two moments and of the maximum, each at least 0 and below 1 (0.7, 0.9, 0.999).
        reset_every: steps between resets; 0: none.

    Raises:
        ValueError: a number out of its range.
        RuntimeError: a sparse gradient.

    Examples:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
        >>> optimizer = StableSPAM([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([ 0.9000, -0.9000])
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
        *, gamma1: float = 0.7, gamma2: float = 0.9, theta: float = 0.999, reset_every: int = 1000,
    ) -> None:  # fmt: skip
        check_not_negative(lr=lr, weight_decay=weight_decay)
        check_positive(eps=eps)
        for name, value in {"betas[0]": betas[0], "betas[1]": betas[1], "gamma1": gamma1, "gamma2": gamma2, "theta": theta}.items():
            if not is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name} is {value!r}; expected a number of at least 0 and below 1")
        check_whole(0, reset_every=reset_every)
        guards = {"gamma1": gamma1, "gamma2": gamma2, "theta": theta, "reset_every": reset_every}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **guards})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a step; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        for name, parameter in zip(names, (each for group in self.param_groups for each in group["params"]), strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor):  # torch brings it to the parameter's dtype, where a 16-bit one loses it
                    self.state[parameter][key] = value.to(parameter.device, compute_dtype(parameter), copy=True)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if gradient.is_sparse:
            raise RuntimeError("StableSPAM was given a sparse gradient; expected a dense one: use sparse=False")
        if parameter.numel() == 0:
            return
        state, gradient = self.state[parameter], gradient.to(compute_dtype(parameter))
        if not state:
            state |= {"step": 0, "t": 0, "exp_avg": torch.zeros_like(gradient), "exp_avg_sq": torch.zeros_like(gradient)}
            state |= {name: gradient.new_zeros(()) for name in ("largest", "norm_avg", "norm_sq_avg")}
        state["step"] += 1
        state["t"] += 1
        if group["reset_every"] and state["step"] % group["reset_every"] == 0:
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
            state["t"] = 1
        t, (beta1, beta2) = state["t"], group["betas"]
        g = clip_spikes(gradient, state["largest"], group["theta"], t)
        g = smooth_norm(g, state["norm_avg"], state["norm_sq_avg"], group["gamma1"], group["gamma2"], t, group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        m = state["exp_avg"].mul_(beta1).add_(g, alpha=1 - beta1)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        step = (m / (1 - beta1**t)).div_((v / (1 - beta2**t)).sqrt_().add_(group["eps"]))
        parameter.add_(step.to(parameter.dtype), alpha=-group["lr"])
