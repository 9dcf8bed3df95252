"""Noise schedules: how much of the image and how much noise a time stands for, and which time stands for a given ratio of the two."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

Times = Float64[Tensor, "*times"]

BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
FOREIGN = {  # settings of diffusers' configs under which x_t, the network's time or the solver's own steps mean something else
    "rescale_betas_zero_snr": "makes lambda infinite at the last time",
    "use_flow_sigmas": "is flow matching, whose x_t is (1 - sigma) x_0 + sigma noise",
    "use_karras_sigmas": "chooses other noise levels than the solver's own spacing",
    "use_exponential_sigmas": "chooses other noise levels than the solver's own spacing",
    "use_beta_sigmas": "chooses other noise levels than the solver's own spacing",
    "use_lu_lambdas": "chooses other noise levels than the solver's own spacing",
    "thresholding": "changes every denoised image, so that the ODE is another one",
}
FOREIGN_KINDS = {  # a part of the class's name, or a setting that only this kind has
    ("FlowMatch", "base_shift"): "flow matching",
    ("EDM", "sigma_data"): "a network preconditioned as EDM's",
    ("VeScheduler", "snr"): "a variance-exploding process",
}


class NoiseSchedule(ABC):
    """alpha, sigma and lambda = log(alpha / sigma) over a continuous time t, in float64.

    Single precision would shift lambda by 1e-7 of itself, which is seen in the error of a precise sampler.

    Attributes:
        t_min, t_max: the range of t.
    """

    t_min: float
    t_max: float

    @staticmethod
    def from_diffusers(config: Any) -> DiscreteSchedule:
        """The schedule of a diffusers scheduler's config (or the scheduler itself): its betas, as `DDPMScheduler` reads them.

        Examples:
            >>> from diffusers.schedulers.scheduling_ddim import DDIMScheduler
            >>> scheduler = DDIMScheduler(beta_schedule="scaled_linear")
            >>> schedule = NoiseSchedule.from_diffusers(scheduler)
            >>> bool((schedule.alpha(schedule.time(999)) ** 2 - scheduler.alphas_cumprod[-1]).abs() < 1e-7)
            True
        """
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        name, config = type(config).__name__, getattr(config, "config", config)
        if not isinstance(config, Mapping):
            raise ValueError(f"from_diffusers takes a scheduler or its config; got {name}: give scheduler.config")
        check_config(config)
        return DiscreteSchedule.from_betas(DDPMScheduler(**{name: config[name] for name in BETAS if name in config}).betas)

    @staticmethod
    def linear(beta_0: float = 0.1, beta_1: float = 20.0) -> LinearSchedule:
        """The variance-preserving schedule of ScoreSDE: beta rises in a line over t in [1e-4, 1]."""
        return LinearSchedule(beta_0, beta_1)

    @staticmethod
    def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDMSchedule:
        """The schedule of EDM: alpha is 1, and t is sigma."""
        return EDMSchedule(sigma_min, sigma_max)

    @abstractmethod
    def log_alpha(self, t: Times) -> Times: ...

    @abstractmethod
    def log_sigma(self, t: Times) -> Times: ...

    @abstractmethod
    def inverse(self, lambda_: Times) -> Times:
        """The time at which log(alpha / sigma) is lambda_."""

    @abstractmethod
    def timestep(self, t: Times) -> Times:
        """What a network made for this schedule is given as its time."""

    @abstractmethod
    def time(self, timestep: Tensor | float) -> Times:
        """The t for which a network is given `timestep`."""

    def alpha(self, t: Times) -> Times:
        return self.log_alpha(_double(t)).exp()

    def sigma(self, t: Times) -> Times:
        return self.log_sigma(_double(t)).exp()

    def lambda_(self, t: Times) -> Times:
        t = _double(t)
        return self.log_alpha(t) - self.log_sigma(t)


class VariancePreserving(NoiseSchedule):
    """alpha^2 + sigma^2 = 1."""

    t_max = 1.0

    def log_sigma(self, t: Times) -> Times:
        return torch.log(-torch.expm1(2 * self.log_alpha(t))) / 2

    @staticmethod
    def log_alpha_of(lambda_: Times) -> Times:
        """alpha^2 = 1 / (1 + e^(-2 lambda))."""
        return -torch.nn.functional.softplus(-2 * _double(lambda_)) / 2


@dataclass(frozen=True, eq=False)
class DiscreteSchedule(VariancePreserving):
    """T training steps, step i at t = (i + 1) / T; log alpha is linear between them. The network's time is i = (t - 1 / T) T.

    Args:
        log_alphas: float64 [T], falling: half the logarithm of diffusers' `alphas_cumprod`.
    """

    log_alphas: Float64[Tensor, "T"]

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> DiscreteSchedule:
        """From the betas of the training steps."""
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("betas must be at least two numbers between 0 and 1")
        return cls(torch.log1p(-betas).cumsum(0) / 2)

    @property
    def t_min(self) -> float:
        return 1 / len(self.log_alphas)

    @property
    def times(self) -> Times:
        return torch.arange(1, len(self.log_alphas) + 1, dtype=torch.float64) / len(self.log_alphas)

    def log_alpha(self, t: Times) -> Times:
        return interpolate(_double(t), self.times, self.log_alphas)

    def inverse(self, lambda_: Times) -> Times:
        return interpolate(self.log_alpha_of(lambda_), self.log_alphas.flip(0), self.times.flip(0))

    def timestep(self, t: Times) -> Times:
        return (_double(t) - self.t_min) * len(self.log_alphas)

    def time(self, timestep: Tensor | float) -> Times:
        return _double(timestep) / len(self.log_alphas) + self.t_min


@dataclass(frozen=True)
class LinearSchedule(VariancePreserving):
    """log alpha = -t^2 (beta_1 - beta_0) / 4 - t beta_0 / 2. The network's time is 999 t."""

    beta_0: float
    beta_1: float
    t_min: float = 1e-4

    def log_alpha(self, t: Times) -> Times:
        return -(t**2) * (self.beta_1 - self.beta_0) / 4 - t * self.beta_0 / 2

    def inverse(self, lambda_: Times) -> Times:
        # the root of the quadratic above, in the form that does not cancel for small t
        doubled = -2 * self.log_alpha_of(lambda_)
        return 2 * doubled / (self.beta_0 + torch.sqrt(self.beta_0**2 + 2 * (self.beta_1 - self.beta_0) * doubled))

    def timestep(self, t: Times) -> Times:
        return _double(t) * 999

    def time(self, timestep: Tensor | float) -> Times:
        return _double(timestep) / 999


