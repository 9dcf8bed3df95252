"""What a network predicts, turned into the noise: data, velocity or score predictions become epsilon."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map

from fewer.diffusion._shared.noise_schedule import NoiseSchedule

Epsilon = Callable[[Tensor, Tensor], Tensor]
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda output, x, alpha, sigma: output,
    "sample": lambda output, x, alpha, sigma: (x - alpha * output) / sigma,
    "v_prediction": lambda output, x, alpha, sigma: alpha * output + sigma * x,  # v = alpha noise - sigma x_0
    "score": lambda output, x, alpha, sigma: -sigma * output,
}


def check_prediction(prediction_type: str) -> None:
    """ValueError on an unknown prediction type."""
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type {prediction_type!r}; expected one of {', '.join(PREDICTIONS)}")


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precisions, else the dtype itself: what states and sums are kept in."""
    return torch.promote_types(dtype, torch.float32)


def to_epsilon(
    output: Float[Tensor, "B *shape"], x: Float[Tensor, "B *shape"], alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Float[Tensor, "B *shape"]:
    """The noise in x, from what a network said of it; ValueError on an unknown prediction type.

    A noise prediction stays in its type; what is computed from others is float32 at least.
    """
    check_prediction(prediction_type)
    if output.ndim > 1 and output.shape[1] == 2 * x.shape[1]:
        output = output[:, : x.shape[1]]  # a learned variance stands behind
    if prediction_type == "epsilon":
        return output
    dtype = at_least_single(x.dtype)
    output, x = output.to(dtype), x.to(dtype)
    return PREDICTIONS[prediction_type](output, x, alpha.to(x), sigma.to(x))


@dataclass(frozen=True, eq=False)
class NetworkEpsilon:
    """A network as a function eps(x, t) of a schedule's continuous time; made by `as_epsilon`."""

    model: Callable[..., Any]
    schedule: NoiseSchedule
    prediction_type: str = "epsilon"
    call: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x: Float[Tensor, "B *shape"], t: Tensor) -> Float[Tensor, "B *shape"]:
        output = self.model(x, self.schedule.timestep(t), **self.call)
        output = output if isinstance(output, torch.Tensor) else output.sample
        return to_epsilon(output, x, self.schedule.alpha(t), self.schedule.sigma(t), self.prediction_type)

    def of_rows(self, rows: Int[Tensor, "B"], count: int) -> NetworkEpsilon:
        """The same for these rows of `count` samples: arguments that have a row a sample are cut, those with one row are repeated."""

        def cut(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.ndim:
                return value
            if len(value) == count:
                return value[rows.to(value.device)]
            return value.expand(len(rows), *value.shape[1:]) if len(value) == 1 else value

        return replace(self, call=tree_map(cut, dict(self.call)))


def as_epsilon(model: Callable[..., Any], schedule: Any, prediction_type: str | None = None, **call: Any) -> NetworkEpsilon:
    """A network as a function eps(x, t) of the schedule's continuous time.

    Args:
        model: called as diffusers' networks are, `model(x, timestep, **call)`; gives a tensor or an object with `.sample`.
        schedule: a `NoiseSchedule`, or a scheduler of diffusers (or its config).
        prediction_type: "epsilon", "sample", "v_prediction" or "score"; by default the scheduler's own, or "epsilon".
        call: further arguments of each call, such as `class_labels` or `encoder_hidden_states`, a row a sample (or one row for all):
            who takes samples in batches, as `estimate_ems` does, gets the rows that belong to them.

    Examples:
        >>> from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
        >>> scheduler = DDPMScheduler(prediction_type="v_prediction")
        >>> eps = as_epsilon(lambda x, t, class_labels: x, scheduler, class_labels=torch.arange(4))
        >>> eps.prediction_type, eps.of_rows(torch.tensor([2, 0]), 4).call["class_labels"].tolist()
        ('v_prediction', [2, 0])
    """
    if not isinstance(schedule, NoiseSchedule):
        config = getattr(schedule, "config", schedule)
        schedule = NoiseSchedule.from_diffusers(config)
        prediction_type = prediction_type or config.get("prediction_type")
    check_prediction(prediction_type or "epsilon")
    return NetworkEpsilon(model, schedule, prediction_type or "epsilon", call)
