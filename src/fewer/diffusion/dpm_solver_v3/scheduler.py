"""DPM-Solver-v3 as a scheduler of diffusers: it takes another scheduler's place in a pipeline that predicts noise, data or v."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401 - pipelines that are opened look for it here
from jaxtyping import Float
from torch import Tensor

from fewer.diffusion._shared import to_epsilon
from fewer.diffusion._shared.prediction import at_least_single
from fewer.diffusion._shared.scheduler import FractionalTimeScheduler
from fewer.diffusion.dpm_solver_v3.ems import EMS, WEIGHTS
from fewer.diffusion.dpm_solver_v3.local_update import Integrals
from fewer.diffusion.dpm_solver_v3.multistep import Multistep, Plan, SolverConfig, make_plan


class DPMSolverV3Scheduler(FractionalTimeScheduler):
    """One network call a step, with the model's own statistics (arXiv 2310.13268).

    Args:
        ems: of the network on this noise schedule, from `estimate_ems` or `EMS.from_pretrained`.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the noise schedule, as in `DDPMScheduler`.
        prediction_type: "epsilon", "sample", "v_prediction" or "score".
        solver_order, pseudo_predictor, corrector, pseudo_corrector, lower_order_final, spacing, end_time: as in `SolverConfig`;
            `preset` gives the paper's.

    Examples:
        >>> from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
        >>> from fewer.diffusion._shared import NoiseSchedule
        >>> schedule = NoiseSchedule.from_diffusers(DDPMScheduler())
        >>> ends = [float(schedule.lambda_(torch.tensor(t))) for t in (schedule.t_max, schedule.t_min)]
        >>> ems = EMS.data_prediction(torch.linspace(*ends, 121, dtype=torch.float64))
        >>> scheduler = DPMSolverV3Scheduler.from_config(DDPMScheduler().config, ems=ems)
        >>> scheduler.set_timesteps(5)
        >>> x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(0.1 * x, t, x).prev_sample
        >>> x.shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        ems: EMS,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        solver_order: int = 3,
        pseudo_predictor: bool = False,
        corrector: str = "none",
        pseudo_corrector: bool = False,
        lower_order_final: bool = True,
        spacing: str = "logsnr",
        end_time: float | None = None,
    ) -> None:
        if not isinstance(ems, EMS):
            raise ValueError(f"ems is {type(ems).__name__}; expected EMS: estimate_ems(...) or EMS.from_pretrained(directory)")
        solver = {
            "solver_order": solver_order,
            "pseudo_predictor": pseudo_predictor,
            "corrector": corrector,
            "pseudo_corrector": pseudo_corrector,
            "lower_order_final": lower_order_final,
            "spacing": spacing,
            "end_time": end_time,
        }
        noise = {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "trained_betas": trained_betas,
        }
        self._solver_config = SolverConfig(**solver)
        self.start(noise, prediction_type=prediction_type, **solver)
        self.ems = ems
        self._integrals: Integrals | None = None
        self._placed: Plan | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From another scheduler's config, with `ems=`; keywords override what stands in it.

        Raises:
            ValueError: no EMS, or a config that means something else than noise added by betas (flow matching, EDM, thresholding, ...).
        """
        if "ems" not in kwargs:
            raise ValueError("from_config without EMS; expected from_config(config, ems=...): estimate_ems(...) makes them")
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """From a directory; the EMS are read from it where they are not given as `ems=`."""
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        if "ems" not in kwargs and (directory / WEIGHTS).is_file():
            kwargs["ems"] = EMS.from_pretrained(directory)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """The config, and the EMS beside it."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.ems.save_pretrained(save_directory)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the times and make all coefficients; forgets everything of a sample that was under way.

        Raises:
            ValueError: EMS of another schedule's range, or too coarse for so many steps.
        """
        self._integrals = self._integrals or Integrals(self.ems)
        self._plan, self._first = make_plan(self.ems, self.schedule, num_inference_steps, self._solver_config, self._integrals), 0
        self._placed, self.num_inference_steps = None, num_inference_steps
        self.take_times(self._plan.times[:-1], device)

    def moved(self, index: int, model_output: Tensor, sample: Tensor) -> Float[Tensor, "B *shape"]:
        """The sample at the end of a step; EMS of another shape are refused, rounding that costs more than the solver gains is told."""
        if self._next is None:
            self._begin(index, sample, model_output.dtype)
        solver, plan = self._solver, self._plan
        eps = to_epsilon(model_output, sample, plan.alphas[solver.m], plan.sigmas[solver.m], self.config["prediction_type"])
        return solver.step(eps, sample).to(sample.dtype)

    def _begin(self, index: int, sample: Tensor, output: torch.dtype) -> None:
        """A solver whose first step is the one of this index, its coefficients where the sample is; history begins there too."""
        self.ems.check_shape(sample.shape[1:])
        if index != self._first:
            self._first, self._placed = index, None
            self._plan = make_plan(self.ems, self.schedule, len(self.timesteps), self._solver_config, self._integrals, index)
        if output in (torch.float16, torch.bfloat16):
            one, kind = torch.ones((), dtype=torch.float64), self.config["prediction_type"]
            levels = zip(self._plan.alphas[:-1], self._plan.sigmas[:-1], strict=True)
            self._plan.warn_of_rounding(output, [float(to_epsilon(one, 0 * one, *level, kind).abs()) for level in levels])
        dtype = at_least_single(sample.dtype)
        placed = self._placed
        if placed is None or placed.f_of_eps[0].dtype != dtype or placed.f_of_eps[0].device != sample.device:
            self._placed = placed = self._plan.to(sample.to(dtype))
        self._solver = Multistep(placed)
