"""How much the chunk loss weighs: the factor grows where the loss stops falling, and shrinks while it falls (section 3.3 of the paper)."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fewer.checks import check_not_negative, check_positive, check_whole, is_number


class AdaptiveFactor:
    """lambda of the chunk loss, adjusted by how the loss goes.

    It is constant for `stable_steps`; then and every `adjust_every` steps gamma = mean loss of the last `adjust_every` steps / mean of as
    many before, and lambda <- gamma lambda where gamma <= 1, else max(min_factor, gamma) lambda.

    Args:
        start: lambda of the first step.
        stable_steps: N_st, a multiple of `adjust_every` and at least twice it.
        adjust_every: N_adj.
        min_factor: the least factor of a rise.
        max_factor: lambda never exceeds so many times `start`; None sets no bound (the paper's).
        smooth: reach the new value in a line over the next `adjust_every` steps (as released); else at once (the paper's).

    Attributes:
        value: lambda of the next step.

    Examples:
        >>> factor = AdaptiveFactor(0.1, stable_steps=2, adjust_every=1, smooth=False)
        >>> [round(factor.step(loss), 4) for loss in (0.8, 0.4, 0.4, 0.4004)]
        [0.1, 0.05, 0.05, 0.0512]
    """

    def __init__(
        self,
        start: float,
        stable_steps: int = 1000,
        adjust_every: int = 100,
        min_factor: float = 1.025,
        max_factor: float | None = 4.0,
        smooth: bool = True,
    ) -> None:
        check_positive(start=start)
        check_whole(adjust_every=adjust_every)
        check_whole(least=2 * adjust_every, stable_steps=stable_steps)
        if stable_steps % adjust_every:
            raise ValueError(f"stable_steps is {stable_steps}; expected a multiple of adjust_every, {adjust_every}")
        for name, factor in (("min_factor", min_factor), ("max_factor", max_factor)):
            if factor is not None and (not is_number(factor) or factor < 1):
                raise ValueError(f"{name} is {factor!r}; expected a number of at least 1")
        self.start, self.stable_steps, self.adjust_every = float(start), stable_steps, adjust_every
        self.min_factor, self.max_factor, self.smooth = min_factor, max_factor, smooth
        self.steps = 0
        self.value = self._from = self._to = self.start
        self._losses: list[float] = []  # of the last two intervals

    def step(self, loss: float) -> float:
        """Take in the chunk loss of a step, and give the factor of the next; ValueError where it is not a finite number above 0."""
        check_positive(loss=loss)
        self.steps += 1
        self._losses = [*self._losses, float(loss)][-2 * self.adjust_every :]
        since = self.steps - self.stable_steps
        if since >= 0 and since % self.adjust_every == 0:
            self._from, self._to = self._to, self._adjusted(self._to)
        reached = (since % self.adjust_every + 1) / self.adjust_every if self.smooth and since >= 0 else 1.0
        self.value = self._to if reached == 1 else self._from + reached * (self._to - self._from)
        return self.value

    def _adjusted(self, factor: float) -> float:
        before, last = self._losses[: self.adjust_every], self._losses[self.adjust_every :]
        gamma = math.fsum(last) / math.fsum(before)
        factor *= gamma if gamma <= 1 else max(self.min_factor, gamma)
        return factor if self.max_factor is None else min(factor, self.max_factor * self.start)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, to go on from in the middle of an interval."""
        return {"steps": self.steps, "value": self.value, "from": self._from, "to": self._to, "losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; ValueError where it is none."""
        if set(state) != set(self.state_dict()):
            raise ValueError(f"the state has {sorted(state)}; expected {sorted(self.state_dict())}: give what state_dict() gave")
        kept = min(int(state["steps"]), 2 * self.adjust_every)
        if len(state["losses"]) != kept:
            raise ValueError(f"the state holds {len(state['losses'])} losses; expected {kept}: it is of another adjust_every")
        check_not_negative(**{name: state[name] for name in ("value", "from", "to")})
        self.steps, self._losses = int(state["steps"]), [float(loss) for loss in state["losses"]]
        self.value, self._from, self._to = float(state["value"]), float(state["from"]), float(state["to"])


class AdaptiveFactorCallback(TrainerCallback, ExportableState):
    """An `AdaptiveFactor` for transformers' Trainer: after each step it sets the model's `chunk_factor`; checkpoints keep its state.

    Args:
        words: of the `AdaptiveFactor`; `start` is by default the config's `chunk_factor`.
    """

    def __init__(self, **words: Any) -> None:
        self.words, self.kept = words, dict[str, Any]()
        self.factor: AdaptiveFactor | None = None
        self._losses: list[float] = []  # of a step's micro-batches

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.factor = AdaptiveFactor(**{"start": model.config.chunk_factor} | self.words)
        if self.kept and state.global_step:  # resumed
            self.factor.load_state_dict(self.kept)
        model.chunk_factor = self.factor.value

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._losses.append(float(model.chunk_loss))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.on_substep_end(args, state, control, model)
        assert self.factor is not None
        model.chunk_factor = self.factor.step(math.fsum(self._losses) / len(self._losses))
        self._losses = []
        self.kept = self.factor.state_dict()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as Trainer asks for it."""
        return {"args": self.words, "attributes": {"kept": self.kept}}
