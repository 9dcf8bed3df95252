"""DC-Solver as a scheduler of diffusers: UniPC whose buffered outputs are compensated; it takes another scheduler's place in a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput  # noqa: F401 - pipelines that are opened look for it here
from jaxtyping import Float
from torch import Tensor

from fewer.checks import check_choice, check_whole
from fewer.diffusion._shared.prediction import at_least_single
from fewer.diffusion.dc_solver.ratios import Ratios, check_key, check_ratios
from fewer.diffusion.dc_solver.unipc import SOLVER_TYPES, Level, Solver, State, descending, first_compensated

OF_DPM = ("midpoint", "heun", "logrho")  # solver types of DPM-Solver's configs
FOREIGN = ("use_flow_sigmas", "use_dynamic_shifting", "solver_p", "shift_terminal", "use_lu_lambdas", "euler_at_final")
OWN_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


class DCSolverMultistepScheduler(UniPCMultistepScheduler):
    """One network call a step, its output buffered where it would have been without the predictor's error (arXiv 2409.03755).

    With all ratios 1 it is `UniPCMultistepScheduler`. States and outputs are kept in float32 or better; samples come back in their own dtype.

    Args:
        solver_order: p of predictor and corrector; 2 for guided, 3 for unconditional sampling.
        solver_type: "bh1" or "bh2"; those of DPM-Solver's configs become "bh2", with a warning.
        dc_order: K, 1 to 3; compensation reads off a polynomial through K + 1 outputs.
        ratios: one a step, 1 at the first max(2, K); or `Ratios` that `search_ratios` or `CascadePolynomial.ratios` gave, which are refused
            where they belong to another config. None: all 1.
        disable_corrector: the steps (from 0) whose end is not corrected.
        use_corrector: False: the predictor alone (order 1 is DDIM, order 2 with "bh2" is DPM-Solver++ 2M).
        final_sigmas_type: "sigma_min" ends at the time 0 of the training schedule, "zero" at the clean image.
        num_train_timesteps, beta_start, ..., sigma_max: as in `UniPCMultistepScheduler`.

    Raises:
        ValueError: ratios that are not finite, of another config, or not 1 where there are too few outputs; a config of flow matching.

    Examples:
        >>> import torch
        >>> scheduler = DCSolverMultistepScheduler(ratios=[1, 1, 1.16, 1.15, 1.59])
        >>> scheduler.set_timesteps(5)
        >>> x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(0.1 * x, t, x).prev_sample
        >>> x.shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        solver_order: int = 2,
        prediction_type: Any = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        predict_x0: bool = True,
        solver_type: Any = "bh2",
        lower_order_final: bool = True,
        disable_corrector: Sequence[int] = (),
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        timestep_spacing: Any = "linspace",
        steps_offset: int = 0,
        final_sigmas_type: Any = "sigma_min",
        rescale_betas_zero_snr: bool = False,
        sigma_min: float | None = None,
        sigma_max: Any = None,
        dc_order: int = 2,
        ratios: Sequence[float] | Ratios | None = None,
        use_corrector: bool = True,
    ) -> None:
        check_whole(solver_order=solver_order)
        check_choice((1, 2, 3), dc_order=dc_order)
        if solver_type in OF_DPM:
            warnings.warn(f"solver_type {solver_type!r} is DPM-Solver's; 'bh2' is taken", stacklevel=2)
            solver_type = "bh2"
        check_choice(SOLVER_TYPES, solver_type=solver_type)
        if trained_betas is not None:
            trained_betas = [float(beta) for beta in trained_betas]
        disable_corrector = [int(step) for step in disable_corrector]
        unipc: dict[str, Any] = {
            "num_train_timesteps": num_train_timesteps, "beta_start": beta_start, "beta_end": beta_end, "beta_schedule": beta_schedule,
            "trained_betas": trained_betas, "solver_order": solver_order, "prediction_type": prediction_type, "thresholding": thresholding,
            "dynamic_thresholding_ratio": dynamic_thresholding_ratio, "sample_max_value": sample_max_value, "predict_x0": predict_x0,
            "solver_type": solver_type, "lower_order_final": lower_order_final, "disable_corrector": disable_corrector,
            "use_karras_sigmas": use_karras_sigmas, "use_exponential_sigmas": use_exponential_sigmas, "use_beta_sigmas": use_beta_sigmas,
            "timestep_spacing": timestep_spacing, "steps_offset": steps_offset, "final_sigmas_type": final_sigmas_type,
            "rescale_betas_zero_snr": rescale_betas_zero_snr, "sigma_min": sigma_min, "sigma_max": sigma_max,
        }  # fmt: skip
        super().__init__(**unipc)
        values = list(ratios.values if isinstance(ratios, Ratios) else ratios) if ratios is not None else None
        self.register_to_config(dc_order=dc_order, use_corrector=use_corrector, ratios=values)
        if isinstance(ratios, Ratios):
            check_key(ratios.config, self.config, "ratios")
        if values is not None:
            check_ratios(values)
            early = [i for i, value in enumerate(values[: first_compensated(dc_order)]) if value != 1]
            if early:
                raise ValueError(
                    f"ratios {values} are not 1 at the steps {early}; expected 1 at the first {first_compensated(dc_order)}, which have too "
                    "few outputs before them"
                )
        self.solver: Solver | None = None
        self._state = State(-1)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From another scheduler's config; keywords override what stands in it.

        `final_sigmas_type` is "sigma_min" unless a keyword says otherwise or the config is this class's own: UniPC's and DPM-Solver's
        configs bring "zero" along, which is not the end that ratios are searched for.

        Raises:
            ValueError: a config that means something else than noise added by betas.
        """
        read: Any = config if hasattr(config, "get") else {}  # a directory is an older way to say from_pretrained
        asked = [name for name in FOREIGN if read.get(name)]
        if asked or read.get("prediction_type") == "flow_prediction":
            raise ValueError(
                f"a config with {', '.join(asked) or 'flow_prediction'}; expected one of noise added by betas, whose own grid is sampled: give "
                "another scheduler's config"
            )
        if "dc_order" not in read:
            kwargs.setdefault("final_sigmas_type", "sigma_min")
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
    ) -> None:
        """Choose the times; forgets everything of a sample that was under way.

        Raises:
            ValueError: another number of steps than there are ratios, no more steps than max(2, K) with ratios other than 1, or times at
                which no ratio could mean anything (two calls at one time).
        """
        if sigmas is not None or mu is not None:
            raise ValueError("set_timesteps with sigmas or mu, which are flow matching's; expected a number of steps alone")
        check_whole(num_inference_steps=num_inference_steps)
        assert num_inference_steps is not None
        ratios = self.config["ratios"]
        if ratios is not None:
            check_ratios(ratios, num_inference_steps)
        # the own grids end with a step of length 0 where they end at sigma_min: ask for one step more, and drop it
        drops = self.config["final_sigmas_type"] == "sigma_min" and any(self.config[name] for name in OWN_GRIDS)
        super().set_timesteps(num_inference_steps + drops, device)
        if drops:
            self.sigmas, self.timesteps = self.sigmas[:-1], self.timesteps[:-1]
        self.take_levels(self.timesteps, self.sigmas)

    def take_levels(self, times: Tensor, sigmas: Tensor) -> None:
        """Sample at these times [M] of the training schedule, with sigma / alpha of [M + 1] levels, from now on."""
        self.timesteps, self.sigmas = times, sigmas
        self.num_inference_steps, self._step_index, self._begin_index, self._state = len(times), None, None, State(-1)
        levels = tuple(Level(*(float(part) for part in self._sigma_to_alpha_sigma_t(sigma))) for sigma in sigmas.double())
        config, compensates = self.config, self.compensates
        if not descending(levels):
            raise ValueError(f"noise levels {[round(float(s), 6) for s in sigmas]}; expected each below the one before: take fewer steps")
        if compensates and len(times) <= first_compensated(config["dc_order"]):
            raise ValueError(
                f"{len(times)} steps with ratios other than 1; expected more than {first_compensated(config['dc_order'])}, before which there "
                "are too few outputs: take more steps, or no ratios"
            )
        if compensates and len(set(times.tolist())) < len(times):
            raise ValueError(
                f"two of the {len(times)} calls are at one time ({times.tolist()}); expected times of their own: take fewer steps"
            )
        if not float(sigmas[-1]) and config["solver_order"] > 1 and not config["lower_order_final"]:
            raise ValueError("final_sigmas_type 'zero' without lower_order_final; expected 'sigma_min', or a last step of order 1")
        self.solver = Solver(
            levels,
            tuple(float(time) for time in times),
            config["solver_order"],
            config["solver_type"],
            config["predict_x0"],
            config["lower_order_final"],
            config["use_corrector"],
            frozenset(config["disable_corrector"]),
            config["dc_order"],
        )

    @property
    def compensates(self) -> bool:
        """Whether any ratio is not 1."""
        return any(value != 1 for value in self.config["ratios"] or ())

    def converted(self, model_output: Tensor, sample: Tensor, index: int) -> Tensor:
        """The network's output at step `index` in the solver's own parameterisation, in float32 or better."""
        dtype = at_least_single(sample.dtype)
        self._step_index = index
        return self.convert_model_output(model_output.to(dtype), sample=sample.to(dtype))

    def step(
        self,
        model_output: Float[Tensor, "B *shape"],
        timestep: Any,
        sample: Float[Tensor, "B *shape"],
        return_dict: bool = True,
        generator: Any = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The sample at the next time. Steps are taken in the order of `timesteps`, from any of them on; nothing is drawn from `generator`.

        Raises:
            ValueError: before set_timesteps, or after the last step.
        """
        if self.solver is None:
            raise ValueError("step before set_timesteps; call set_timesteps(n) first")
        if self._step_index is None:
            self._init_step_index(timestep)
            assert self._step_index is not None
            self._state = State(self._step_index - 1)
        index = self._step_index
        if index >= self.solver.steps:
            raise ValueError(f"step after the last of {self.solver.steps}; call set_timesteps(n) before each sample")
        output = self.converted(model_output, sample, index)
        state = self.solver.take(self._state, output, sample.to(output.dtype))
        ratio = self.config["ratios"][index] if self.config["ratios"] is not None else 1
        self._state = self.solver.compensated(state, ratio)
        moved = self.solver.predict(self._state).to(sample.dtype)
        self._step_index = index + 1
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)  # pyright: ignore[reportArgumentType] - a tensor


def own_levels(scheduler: DCSolverMultistepScheduler, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(times [M], sigma / alpha [M + 1]) of so many steps, as float64, leaving the scheduler as it is."""
    fresh = DCSolverMultistepScheduler.from_config(scheduler.config, ratios=None)
    fresh.set_timesteps(steps)
    return fresh.timesteps.double().numpy(), fresh.sigmas.double().numpy()
