"""M-FAC as a torch optimizer: each step is preconditioned by the inverse empirical Fisher matrix of the last m gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from fewer.optimization.mfac.gradients import split_like, wide
from fewer.optimization.mfac.window.sliding_window import SlidingInverseFisher

WINDOWS = "windows"  # where the state dict keeps them


@dataclass
class _Part:
    """Parameter groups that share one Fisher matrix."""

    groups: list[int]  # places in `param_groups`
    weights: int  # of these groups
    kept: Tensor | None  # places of those that are trained; None: all
    window: SlidingInverseFisher


class MFAC(Optimizer):
    """Stochastic gradient descent preconditioned by F^{-1}, F = damping I + (1/m) sum of g g^T over the last m gradients.

    A step: g = gradient + weight_decay w goes into the window in place of the oldest, u = F^{-1} g, v <- momentum v + (1 - momentum) u,
    w <- w - lr v. It costs O(d m + m^2) time and window * d numbers of memory. The window starts with zeros that count as gradients,
    so the first steps are damped; the learning-rate schedule of SGD is a good start. Works with torch's schedulers, clipping and
    GradScaler; a parameter whose gradient is None after the first step counts as one with gradient 0.

    Args:
        params: parameters, named parameters or groups; `lr`, `momentum` and `weight_decay` may differ by group.
        lr: learning rate.
        momentum: beta in [0, 1); 0 keeps no buffer.
        weight_decay: coupled, added to the gradient.
        window: m (the paper's runs use 512 or 1024).
        damping: lambda (the paper's runs use 1e-6).
        sparse: weights that are exactly zero now stay so and are left out of d.
        per_group: a window for each group, which may then set its own `window` and `damping`; otherwise one F over all.
        storage_dtype: of the window; default the parameters' dtype.
        storage_device: where the window is kept (such as "cpu" for a model on a GPU); default the parameters' device.
        warm_window: m counts only gradients seen while those are fewer than `window` (not in the paper).

    Raises:
        ValueError: a setting out of range, a window larger than memory, `sparse` with nothing but zeros; later: a parameter group
            added, a parameter without gradient in the first step.
        FloatingPointError: a step with a NaN or infinite gradient; weights and window stay as they were.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = MFAC([w], lr=1.0, window=1, damping=1.0)
        >>> w[0].square().backward()  # the gradient is (2, 0), so F = diag(5, 1)
        >>> optimizer.step()
        >>> w.data
        tensor([0.6000, 1.0000])

    Source: arXiv 2107.03356, dynamic algorithm and its released optimizer.
    """

    _built = False

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        window: int = 1024,
        damping: float = 1e-5,
        sparse: bool = False,
        per_group: bool = False,
        storage_dtype: torch.dtype | None = None,
        storage_device: torch.device | str | None = None,
        *,
        warm_window: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "window": window, "damping": damping})
        for group in self.param_groups:
            _check_group(group)
        self._steps = 0
        places = range(len(self.param_groups))
        make = functools.partial(self._part, sparse=sparse, dtype=storage_dtype, device=storage_device, warm_window=warm_window)
        self._parts = [make([place]) for place in places] if per_group else [make(list(places))]
        self._built = True

    def _part(
        self, groups: list[int], *, sparse: bool, dtype: torch.dtype | None, device: torch.device | str | None, warm_window: bool
    ) -> _Part:
        """The groups' common window."""
        sizes = {(self.param_groups[place]["window"], self.param_groups[place]["damping"]) for place in groups}
        if len(sizes) > 1:
            raise ValueError(
                f"the groups have (window, damping) {sorted(sizes)}, but share one F; give them the same or set per_group=True"
            )
        parameters = [parameter for place in groups for parameter in self.param_groups[place]["params"]]
        weights = d = sum(parameter.numel() for parameter in parameters)
        kept = None
        if sparse:
            home = parameters[0].device
            kept = torch.cat([parameter.detach().flatten().to(home) for parameter in parameters]).nonzero()[:, 0]
            d = len(kept)
            if not d:
                raise ValueError(
                    "sparse=True, but all weights are zero; expected the trained ones to be nonzero: prune first, or sparse=False"
                )
        if dtype is None:
            dtype = functools.reduce(torch.promote_types, (parameter.dtype for parameter in parameters))
        (window, damping) = sizes.pop()
        fisher = SlidingInverseFisher(window, d, damping, dtype, parameters[0].device, device, warm_window=warm_window)
        return _Part(groups, weights, kept, fisher)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only while the optimizer is built.

        Raises:
            ValueError: later, as the window's gradients lack the new weights.
        """
        if self._built:
            raise ValueError("a parameter group was added after construction; the window holds gradients without it: build a new MFAC")
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; a closure is evaluated once, for the gradient and the loss that is returned.

        Raises:
            ValueError: a parameter without gradient in the first step, or one added since construction.
            FloatingPointError: a NaN or infinite gradient; nothing is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [self._gradient(part) for part in self._parts]
        for part, g in zip(self._parts, gradients, strict=True):
            self._check_finite(part, g)
        for part, g in zip(self._parts, gradients, strict=True):
            if part.kept is None:
                u = part.window.push_and_apply(g)
            else:
                u = torch.zeros_like(g).index_copy_(0, part.kept, part.window.push_and_apply(g[part.kept]))
            self._move(part, u)
        self._steps += 1
        return loss

    @property
    def window_bytes(self) -> int:
        """Bytes that the windows hold, beside the parameters and their momentum buffers."""
        return sum(part.window.bytes for part in self._parts)

    def _parameters(self, part: _Part) -> list[tuple[dict[str, Any], Tensor]]:
        return [(self.param_groups[place], parameter) for place in part.groups for parameter in self.param_groups[place]["params"]]

    def _gradient(self, part: _Part) -> Tensor:
        """The part's gradients with weight decay, as one vector on its first parameter's device."""
        pieces = []
        for group, parameter in self._parameters(part):
            if parameter.grad is None and self._steps == 0:
                raise ValueError(
                    f"{self._name(parameter)} has no gradient in the first step; expected one for every parameter: leave out what is not trained"
                )
            g = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            g = (g.to_dense() if g.is_sparse else g).to(wide(g.dtype))
            if group["weight_decay"]:
                g = g.add(parameter, alpha=group["weight_decay"])
            pieces.append(g.flatten().to(part.window.device))
        g = torch.cat(pieces)
        if len(g) != part.weights:
            raise ValueError(
                f"the parameters have {len(g)} weights now, {part.weights} at construction; build a new MFAC after adding some"
            )
        return g

    def _check_finite(self, part: _Part, g: Tensor) -> None:
        """FloatingPointError naming the first parameter whose gradient is not finite, also once rounded to the window's storage."""
        trained = g if part.kept is None else g[part.kept]
        if bool(trained.to(part.window.storage_dtype).isfinite().all()):
            return
        pieces = split_like(g, [parameter for _, parameter in self._parameters(part)])
        for (_, parameter), piece in zip(self._parameters(part), pieces, strict=True):
            if not bool(piece.to(part.window.storage_dtype).isfinite().all()):
                raise FloatingPointError(
                    f"the gradient of {self._name(parameter)} has a NaN or infinite value (in {part.window.storage_dtype}); weights and window "
                    "are left as they were: skip the step, clip, or lower the learning rate"
                )

    def _move(self, part: _Part, u: Tensor) -> None:
        """v <- beta v + (1 - beta) u, w <- w - lr v; v is float32 at least, as 16 bits would not hold u where the damping is small."""
        entries = self._parameters(part)
        for (group, parameter), piece in zip(entries, split_like(u, [parameter for _, parameter in entries]), strict=True):
            v = piece.to(parameter.device, wide(parameter.dtype))
            if beta := group["momentum"]:
                held = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(v))
                v = held.mul_(beta).add_(v, alpha=1 - beta)
            parameter.add_(v, alpha=-group["lr"])

    def _name(self, parameter: Tensor) -> str:
        """The parameter's name where named parameters were given, else its place."""
        for place, group in enumerate(self.param_groups):
            for number, held in enumerate(group["params"]):
                if held is parameter:
                    names = group.get("param_names")
                    return f"parameter {names[number]!r}" if names else f"parameter {number} of group {place} {tuple(parameter.shape)}"
        raise AssertionError("a parameter of no group")

    def state_dict(self) -> dict[str, Any]:
        """Torch's state dict with the windows, all of it tensors and plain numbers."""
        windows = [part.window.state_dict() | {"kept": part.kept} for part in self._parts]
        return super().state_dict() | {WINDOWS: windows, "steps": self._steps}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state dict, bit for bit.

        Raises:
            ValueError: it is of another window, damping, storage or number of weights; nothing is changed.
        """
        windows = state_dict.get(WINDOWS, [])
        if len(windows) != len(self._parts):
            raise ValueError(f"the state has {len(windows)} windows, this optimizer {len(self._parts)}; build it with the same per_group")
        for part, held in zip(self._parts, windows, strict=True):
            part.window.check_state(held)
            if (part.kept is None) != (held["kept"] is None):
                raise ValueError("the state and this optimizer differ in `sparse`; build it with the state's own first")
        super().load_state_dict(state_dict)
        self._keep_buffers(state_dict)
        for part, held in zip(self._parts, windows, strict=True):
            part.window.load_state_dict(held)
            if part.kept is not None:
                part.kept = held["kept"].to(part.kept.device)
        self._steps = state_dict["steps"]

    def _keep_buffers(self, state_dict: dict[str, Any]) -> None:
        """Momentum as it was saved: torch rounds what it loads to the parameters' dtype."""
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: torch's own state with the windows."""
        return super().__getstate__() | {"_parts": self._parts, "_steps": self._steps, "_built": True}


def _check_group(group: dict[str, Any]) -> None:
    """ValueError naming the first setting of a group that cannot be used."""
    for name, least, below in (("lr", 0, math.inf), ("momentum", 0, 1), ("weight_decay", 0, math.inf)):
        if not least <= group[name] < below:
            raise ValueError(f"{name} is {group[name]}; expected a number in [{least}, {'infinity' if below == math.inf else below})")
