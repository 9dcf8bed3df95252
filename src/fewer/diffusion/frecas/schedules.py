"""Where a stage begins, which times it visits, and a step between two of them: on betas (DDIM), in flow matching, and on EDM's schedule.

All three have x_t = alpha z + sigma noise and one first-order step: x_t' = alpha' z0 + sigma' eps, of the estimates z0 and eps at t.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.checks import check_not_negative, check_whole
from fewer.diffusion._shared.noise_schedule import DiscreteSchedule, EDMSchedule, check_config
from fewer.diffusion._shared.prediction import to_epsilon
from fewer.diffusion.frecas.stages import FreCaSConfig

FLOW_TIMES = 1000  # a flow-matching network is given 1000 sigma
RHO = 7  # of Karras' grid


def matched_start(alphas_cumprod: Float[Tensor, "T"], end: int, ratio: float, gamma: float = 2.0) -> int:
    """The first training time whose SNR = abar / (1 - abar) is not above SNR(end) / ratio^gamma, at most T - 1.

    A larger image shows the same at more noise: averaged over ratio^2 pixels its noise is `ratio` times smaller, which gamma = 2 makes up.

    Args:
        alphas_cumprod: abar of the training times, falling.
        end: the time at which the smaller image was left.
        ratio: the larger side over the smaller, at least 1.
        gamma: 2 keeps the SNR of the averaged image; 0 the time.

    >>> betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    >>> matched_start((1 - betas).cumprod(0), 200, 2, 1.5)
    343
    """
    check_whole(0, end=end)
    check_growth(end, ratio, gamma)
    if end >= len(alphas_cumprod):
        raise ValueError(f"end is {end}; expected a time below {len(alphas_cumprod)}, their number")
    levels = alphas_cumprod.to("cpu", torch.float64)
    r, abar = ratio**-gamma, levels[end]
    target = r * abar / (1 + (r - 1) * abar)  # abar / (1 - abar) times r, solved for abar
    return min(len(levels) - int(torch.searchsorted(levels.flip(0), target, right=True)), len(levels) - 1)


def matched_flow_time(end: float, ratio: float, gamma: float = 1.0) -> int:
    """1000 k e / (1000 + (k - 1) e) rounded down, k = ratio^(gamma / 2): the same in flow matching, where SNR = ((1 - sigma) / sigma)^2."""
    check_growth(end, ratio, gamma)
    k = ratio ** (gamma / 2)
    return int(FLOW_TIMES * k * end / (FLOW_TIMES + (k - 1) * end))


def matched_sigma(end: float, ratio: float, gamma: float = 2.0) -> float:
    """sigma_end ratio^(gamma / 2): the same on EDM's schedule, where SNR = 1 / sigma^2."""
    check_growth(end, ratio, gamma)
    return end * ratio ** (gamma / 2)


def check_growth(end: float, ratio: float, gamma: float) -> None:
    """ValueError, by name, where no larger image can follow."""
    check_not_negative(end=end, gamma=gamma)
    if not ratio >= 1:
        raise ValueError(f"ratio is {ratio}; expected at least 1: the larger side over the smaller")


