"""Adapt a factorised model with little data: first the routers alone, which leaves every weight as it was, then experts and routers.

Source: FactorLLM, arXiv 2408.11855, sections 3.3 and 4.1, with the router's loss in training, which the released script lacks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from fewer.checks import check_positive, check_whole
from fewer.fitting import fit_steps
from fewer.language.factor_llm.loss import FactorLoss, Label, PALoss, experts_of
from fewer.tasks.lm_training import check_window, draw_windows

Tell = Callable[[int, float], None]


@dataclass(frozen=True)
class AdaptConfig:
    """The recipe of `adapt`; the released hyperparameters.

    Attributes:
        lr, weight_decay, betas, max_norm: of Adam in the second phase, and the clipping of its gradients.
        warm_up: steps, then a cosine to `last_lr` of lr.
        router_lr: of the first phase.
        router_steps: how many of the steps are the first phase; None is a third.
        batch, window: windows of tokens a step.
        pa_weight, balance_weight, pa_loss, label: see `FactorLoss`; a pa_weight of 0 without router steps is the released script.
        seed: draws the windows.
    """

    lr: float = 4e-5
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    max_norm: float = 1.0
    warm_up: int = 500
    last_lr: float = 0.001
    router_lr: float = 1e-2
    router_steps: int | None = None
    batch: int = 1
    window: int = 1024
    pa_weight: float = 0.05
    balance_weight: float = 0.0
    pa_loss: PALoss = "kl"
    label: Label = "individual"
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(lr=self.lr, router_lr=self.router_lr, max_norm=self.max_norm)
        check_whole(batch=self.batch)
        check_whole(2, window=self.window)
        check_whole(0, optional=("router_steps",), warm_up=self.warm_up, router_steps=self.router_steps, seed=self.seed)
        if not self.pa_weight and self.router_steps != 0:
            raise ValueError(
                f"pa_weight is {self.pa_weight} and router_steps {self.router_steps}; expected router_steps=0: nothing trains routers then"
            )

    def lr_at(self, step: int, steps: int) -> float:
        """The share of lr at a step (from 0) of the second phase."""
        warm_up = max(1, min(self.warm_up, steps // 5))
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step + 1 - warm_up) / max(1, steps - warm_up)
        return self.last_lr + (1 - self.last_lr) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class Adaptation:
    """What `adapt` did: the losses of both phases' steps (L_PA; then the whole loss), and the tokens that were used."""

    router_losses: list[float]
    losses: list[float]
    tokens: int


def adapt(
    model: Any, data: Int64[Tensor, "n"] | Sequence[Mapping[str, Any]], steps: int, config: AdaptConfig | None = None, *,
    tell: Tell | None = None, **words: Any,
) -> Adaptation:  # fmt: skip
    """Train routers, then experts and routers, of a factorised model, in place; all else is frozen. It is given back in eval mode.

    Args:
        data: a stream of token ids, from which windows are drawn; or a data set of rows with `input_ids` (and `attention_mask`, `labels`)
            of one length.
        steps: of both phases together.
        tell: called with the step (from 1) and its loss.
        words: settings in place of the config's, as `lr=1e-4`.

    Raises:
        ValueError: the model is not factorised, a text shorter than a window, windows longer than the model's positions.
        FloatingPointError: a loss is not finite.
    """
    config = dataclasses.replace(config or AdaptConfig(), **words)
    check_whole(steps=steps)
    experts = experts_of(model)
    check_length(data, config, model.config.max_position_embeddings)
    used: list[int] = []  # tokens of each batch
    batches = _batches(data, steps, config, experts[0].down.device, used)
    first = steps // 3 if config.router_steps is None else min(config.router_steps, steps)
    wanted = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False).train()
    try:
        with FactorLoss(model, config.pa_weight, config.balance_weight, config.pa_loss, config.label) as loss_of:
            router_losses = _train_routers(model, experts, loss_of, batches, first, config, tell)
            later = tell and (lambda step, loss: tell(first + step, loss))
            losses = _train_experts(model, experts, loss_of, batches, steps - first, config, later)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(wanted[id(parameter)])
        model.eval()
    return Adaptation(router_losses, losses, sum(used))


Batch = dict[str, Tensor]


def check_length(data: Any, config: AdaptConfig, positions: int) -> None:
    """What is wrong with the data shows before anything is changed."""
    if isinstance(data, Tensor):
        check_window(data, config.window)
    elif not len(data):
        raise ValueError("the data set has no rows; expected at least one: look at the file it was read from")
    length = config.window if isinstance(data, Tensor) else len(data[0]["input_ids"])
    if length > positions:
        raise ValueError(f"window is {length} and the model reads {positions} tokens; expected at most {positions}")


def _batches(data: Any, steps: int, config: AdaptConfig, device: torch.device, used: list[int]) -> Iterator[Batch]:
    """A batch a step: windows of a stream, or rows of a data set in an order that the seed draws; `used` grows by each one's tokens."""
    if isinstance(data, Tensor):
        for step in range(steps):
            draw = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            ids = draw_windows(data, config.batch, config.window, draw).to(device)
            used.append(ids.numel())
            yield {"input_ids": ids, "labels": ids}
        return
    from transformers import default_data_collator

    rows = torch.randint(len(data), (steps, config.batch), generator=torch.Generator().manual_seed(config.seed))
    for places in rows.tolist():
        batch = {name: value.to(device) for name, value in default_data_collator([dict(data[place]) for place in places]).items()}
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        used.append(int(mask.sum()))
        yield {"labels": batch["input_ids"].masked_fill(mask == 0, -100)} | batch


def _train_routers(
    model: Any, experts: list[Any], loss_of: FactorLoss, batches: Iterator[Batch], steps: int, config: AdaptConfig, tell: Tell | None
) -> list[float]:
    """L_PA alone; one pass a batch, without gradients of the model: layers are independent given their inputs."""
    routers = nn.ModuleList(mlp.router for mlp in experts).requires_grad_(True)

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            model.model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"), use_cache=False)
        return loss_of.router_losses(batch.get("attention_mask"))[0]

    return fit_steps(torch.optim.Adam(routers.parameters(), lr=config.router_lr), loss, batches, steps, tell=tell) if steps else []


def _train_experts(
    model: Any, experts: list[Any], loss_of: FactorLoss, batches: Iterator[Batch], steps: int, config: AdaptConfig, tell: Tell | None
) -> list[float]:
    """Everything of the mixtures, by the whole loss."""
    mixtures = nn.ModuleList(experts).requires_grad_(True)
    optimizer = torch.optim.Adam(mixtures.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)

    def loss(batch: Batch) -> Tensor:
        return loss_of(model(**batch, use_cache=False), batch.get("attention_mask"))

    words: dict[str, Any] = {"schedule": lambda step: config.lr_at(step, steps), "clip": config.max_norm, "tell": tell}
    return fit_steps(optimizer, loss, batches, steps, **words) if steps else []
