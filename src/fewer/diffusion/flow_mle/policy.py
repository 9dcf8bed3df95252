"""A policy that draws chunks of actions from a flow, and is fine-tuned for the number of steps that its robot has time for."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.checks import check_choice, check_whole
from fewer.diffusion.flow_mle.finetuning import FineTuneConfig, FineTuned, check_data, finetune
from fewer.diffusion.flow_mle.solver import METHODS, flow_matching_loss, odeint
from fewer.diffusion.flow_mle.velocity import VelocityMLP
from fewer.fitting import evaluating, fit_steps


class FlowPolicy(nn.Module):
    """pi(actions | observations): a chunk of actions from the last observations, by K steps of a velocity field.

    Args:
        obs_dim, act_dim: numbers of an observation and of an action.
        horizon: actions of a chunk.
        obs_steps: observations that it sees, the newest last.
        execute: actions of a chunk that `act` gives out before it draws the next one; by default half of them.
        width: of the field's layers.
        steps: K.
        method: of the solver, as `odeint` takes it.

    Attributes:
        tuned: K of the last fine-tuning, 0 before; another `steps` then is warned of.

    Observations are standardised and actions mapped to [-1, 1] by what `fit` has seen; both are kept in the state_dict.
    """

    field: nn.Module
    obs_mean: Tensor
    obs_std: Tensor
    act_low: Tensor
    act_high: Tensor
    tuned: Tensor

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        horizon: int = 8,
        obs_steps: int = 2,
        *,
        execute: int | None = None,
        width: int = 256,
        steps: int = 10,
        method: str = "euler",
    ) -> None:
        super().__init__()
        execute = max(1, horizon // 2) if execute is None else execute
        check_whole(obs_dim=obs_dim, act_dim=act_dim, horizon=horizon, obs_steps=obs_steps, execute=execute, steps=steps)
        check_choice(METHODS, method=method)
        if execute > horizon:
            raise ValueError(f"execute is {execute} with a horizon of {horizon}; expected at most the horizon: a chunk has no more actions")
        self.obs_dim, self.act_dim, self.horizon, self.obs_steps = obs_dim, act_dim, horizon, obs_steps
        self.execute, self.steps, self.method = execute, steps, method
        self.field = VelocityMLP(horizon * act_dim, obs_steps * obs_dim, width)
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.register_buffer("act_low", -torch.ones(act_dim))
        self.register_buffer("act_high", torch.ones(act_dim))
        self.register_buffer("tuned", torch.zeros((), dtype=torch.int64))
        self.reset()

    def reset(self) -> None:
        """Forget the observations and the chunk: at the start of an episode."""
        self._seen: list[Tensor] = []
        self._waiting: list[Tensor] = []

    def condition(self, obs: Float[Tensor, "B obs_steps obs_dim"]) -> Float[Tensor, "B obs_steps*obs_dim"]:
        if obs.ndim != 3 or obs.shape[1:] != (self.obs_steps, self.obs_dim):
            raise ValueError(f"observations are {tuple(obs.shape)}; expected [B, {self.obs_steps}, {self.obs_dim}], the newest last")
        return ((obs.to(self.obs_mean) - self.obs_mean) / self.obs_std).flatten(1)

    def pairs(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(chunks in [-1, 1] as rows, conditions) of windows: obs [N, obs_steps, obs_dim], actions [N, horizon, act_dim]."""
        if actions.ndim != 3 or actions.shape[1:] != (self.horizon, self.act_dim) or len(actions) != len(obs):
            raise ValueError(f"actions are {tuple(actions.shape)}; expected [{len(obs)}, {self.horizon}, {self.act_dim}], a chunk a window")
        shares = (actions.to(self.act_low) - self.act_low) / (self.act_high - self.act_low)
        return (2 * shares - 1).flatten(1), self.condition(obs)

    def take_scales(self, obs: Float[Tensor, "N obs_steps obs_dim"], actions: Float[Tensor, "N horizon act_dim"]) -> None:
        """Take observations' means and deviations and actions' ranges from windows: what `fit` does first.

        Raises:
            ValueError: windows that do not fit or are not finite; nothing is changed then.
        """
        check_data(*self.pairs(obs, actions))
        self.obs_mean.copy_(obs.flatten(0, 1).mean(0))
        self.obs_std.copy_(obs.flatten(0, 1).std(0, correction=0).clamp(min=1e-4))
        low, high = torch.aminmax(actions.flatten(0, 1), dim=0)
        self.act_low.copy_(low)
        self.act_high.copy_(torch.where(high - low > 1e-4, high, low + 1))  # a constant action stays one

    def fit(
        self,
        obs: Float[Tensor, "N obs_steps obs_dim"],
        actions: Float[Tensor, "N horizon act_dim"],
        updates: int = 3000,
        batch: int = 128,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> list[float]:
        """Flow matching on windows of demonstrations; the losses."""
        check_whole(updates=updates, batch=batch)
        self.take_scales(obs, actions)
        x1, cond = self.pairs(obs, actions)
        draw = torch.Generator(x1.device).manual_seed(seed)

        def loss(rows: Tensor) -> Tensor:
            x0 = torch.randn(batch, x1.shape[1], generator=draw, device=x1.device, dtype=x1.dtype)
            t = torch.rand(batch, generator=draw, device=x1.device, dtype=x1.dtype)
            return flow_matching_loss(self.field, x0, x1[rows], t, cond[rows])

        rows = (torch.randint(len(x1), (batch,), generator=draw, device=x1.device) for _ in range(updates))
        optimizer = torch.optim.Adam(self.field.requires_grad_(True).parameters(), lr=lr, fused=True)
        losses = fit_steps(optimizer, loss, rows, updates, clip=1.0)
        self.tuned.zero_()
        return losses

    def finetune(self, obs: Tensor, actions: Tensor, steps: int, config: FineTuneConfig | None = None, **words: Any) -> FineTuned:
        """`finetune` of its field for K steps, which it takes from then on. Words as there; pairs are random by default, as an
        observation all but names the action of a precise policy."""
        made = finetune(self.field, self.pairs(obs, actions), steps=steps, config=config, **{"pairing": "random", **words})
        self.field, self.steps, self.method = made.field, steps, made.method
        self.tuned.fill_(steps)
        self.reset()
        return made

    @torch.no_grad()
    def plan(
        self, obs: Float[Tensor, "B obs_steps obs_dim"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B horizon act_dim"]:
        """A chunk of actions for each window of observations."""
        if int(self.tuned) not in (0, self.steps):
            warnings.warn(
                f"the policy samples in {self.steps} steps and was tuned for {int(self.tuned)}; expected the same: set steps, or tune again",
                stacklevel=2,
            )
        cond = self.condition(obs)
        noise = torch.randn(len(obs), self.horizon * self.act_dim, generator=generator, device=cond.device, dtype=torch.float32).to(cond)
        with evaluating(self.field):
            chunk = odeint(self.field, noise, self.steps, method=self.method, cond=cond).reshape(len(obs), self.horizon, self.act_dim)
        return self.act_low + (chunk.clamp(-1, 1) + 1) / 2 * (self.act_high - self.act_low)

    def act(self, obs: Float[Tensor, "*B obs_dim"], generator: torch.Generator | None = None) -> Float[Tensor, "*B act_dim"]:
        """The next action after an observation, or actions of many episodes side by side.

        The first observation of an episode (after `reset`) stands for those before it.
        """
        if obs.shape[-1] != self.obs_dim or obs.ndim > 2:
            raise ValueError(f"the observation is {tuple(obs.shape)}; expected [{self.obs_dim}] or [B, {self.obs_dim}]")
        rows = obs.reshape(-1, self.obs_dim).to(self.obs_mean)
        if self._seen and len(self._seen[-1]) != len(rows):
            raise ValueError(
                f"there are {len(rows)} observations after {len(self._seen[-1])}; expected as many: call reset() for other episodes"
            )
        self._seen = ([rows] * self.obs_steps if not self._seen else [*self._seen, rows])[-self.obs_steps :]
        if not self._waiting:
            self._waiting = list(self.plan(torch.stack(self._seen, 1), generator)[:, : self.execute].unbind(1))
        return self._waiting.pop(0).reshape(*obs.shape[:-1], self.act_dim)