def even_times(start: float, end: float, steps: int) -> list[float]:
    """linspace(start, end, steps) rounded down, in whole numbers, so that no rounding of a float moves a time."""
    first, last = int(start), int(end)
    return [(first * (steps - 1) - i * (first - last)) // (steps - 1) for i in range(steps)]


def karras_levels(start: float, end: float, steps: int) -> list[float]:
    """sigma in equal steps of its seventh root."""
    return (torch.linspace(start ** (1 / RHO), end ** (1 / RHO), steps, dtype=torch.float64) ** RHO).tolist()


@dataclass(frozen=True, eq=False)
class Process:
    """What is known of noise: levels, times, and how estimates are read from a network's output.

    Attributes:
        first: the time at which noise alone stands.
        level: time -> (alpha, sigma); below 0 the place where the last step ends.
        start: (end, ratio, gamma) -> the matched start.
        times: (start, end, steps) -> the times of a stage.
        prediction: "flow", or as diffusers calls it.
        whole: whether times are whole numbers.
        last: the time of the last call.
    """

    first: float
    level: Callable[[float], tuple[float, float]]
    start: Callable[[float, float, float], float]
    times: Callable[[float, float, int], list[float]]
    prediction: str
    whole: bool = True
    last: float = 0.0

    def estimates(self, output: Tensor, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """(z0, eps): the predicted clean sample, and the noise."""
        alpha, sigma = self.level(t)
        if self.prediction == "flow":  # the velocity is noise - z
            return x - sigma * output, x + alpha * output
        if self.prediction == "sample":
            return output, (x - alpha * output) / sigma
        wide = torch.float64  # as the levels themselves
        eps = to_epsilon(output, x, torch.tensor(alpha, dtype=wide), torch.tensor(sigma, dtype=wide), self.prediction)
        return (x - sigma * eps) / alpha, eps

    def step(self, output: Tensor, x: Tensor, t: float, to: float) -> Tensor:
        """DDIM from t to `to` (below 0: the end); Euler's step in flow matching and on EDM's schedule."""
        clean, eps = self.estimates(output, x, t)
        alpha, sigma = self.level(to)
        return alpha * clean + sigma * eps

    def noisy(self, clean: Tensor, noise: Tensor, t: float) -> Tensor:
        alpha, sigma = self.level(t)
        return alpha * clean + sigma * noise


def on_betas(alphas_cumprod: Tensor, final: float = 1.0, prediction: str = "epsilon") -> Process:
    """The variance-preserving process of these abar [T]; `final` is the abar after the last step."""
    abar = alphas_cumprod.to("cpu", torch.float64)

    def level(t: float) -> tuple[float, float]:
        here = float(abar[int(t)]) if t >= 0 else final
        return here**0.5, (1 - here) ** 0.5

    return Process(len(abar) - 1, level, lambda end, ratio, gamma: matched_start(abar, int(end), ratio, gamma), even_times, prediction)


def as_process(schedule: Any) -> Process:
    """A schedule as a process.

    Args:
        schedule: a scheduler of diffusers (with betas, or for flow matching), alphas_cumprod [T], a `DiscreteSchedule` or an `EDMSchedule`.
            The network then predicts what the scheduler says; noise; noise; the clean image.
    """
    if isinstance(schedule, Process):
        return schedule
    if isinstance(schedule, EDMSchedule):
        low, high = schedule.t_min, schedule.t_max
        return Process(
            high, lambda t: (1.0, max(t, 0.0)), lambda *given: min(matched_sigma(*given), high),
            lambda start, end, steps: karras_levels(start, max(end, low), steps), "sample", whole=False, last=low,
        )  # fmt: skip
    if isinstance(schedule, DiscreteSchedule):
        return on_betas((2 * schedule.log_alphas).exp())
    if isinstance(schedule, Tensor):
        return on_betas(schedule)
    config = dict(getattr(schedule, "config", {}))
    if "FlowMatch" in type(schedule).__name__:
        return Process(
            FLOW_TIMES, lambda t: (1 - max(t, 0) / FLOW_TIMES, max(t, 0) / FLOW_TIMES),
            lambda *given: min(matched_flow_time(*given), FLOW_TIMES), even_times, "flow",
        )  # fmt: skip
    if not isinstance(getattr(schedule, "alphas_cumprod", None), Tensor):
        raise ValueError(
            f"schedule is {type(schedule).__name__}, which has no alphas_cumprod: stages[1:] have no matched start; expected a scheduler with "
            "betas or for flow matching, or an EDMSchedule: give another"
        )
    check_config(config)
    if config.get("clip_sample"):
        raise ValueError("clip_sample=True changes every predicted image; expected a scheduler without: make it with clip_sample=False")
    return on_betas(schedule.alphas_cumprod, float(getattr(schedule, "final_alpha_cumprod", 1.0)), config.get("prediction_type", "epsilon"))


def stage_times(config: FreCaSConfig, schedule: Any) -> list[list[float]]:
    """The times of each stage: from its matched start (the first: from noise alone) to its end, falling, as many as its steps.

    Args:
        schedule: as `as_process` takes it.

    Raises:
        ValueError: a stage that ends where it begins or before, or has more steps than times; the message names it.
    """
    process, found = as_process(schedule), []
    start = process.first
    for j, stage in enumerate(config.stages):
        if j:
            start = process.start(config.stages[j - 1].end_time, config.ratio(j), config.gamma)
        if process.whole and stage.end_time != int(stage.end_time):
            raise ValueError(f"stages[{j}].end_time is {stage.end_time}; expected a whole training time")
        if 0 < stage.end_time < process.last:
            raise ValueError(f"stages[{j}].end_time is {stage.end_time}; expected at least {process.last:g}, where the schedule ends")
        if stage.end_time >= start:
            raise ValueError(f"stages[{j}].end_time is {stage.end_time}; expected a time below {start:g}, where the stage begins")
        if process.whole and stage.steps > start - stage.end_time + 1:
            most = int(start - stage.end_time + 1)
            raise ValueError(f"stages[{j}].steps is {stage.steps}; expected at most {most}: it has no more times, from {start:g} down")
        found.append(process.times(start, stage.end_time, stage.steps))
    return found


def next_times(times: list[float], stepping: str = "exact") -> list[float]:
    """Where the step at each time goes; below 0 the end.

    "released" is what DDIM guesses when told n = int(1000 (steps - 1) / (start - end)): t - 1000 // n, which need not be the next call's time.
    """
    if stepping == "exact":
        return [after for _, after in pairwise([*times, -1])]
    stride = FLOW_TIMES // int(FLOW_TIMES * (len(times) - 1) / (times[0] - times[-1]))
    return [t - stride for t in times]
