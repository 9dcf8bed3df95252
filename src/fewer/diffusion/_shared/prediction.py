"""What a network predicts, turned into the noise: data, velocity or score predictions become epsilon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewer.diffusion._shared.noise_schedule import NoiseSchedule

Epsilon = Callable[[Tensor, Tensor], Tensor]
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "epsilon": lambda output, x, alpha, sigma: output,
    "sample": lambda output, x, alpha, sigma: (x - alpha * output) / sigma,
    "v_prediction": lambda output, x, alpha, sigma: alpha * output + sigma * x,  # v = alpha noise - sigma x_0
    "score": lambda output, x, alpha, sigma: -sigma * output,
}


def to_epsilon(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The noise in x, from what a network said of it; ValueError on an unknown prediction type."""
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type {prediction_type!r}; expected one of {', '.join(PREDICTIONS)}")
    return PREDICTIONS[prediction_type](output, x, alpha.to(x), sigma.to(x))


def as_epsilon(model: Callable[..., Any], schedule: NoiseSchedule, prediction_type: str = "epsilon", **call: Any) -> Epsilon:
    """A network as a function eps(x, t) of the schedule's continuous time.

    Args:
        model: called as diffusers' networks are, `model(x, timestep, **call)`; gives a tensor or an object with `.sample`.
        prediction_type: "epsilon", "sample", "v_prediction" or "score".
        call: further arguments of each call, such as `class_labels` or `encoder_hidden_states`.
    """
    if prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type {prediction_type!r}; expected one of {', '.join(PREDICTIONS)}")

    def epsilon(x: Tensor, t: Tensor) -> Tensor:
        output = model(x, schedule.timestep(t), **call)
        output = output if isinstance(output, torch.Tensor) else output.sample
        return to_epsilon(output, x, schedule.alpha(t), schedule.sigma(t), prediction_type)

    return epsilon
