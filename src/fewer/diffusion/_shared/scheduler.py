"""What diffusers asks of every scheduler, for those of the area that choose their own, fractional times of a variance-preserving process."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from jaxtyping import Float, Float64
from torch import Tensor

from fewer.diffusion._shared.noise_schedule import NoiseSchedule, check_config
from fewer.diffusion._shared.prediction import at_least_single, check_prediction

SAME_TIME = 1e-3  # of a training step: two times that are nearer are one


class FractionalTimeScheduler(SchedulerMixin, ConfigMixin):
    """Times, turns, steps and noise; a sampler adds `set_timesteps` and `moved`.

    Attributes:
        schedule: the noise schedule.
        timesteps: float64 [n], fractional: (t - 1 / T) T, T = num_train_timesteps.
        init_noise_sigma: 1.0.
        begin_index: the step that sampling begins with, where `set_begin_index` said so.
    """

    order = 1
    init_noise_sigma = 1.0

    def start(self, noise: dict[str, Any], **settings: Any) -> None:
        """What `__init__` does first: keep the settings as diffusers does; `noise` are those of `DDPMScheduler`."""
        check_prediction(settings["prediction_type"])
        betas = noise["trained_betas"]
        noise = noise | {"trained_betas": None if betas is None else [float(beta) for beta in betas]}
        self.register_to_config(**noise, **settings)
        self.schedule = NoiseSchedule.from_diffusers(noise)
        self.num_inference_steps: int | None = None
        self.take_times(torch.zeros(0, dtype=torch.float64))

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From another scheduler's config; keywords override what stands in it.

        Raises:
            ValueError: a config that means something else than noise added by betas (flow matching, EDM, thresholding, ...).
        """
        check_config(config)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def take_times(self, times: Float64[Tensor, "n"], device: str | torch.device | None = None) -> None:
        """Sample at these times of the schedule from now on."""
        self._times = self.schedule.timestep(times)
        self.timesteps = self._times.to(device)
        self._next: int | None = None
        self.begin_index: int | None = None

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at `timesteps[begin_index]`, as image-to-image and inpainting do; also found from the time of the first step."""
        if not 0 <= begin_index < len(self.timesteps):
            raise ValueError(f"begin_index is {begin_index}; expected 0 to {len(self.timesteps) - 1}: call set_timesteps(n) before")
        self.begin_index, self._next = begin_index, None

    def restart(self) -> None:
        """Begin another sample with the same timesteps."""
        self._next = None

    def turn(self, timestep: Tensor | float) -> int:
        """The index of the step at this time; ValueError before set_timesteps, after the last step, or out of turn."""
        steps, time = len(self._times), float(timestep)
        if not steps:
            raise ValueError("step before set_timesteps; call set_timesteps(n) first")
        index = self._next
        if index is None:
            gaps = (self._times - time).abs()
            found = int(gaps.argmin()) if float(gaps.min()) <= SAME_TIME else 0
            index = found if self.begin_index is None else self.begin_index
        if index == steps or abs(time - float(self._times[index])) > SAME_TIME:
            expected = "none: all steps are taken" if index == steps else f"{float(self._times[index]):.6g}"
            raise ValueError(f"step at time {time:.6g}; expected {expected}. Call set_timesteps(n) before each sample")
        return index

    def moved(self, index: int, model_output: Tensor, sample: Tensor) -> Float[Tensor, "B *shape"]:
        """The sample at the end of the step of this index; where `_next` is None a sample begins with it."""
        raise NotImplementedError

    def step(
        self,
        model_output: Float[Tensor, "B *shape"],
        timestep: Tensor | float,
        sample: Float[Tensor, "B *shape"],
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at the next time. Steps are taken in the order of `timesteps`, from any of them on; nothing is drawn from `generator`.

        Raises:
            ValueError: before set_timesteps, after the last step, at another time than the next one, or what the class says.
        """
        index = self.turn(timestep)
        moved = self.moved(index, model_output, sample)
        self._next = index + 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)  # pyright: ignore[reportArgumentType] - a tensor

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample as it is."""
        return sample

    def add_noise(
        self, original_samples: Float[Tensor, "B *shape"], noise: Float[Tensor, "B *shape"], timesteps: Tensor
    ) -> Float[Tensor, "B *shape"]:
        """alpha x_0 + sigma noise at network times [B], which may be fractional."""
        t = self.schedule.time(timesteps).reshape(-1, *[1] * (original_samples.ndim - 1))
        clean = original_samples.to(at_least_single(original_samples.dtype))
        noisy = self.schedule.alpha(t).to(clean) * clean + self.schedule.sigma(t).to(clean) * noise.to(clean)
        return noisy.to(original_samples.dtype)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]
