"""FedSpeed's local step alone, as a torch optimizer, for frameworks that bring their own rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fewer.federated._shared.local_training import CLIP_FLOOR, NORM_FLOOR
from fewer.federated.fedspeed.algorithm import FedSpeedConfig

lists: Any = torch  # its operations on lists of tensors have private names


class FedSpeedOptimizer(torch.optim.Optimizer):
    """One local step of FedSpeed: y <- y - eta (clip(q - g + (y - x)/lambda) + weight_decay y).

    Args:
        params: the model's parameters y (in one group: the norms are over all of them).
        config: FedSpeed's settings; `lr` is the round's learning rate (set `optimizer.param_groups[0]["lr"]` to `config.lr_at(round)`).
        anchor: the global model x, a tensor a parameter; a copy of the parameters as they are by default.
        correction: g_i, a tensor a parameter; zeros by default.

    Raises:
        ValueError: `anchor` or `correction` does not fit the parameters.

    Examples:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = FedSpeedOptimizer(model.parameters(), FedSpeedConfig())
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = model(torch.ones(4, 2)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> first = optimizer.step(closure)
        >>> bool(optimizer.step(closure) < first)
        True
        >>> sent = optimizer.end_round()
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        config: FedSpeedConfig | None = None,
        anchor: Iterable[Tensor] | None = None,
        correction: Iterable[Tensor] | None = None,
    ) -> None:
        self.config = config or FedSpeedConfig()
        super().__init__(params, {"lr": self.config.lr})
        if len(self.param_groups) != 1:
            raise ValueError(f"{len(self.param_groups)} groups of parameters were given; expected one: the norms are over all parameters")
        self._params: list[Tensor] = self.param_groups[0]["params"]
        self._anchor = self._fitting("anchor", anchor, [each.detach() for each in self._params])
        self._correction = self._fitting("correction", correction, [torch.zeros_like(each) for each in self._params])
        for parameter, x, g in zip(self._params, self._anchor, self._correction, strict=True):
            self.state[parameter].update(anchor=x, correction=g)

    def _fitting(self, name: str, given: Iterable[Tensor] | None, default: list[Tensor]) -> list[Tensor]:
        tensors = [each.detach().clone() for each in (given if given is not None else default)]
        if [each.shape for each in tensors] != [each.shape for each in self._params]:
            raise ValueError(f"{name} has the shapes {[tuple(each.shape) for each in tensors]}; expected those of the parameters, in order")
        return tensors

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._params = self.param_groups[0]["params"]
        self._anchor, self._correction = ([self.state[each][name] for each in self._params] for name in ("anchor", "correction"))

    def _grads(self) -> list[Tensor]:
        return [each.grad if each.grad is not None else torch.zeros_like(each) for each in self._params]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - the closure is needed
        """One step.

        Args:
            closure: clears the gradients, computes the loss of *one* batch, calls backward and returns the loss; it is called twice (once
                where rho or alpha is 0), and must use the same batch both times.

        Returns:
            the loss at y.
        """
        config, params = self.config, self._params
        with torch.enable_grad():
            loss = closure()
        bracket = [each.clone() for each in self._grads()]
        if config.rho and config.alpha:
            y = [each.clone() for each in params]
            ascent = config.rho / (self._norm(bracket) + NORM_FLOOR) if config.normalize else config.rho
            lists._foreach_add_(params, lists._foreach_mul(bracket, ascent))
            with torch.enable_grad():
                closure()
            lists._foreach_copy_(params, y)
            lists._foreach_mul_(bracket, 1 - config.alpha)
            lists._foreach_add_(bracket, self._grads(), alpha=config.alpha)
        if config.prox:
            lists._foreach_add_(bracket, lists._foreach_sub(params, self._anchor), alpha=config.prox)
        if config.corrects:
            lists._foreach_sub_(bracket, self._correction)
        clip = float((config.max_grad_norm / (self._norm(bracket) + CLIP_FLOOR)).clamp(max=1.0))
        eta = self.param_groups[0]["lr"]
        lists._foreach_mul_(params, 1 - eta * config.weight_decay)
        lists._foreach_add_(params, bracket, alpha=-eta * clip)
        return loss

    @staticmethod
    def _norm(tensors: list[Tensor]) -> Tensor:
        return torch.linalg.vector_norm(torch.stack(lists._foreach_norm(tensors)))

    @torch.no_grad()
    def end_round(self) -> list[Tensor]:
        """g <- g - (y - x)/lambda.

        Returns:
            what the client sends: y, a tensor a parameter (y - lambda g by the paper's rule); the new g is in
            `optimizer.state[parameter]["correction"]`.
        """
        sent = [each.detach().clone() for each in self._params]
        if self.config.corrects:
            lists._foreach_sub_(self._correction, lists._foreach_sub(sent, self._anchor), alpha=self.config.prox)
            if self.config.server_rule == "paper":
                lists._foreach_sub_(sent, self._correction, alpha=1 / self.config.prox)
        return sent

    @torch.no_grad()
    def start_round(self, anchor: Iterable[Tensor]) -> None:
        """Take a new global model: x and the parameters become it; g stays."""
        lists._foreach_copy_(self._anchor, self._fitting("anchor", anchor, []))
        lists._foreach_copy_(self._params, self._anchor)