@dataclass(frozen=True)
class EDMSchedule(NoiseSchedule):
    """alpha = 1, sigma = t; the network is given sigma."""

    t_min: float
    t_max: float

    def log_alpha(self, t: Times) -> Times:
        return torch.zeros_like(_double(t))

    def log_sigma(self, t: Times) -> Times:
        return _double(t).log()

    def inverse(self, lambda_: Times) -> Times:
        return (-_double(lambda_)).exp()

    def timestep(self, t: Times) -> Times:
        return _double(t)

    def time(self, timestep: Tensor | float) -> Times:
        return _double(timestep)


def check_config(config: Mapping[str, Any]) -> None:
    """ValueError, by name, where a scheduler's config does not describe a variance-preserving process by its betas."""
    name = str(config.get("_class_name", "a scheduler"))
    for (part, setting), meaning in FOREIGN_KINDS.items():
        if part in name or setting in config:
            raise ValueError(f"the config of {name} is {meaning}; expected one with betas, such as DDPMScheduler's: give that")
    for setting, meaning in FOREIGN.items():
        if config.get(setting):
            raise ValueError(
                f"{setting}={config[setting]} {meaning}; expected a config without it: set {setting}=False if the model was not made for it"
            )
    if str(config.get("prediction_type", "")).startswith("flow"):
        raise ValueError(f"prediction_type {config['prediction_type']!r} is flow matching; expected epsilon, sample or v_prediction")
    if not {"beta_start", "beta_schedule", "trained_betas"} & set(config):
        raise ValueError(f"the config of {name} has no betas; expected beta_start, beta_end and beta_schedule, or trained_betas")


def interpolate(x: Times, xs: Float64[Tensor, "n"], ys: Float64[Tensor, "n"]) -> Times:
    """Linear between the points (xs rising, ys), and on along the outermost segments."""
    right = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    x_0, x_1, y_0, y_1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    return y_0 + (x - x_0) * (y_1 - y_0) / (x_1 - x_0)


def _double(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value).to("cpu", torch.float64)
