"""PFGM++'s sampler as a scheduler of diffusers, in the place of `EDMEulerScheduler`; it works without diffusers too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.checks import check_choice, check_positive, check_whole
from fewer.diffusion._shared.prediction import at_least_single
from fewer.diffusion.pfgmpp.loss import SIGMA_DATA, check_range, noise_condition, precondition_input, precondition_output
from fewer.diffusion.pfgmpp.perturbation import check_dimensions, check_images, per_sample, student_t_noise
from fewer.diffusion.pfgmpp.sampling import RHO, SIGMA_MAX, SIGMA_MIN, check_finite, moved, noise_grid, slope

if TYPE_CHECKING:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
else:
    try:
        from diffusers.configuration_utils import ConfigMixin, register_to_config
        from diffusers.schedulers.scheduling_utils import SchedulerMixin
    except ImportError:  # without diffusers: the same loop, no config

        class SchedulerMixin: ...

        class ConfigMixin: ...

        def register_to_config(init):
            return init


SAME_TIME = 1e-5  # of ln(sigma) / 4: nearer times are one
PREDICTIONS = {"epsilon": 1, "v_prediction": -1}  # the sign of c_out, as in EDMEulerScheduler
FIXED = {"sigma_schedule": "karras", "final_sigmas_type": "zero"}  # of EDMEulerScheduler's config, which has others too
EDM_CONFIG = {"sigma_min", "sigma_max", "sigma_data", "num_train_timesteps", "prediction_type", "rho", *FIXED}


@dataclass
class PFGMPPSchedulerOutput:
    """A step's end: the state at the next noise level, and the clean data that the network saw behind the last."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class PFGMPPHeunScheduler(SchedulerMixin, ConfigMixin):
    """Heun's method on EDM's grid, 2 n - 1 network calls for n steps, each call a `step` as in `HeunDiscreteScheduler` (section 4).

    The network is EDM's F: it is given `scale_model_input(x, t)` and t = ln(sigma) / 4, and `step` takes its raw output, as with
    `EDMEulerScheduler`. A state is kept in the dtype that it is handed in; pass float64 for the last digits.

    **The prior** is heavy-tailed: begin with `init_noise(shape, generator)`. A pipeline that draws its own begins with a Gaussian, which
    no finite D was trained for: give it `latents=student_t_noise(shape, D, generator)`, which it multiplies by `init_noise_sigma`.

    Args:
        D: extra dimensions that the network was trained with; math.inf is EDM.
        sigma_min, sigma_max, rho: of the grid.
        sigma_data: standard deviation of the data.
        num_train_timesteps: kept for the config's sake.
        prediction_type: "epsilon" (F), or "v_prediction" (-F).

    Attributes:
        timesteps: float32 [2 n - 1], ln(sigma) / 4: the first once, every further one twice.
        sigmas: float64 [n + 1], from sigma_max to sigma_min, then 0.
        init_noise_sigma: sigma_max.

    Raises:
        ValueError: a setting out of range.

    Examples:
        >>> scheduler = PFGMPPHeunScheduler(D=128)
        >>> scheduler.set_timesteps(18)
        >>> x = scheduler.init_noise((2, 1, 8, 8), torch.Generator().manual_seed(0))
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(0.1 * scheduler.scale_model_input(x, t), t, x).prev_sample
        >>> len(scheduler.timesteps), x.shape
        (35, torch.Size([2, 1, 8, 8]))
    """

    order = 2
    _compatibles: list[str] = []  # noqa: RUF012 - as diffusers has it

    @register_to_config
    def __init__(
        self,
        D: float = 128.0,
        sigma_min: float = SIGMA_MIN,
        sigma_max: float = SIGMA_MAX,
        sigma_data: float = SIGMA_DATA,
        rho: float = RHO,
        num_train_timesteps: int = 1000,
        prediction_type: str = "epsilon",
    ) -> None:
        check_dimensions(D)
        check_range(sigma_min, sigma_max)
        check_positive(rho=rho, sigma_data=sigma_data)
        check_choice(PREDICTIONS, prediction_type=prediction_type)
        self.D, self.sigma_min, self.sigma_max, self.rho, self.sigma_data = D, sigma_min, sigma_max, rho, sigma_data
        self.num_train_timesteps, self.sign = num_train_timesteps, PREDICTIONS[prediction_type]
        self.num_inference_steps: int | None = None
        self.sigmas = torch.zeros(0, dtype=torch.float64)
        self.timesteps = torch.zeros(0)
        self._times: list[float] = []
        self.begin_index: int | None = None
        self.restart()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From its own config, or that of an `EDMEulerScheduler` and the network's `D=...`; keywords override what stands in it.

        Raises:
            ValueError: a config that means something else (other noise than EDM's, another grid, or another end), or no D.
        """
        read = {name: value for name, value in dict(config or {}).items() if not name.startswith("_")}
        strange = [name for name in read if name not in EDM_CONFIG | {"D"}]
        strange += [f"{name}={read[name]!r}" for name, value in FIXED.items() if read.get(name, value) != value]
        if strange or "sigma_data" not in read | kwargs:
            raise ValueError(
                f"a config with {', '.join(strange) or 'no sigma_data'}; expected EDMEulerScheduler's (karras, zero) or this class's own: "
                "make the scheduler from its settings instead"
            )
        if "D" not in read | kwargs:
            raise ValueError(
                "a config with no D; expected what the network was trained with: from_config(config, D=128), EDM's is math.inf"
            )
        own = {name: value for name, value in dict(config or {}).items() if name not in FIXED}
        return super().from_config(own, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @property
    def init_noise_sigma(self) -> float:
        """What a pipeline multiplies its unit latents by."""
        return self.sigma_max

    def init_noise(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device | None = None,
    ) -> Float[Tensor, "B *shape"]:
        """The prior: sigma_max g sqrt(D / c), of this scheduler's own sigma_max."""
        return (self.sigma_max * student_t_noise(shape, self.D, generator, torch.float64, device)).to(dtype)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """n steps, at least 2, which are 2 n - 1 network calls; forgets everything of a sample that was under way."""
        self.sigmas = noise_grid(num_inference_steps, self.sigma_min, self.sigma_max, self.rho)
        times = noise_condition(self.sigmas[:-1])
        self.timesteps = torch.cat([times[:1], times[1:].repeat_interleave(2)]).to(device)
        self._times, self.num_inference_steps, self.begin_index = self.timesteps.tolist(), num_inference_steps, None
        self.restart()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at `timesteps[begin_index]`, the first call of a step, as image-to-image does."""
        check_whole(least=0, begin_index=begin_index)
        if begin_index >= len(self._times) or begin_index % 2:
            raise ValueError(f"begin_index is {begin_index}; expected an even number below {len(self._times)}: call set_timesteps before")
        self.restart()
        self.begin_index = begin_index

    def restart(self) -> None:
        """Begin another sample with the same timesteps."""
        self._next: int | None = None
        self._before: tuple[Tensor, Tensor] | None = None  # the state and the slope at a step's begin, between its two calls

    def scale_model_input(self, sample: Float[Tensor, "B *shape"], timestep: Tensor | float) -> Float[Tensor, "B *shape"]:
        """c_in x, in x's dtype."""
        dtype = at_least_single(sample.dtype)
        sigma = torch.tensor(self._sigma(self._turn(timestep)), dtype=dtype, device=sample.device)
        return precondition_input(sample.to(dtype), sigma, self.sigma_data).to(sample.dtype)

    def step(
        self,
        model_output: Float[Tensor, "B *shape"],
        timestep: Tensor | float,
        sample: Float[Tensor, "B *shape"],
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> PFGMPPSchedulerOutput | tuple[Tensor, Tensor]:
        """The state for the next call. Steps are taken in the order of `timesteps`, from any even one on; nothing is drawn from `generator`.

        Raises:
            ValueError: before set_timesteps, after the last step, at another time than the next one, or an output of another shape.
            FloatingPointError: the state is not finite; the message names the step.
        """
        index = self._turn(timestep)
        check_images(sample=sample, model_output=model_output)
        if model_output.shape != sample.shape:
            raise ValueError(f"model_output is {tuple(model_output.shape)}; expected the sample's shape {tuple(sample.shape)}")
        sigma, begin, following = self._sigma(index), float(self.sigmas[index // 2]), float(self.sigmas[index // 2 + 1])
        dtype = at_least_single(model_output.dtype)  # as `EDMPrecond` computes it
        level = torch.tensor(sigma, dtype=dtype, device=sample.device)
        output = model_output.to(dtype) if self.sign > 0 else -model_output.to(dtype)
        clean = precondition_output(sample.to(dtype), output, level, self.sigma_data)
        x = sample.to(at_least_single(sample.dtype))
        d = slope(x, clean, sigma)
        if self._before is not None:  # the second call, at the step's end: once more from its begin, along the mean slope
            (x, first), self._before = self._before, None
            d = (first + d) / 2
        elif following > 0:
            self._before = (x, d)
        ahead = moved(x, d, begin, following)
        check_finite(ahead, index // 2 + 1, following)
        self._next = index + 1
        ends = ahead.to(sample.dtype), clean.to(sample.dtype)
        return PFGMPPSchedulerOutput(*ends) if return_dict else ends

    def add_noise(
        self, original_samples: Float[Tensor, "B *shape"], noise: Float[Tensor, "B *shape"], timesteps: Float[Tensor, "B"]
    ) -> Float[Tensor, "B *shape"]:
        """y + sigma * noise at times ln(sigma) / 4; noise as `student_t_noise` gives it."""
        dtype = at_least_single(original_samples.dtype)
        sigma = per_sample((4 * timesteps.to(dtype)).exp().to(noise.device), noise)
        return (original_samples.to(dtype) + sigma * noise.to(dtype)).to(original_samples.dtype)

    def _sigma(self, index: int) -> float:
        """The noise level that the network is called at."""
        return float(self.sigmas[(index + 1) // 2])

    def _turn(self, timestep: Tensor | float) -> int:
        """The index of the call at this time; ValueError before set_timesteps, after the last, or out of turn."""
        if not self._times:
            raise ValueError("step before set_timesteps; call set_timesteps(n) first")
        time, index = float(timestep), self._next
        if index is None:
            begins = self._times[::2]
            nearest = 2 * min(range(len(begins)), key=lambda i: abs(begins[i] - time))
            index = nearest if self.begin_index is None else self.begin_index
        if index == len(self._times) or abs(time - self._times[index]) > SAME_TIME:
            expected = "none: all steps are taken" if index == len(self._times) else f"{self._times[index]:.6g}"
            raise ValueError(f"step at time {time:.6g}; expected {expected}. Call set_timesteps(n) before each sample")
        return index

    def __len__(self) -> int:
        return self.num_train_timesteps
