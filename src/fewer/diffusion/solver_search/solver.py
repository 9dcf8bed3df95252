"""The sampler that a schedule of decisions describes, as a loop over a network and as a scheduler of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401 - pipelines that are opened look for it here
from jaxtyping import Float, Float64
from torch import Tensor

from fewer.diffusion._shared import NoiseSchedule, to_epsilon
from fewer.diffusion._shared.prediction import Epsilon, at_least_single
from fewer.diffusion._shared.scheduler import FractionalTimeScheduler
from fewer.diffusion.dpm_solver_v3 import EMS
from fewer.diffusion.solver_search.decisions import SolverSchedule
from fewer.diffusion.solver_search.taylor import Combination, Integrals, Level, combination, relaxation
from fewer.files import read_weights, whole_file

SAME_TIME = 1e-4  # relatively to the schedule's range: how far outside it a time may round
MEAN = "mean_x0.safetensors"


@dataclass(frozen=True)
class Plan:
    """A schedule's coefficients, made once.

    Attributes:
        schedule: with lambdas on the EMS' grid where it has v3 steps.
        levels, times: at each point and the end; times float64 [n + 1].
        linear: l of the EMS at each point, where there are v3 steps.
        predictors, correctors: of each step.
        mean_x0: what stands for the clean image in the first step, where no call is made.
    """

    schedule: SolverSchedule
    levels: tuple[Level, ...]
    times: Float64[Tensor, "n_plus_1"]
    linear: Tensor | None
    predictors: tuple[Combination, ...]
    correctors: tuple[Combination | None, ...]
    mean_x0: Tensor | float | None = None

    @property
    def calls(self) -> list[int]:
        """The point of each network call: one a step, none at the first with afs, a second one after an implicit corrector."""
        schedule = self.schedule
        twice = [i > 0 and schedule.steps[i - 1].corrector == "implicit" for i in range(len(schedule.steps))]
        return [i for i, again in enumerate(twice) if i or schedule.afs == "none" for _ in range(1 + again)]

    def to(self, like: Tensor) -> Plan:
        """Its tensors in the type and on the device of `like`."""
        return replace(
            self,
            linear=None if self.linear is None else self.linear.to(like),
            predictors=tuple(each.to(like) for each in self.predictors),
            correctors=tuple(each and each.to(like) for each in self.correctors),
            mean_x0=self.mean_x0.to(like) if isinstance(self.mean_x0, Tensor) else self.mean_x0,
        )


def make_plan(
    schedule: SolverSchedule, noise_schedule: NoiseSchedule, integrals: Integrals | None = None, mean_x0: Tensor | None = None
) -> Plan:
    """All that does not depend on the network.

    Raises:
        ValueError: a schedule that is no solver, or not one of this noise schedule, v3 steps without EMS or outside their range,
            "average_x0" without a mean.
    """
    schedule.validate()
    nodes = [-1] * len(schedule.lambdas)
    if schedule.uses_ems:
        step = next(i for i, step in enumerate(schedule.steps) if step.prediction == "v3")
        if integrals is None:
            raise ValueError(
                f"step {step}: prediction is 'v3' without EMS; expected ems=: estimate_ems(...) or EMS.from_pretrained(directory)"
            )
        nodes = [integrals.node(each) for each in schedule.lambdas]
        on_grid = tuple(integrals.lambdas[nodes].tolist())
        schedule = schedule if on_grid == schedule.lambdas else replace(schedule, lambdas=on_grid).validate()
    if schedule.afs == "average_x0" and mean_x0 is None:
        raise ValueError("afs is 'average_x0' without a mean; expected mean_x0=: the mean of the data [*shape]")
    lambdas = torch.tensor(schedule.lambdas, dtype=torch.float64)
    times = noise_schedule.inverse(lambdas)
    slack = SAME_TIME * (noise_schedule.t_max - noise_schedule.t_min)
    if float(times[0]) > noise_schedule.t_max + slack or float(times[-1]) < noise_schedule.t_min - slack:
        raise ValueError(
            f"lambdas go from {schedule.lambdas[0]:.4g} to {schedule.lambdas[-1]:.4g}, times {float(times[0]):.4g} to {float(times[-1]):.4g}; "
            f"expected times of {noise_schedule.t_max:g} to {noise_schedule.t_min:g}: take a schedule of this noise schedule"
        )
    alphas = noise_schedule.alpha(times)
    levels = tuple(
        Level(*each) for each in zip(schedule.lambdas, alphas.tolist(), (alphas * torch.exp(-lambdas)).tolist(), nodes, strict=True)
    )
    predictors, correctors = [], []
    for i, step in enumerate(schedule.steps):
        start, (sets, corrected) = i + 1 + step.start, schedule.active(i)
        h = levels[i + 1].lambda_ - levels[start].lambda_
        factor = relaxation(step.relaxation, -h if step.prediction == "data" else h, h, step.coefficient)
        predictors.append(combination(step.prediction, levels, start, i + 1, sets, factor, integrals))
        corrects = step.corrector != "none"
        correctors.append(combination(step.prediction, levels, start, i + 1, corrected, 1.0, integrals) if corrects else None)
    linear = integrals.l[nodes] if integrals is not None and schedule.uses_ems else None
    mean = None if schedule.afs == "none" else mean_x0 if schedule.afs == "average_x0" else 0.0
    return Plan(schedule, levels, times, linear, tuple(predictors), tuple(correctors), mean)


class Values(dict[str, Tensor]):
    """What one network call says of a point: its noise e, and when asked for alpha d and alpha f."""

    def __init__(self, x: Tensor, noise: Tensor, sigma: float, l: Tensor | None) -> None:  # noqa: E741
        super().__init__(noise=noise)
        self.x, self.sigma, self.l = x, sigma, l

    def __missing__(self, prediction: str) -> Tensor:
        if prediction == "data":
            made = torch.sub(self.x, self["noise"], alpha=self.sigma)
        else:
            assert self.l is not None
            made = torch.addcmul(self.sigma * self["noise"], self.l, self.x, value=-1)
        return self.setdefault(prediction, made)


class Solver:
    """The sampler between two calls of the network.

    States are float32 at least. A point's values are taken where the network saw it: rounded, if a half precision rounded it. What
    somebody changed in a state between two steps (a region that is painted over) is not corrected.

    Attributes:
        states: x at each point, corrected where a corrector ran.
        values: what the network said there, at the uncorrected x after a pseudo corrector.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.states: list[Tensor] = []
        self.values: list[Values] = []
        self.predicted: Tensor | None = None
        self.corrected = False  # the newest point waits for the call at its corrected state

    def begin(self, x: Tensor) -> Tensor:
        """The first step, which needs no call: d is 0 or the mean of the data, and e what is left of x."""
        level, mean = self.plan.levels[0], self.plan.mean_x0
        assert mean is not None
        if isinstance(mean, Tensor) and mean.shape != x.shape[1:]:
            raise ValueError(f"mean_x0 is {tuple(mean.shape)} for samples of {tuple(x.shape[1:])}; expected the mean of the data [*shape]")
        x = x.to(at_least_single(x.dtype))
        return self._keep(x, x, (x - level.alpha * mean) / level.sigma)._predict()

    def step(self, noise: Float[Tensor, "B *shape"], seen: Float[Tensor, "B *shape"]) -> Float[Tensor, "B *shape"]:
        """From the noise that the network sees in a state, the next state (after an implicit corrector: the corrected one)."""
        x = seen.to(at_least_single(seen.dtype))
        noise, state, change = noise.to(x.dtype), x, None
        if self.predicted is not None and seen is not self.predicted:
            change = (seen - self.predicted.to(seen.dtype)).to(x.dtype)  # 0 where it was rounded alone
            state = self.predicted + change
        if self.corrected:
            self.states.pop()
            self.values.pop()
            self.corrected = False
            return self._keep(state, x, noise)._predict()
        self._keep(state, x, noise)
        i = len(self.states) - 1
        corrector = self.plan.correctors[i - 1] if i else None
        if corrector is not None:
            better = corrector(self.states, self.values)
            self.states[i] = better if change is None else torch.where(change == 0, better, state)
            if self.plan.schedule.steps[i - 1].corrector == "implicit":
                self.predicted, self.corrected = self.states[i], True
                return self.states[i]
        return self._predict()

    def _keep(self, state: Tensor, seen: Tensor, noise: Tensor) -> Solver:
        i, linear = len(self.states), self.plan.linear
        self.states.append(state)
        self.values.append(Values(seen, noise, self.plan.levels[i].sigma, None if linear is None else linear[i]))
        return self

    def _predict(self) -> Tensor:
        self.predicted = self.plan.predictors[len(self.states) - 1](self.states, self.values)
        return self.predicted


def run(eps: Epsilon, x: Tensor, plan: Plan) -> Tensor:
    """From noise to data along a plan whose tensors are where x is."""
    solver = Solver(plan)
    state = x if plan.mean_x0 is None else solver.begin(x)
    for i in plan.calls:
        seen = state if state.dtype == x.dtype else state.to(x.dtype)
        state = solver.step(eps(seen, plan.times[i]), seen)
    return state.to(x.dtype)


@torch.no_grad()
def sample(
    eps: Epsilon,
    x: Float[Tensor, "B *shape"],
    schedule: SolverSchedule,
    noise_schedule: NoiseSchedule,
    ems: EMS | None = None,
    mean_x0: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "B *shape"]:
    """From noise to data with `schedule.nfe` network calls (section 3).

    Args:
        eps: eps(x, t), the noise in x [B, *shape] at the noise schedule's time t, a float64 scalar tensor (`as_epsilon` makes one of a network).
        x: the noise at the first lambda, in the network's type; in half precision the states between are float32.
        schedule: whose lambdas lie in the noise schedule's range.
        ems: of this network, for v3 steps; lambdas are then moved to the nearest points of its grid.
        mean_x0: the mean of the data, for afs "average_x0".

    Returns:
        x at the last lambda, in the type of x.

    Raises:
        ValueError: a schedule that is no solver or not one of this noise schedule, v3 steps without EMS, "average_x0" without a mean.

    Examples:
        >>> noise_schedule = NoiseSchedule.edm(0.02, 20.0)
        >>> solver = SolverSchedule.preset("dpm++2m", 20, noise_schedule)
        >>> sample(lambda x, t: x / (t**2 + 1).sqrt(), 20 * torch.ones(1, 2).double(), solver, noise_schedule).shape
        torch.Size([1, 2])
    """
    if ems is not None:
        ems.check_shape(x.shape[1:])
    plan = make_plan(schedule, noise_schedule, Integrals(ems) if ems is not None and schedule.uses_ems else None, mean_x0)
    return run(eps, x, plan.to(x.to(at_least_single(x.dtype))))


class USFScheduler(FractionalTimeScheduler):
    """A schedule of decisions in any pipeline of diffusers (arXiv 2312.07243); its number of steps is the schedule's.

    With afs the first call's time is left out: `scale_model_input` moves the noise along the first step, and `step` does the same to the
    sample it is given. The time of a call after an implicit corrector stands twice.

    Args:
        solver_schedule: a `SolverSchedule`, or the plain data of one.
        ems: of the network, for v3 steps.
        mean_x0: the mean of the data [*shape], for afs "average_x0".
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: the noise schedule, as in `DDPMScheduler`.
        prediction_type: "epsilon", "sample", "v_prediction" or "score".

    Raises:
        ValueError: as `sample`.

    Examples:
        >>> from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
        >>> noise_schedule = NoiseSchedule.from_diffusers(DDPMScheduler())
        >>> solver = SolverSchedule.preset("unipc-2", 5, noise_schedule)
        >>> scheduler = USFScheduler.from_config(DDPMScheduler().config, solver_schedule=solver)
        >>> scheduler.set_timesteps(5)
        >>> x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(0.1 * x, t, x).prev_sample
        >>> x.shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        solver_schedule: SolverSchedule | Mapping[str, Any],
        ems: EMS | None = None,
        mean_x0: Tensor | None = None,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
    ) -> None:
        kept = asdict(solver_schedule) if isinstance(solver_schedule, SolverSchedule) else dict(solver_schedule)
        self.solver_schedule = SolverSchedule.from_dict(kept)
        noise = {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "trained_betas": trained_betas,
        }
        self.start(noise, prediction_type=prediction_type, solver_schedule=kept)
        self.ems, self.mean_x0 = ems, mean_x0
        self._integrals = Integrals(ems) if ems is not None and self.solver_schedule.uses_ems else None
        self._plan = self._whole = make_plan(self.solver_schedule, self.schedule, self._integrals, mean_x0)

    @classmethod
    def from_config(cls, config: Any, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From another scheduler's config, with `solver_schedule=`; keywords override what stands in it.

        Raises:
            ValueError: no schedule, or a config that means something else than noise added by betas (flow matching, EDM, ...).
        """
        if "solver_schedule" not in kwargs and "solver_schedule" not in config:
            raise ValueError(
                "from_config without a schedule; expected from_config(config, solver_schedule=...): a search's best, or a preset"
            )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """From a directory; EMS and mean are read from it where they stand there and are not given."""
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        if "ems" not in kwargs and (directory / "ems.json").is_file():
            kwargs["ems"] = EMS.from_pretrained(directory)
        if "mean_x0" not in kwargs and (directory / MEAN).is_file():
            kwargs["mean_x0"] = read_weights(directory / MEAN)["mean_x0"]
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """The config with the schedule; EMS and mean beside it."""
        from safetensors.torch import save_file

        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self.ems is not None:
            self.ems.save_pretrained(save_directory)
        if self.mean_x0 is not None:
            with whole_file(Path(save_directory) / MEAN, overwrite=True) as part:
                save_file({"mean_x0": self.mean_x0.contiguous()}, part)

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """Begin a sample; ValueError where the number is not the schedule's network calls (None: those)."""
        nfe = self.solver_schedule.nfe
        if num_inference_steps not in (None, nfe):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}; expected {nfe}, the calls of the schedule: search one for that number"
            )
        self.num_inference_steps, self._plan = nfe, self._whole
        self.take_times(self._whole.times[self._whole.calls], device)

    def _begun(self, index: int, sample: Tensor) -> Solver:
        """A solver whose first call is the one of this index; from the middle on (image to image) its history begins there."""
        whole = self._whole
        first = whole.calls[index] if index else 0
        self._plan = make_plan(whole.schedule.from_step(first), self.schedule, self._integrals) if index else whole
        if self._integrals is not None and self.ems is not None:
            self.ems.check_shape(sample.shape[1:])
        return Solver(self._plan.to(sample.to(at_least_single(sample.dtype))))

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """The sample as it is; before the first call with afs, moved along the first step."""
        if timestep is None or self._next is not None or self._whole.mean_x0 is None or self.turn(timestep):
            return sample
        return self._begun(0, sample).begin(sample).to(sample.dtype)

    def moved(self, index: int, model_output: Tensor, sample: Tensor) -> Float[Tensor, "B *shape"]:
        """The sample at the end of a step; EMS of another shape are refused."""
        calls, seen = self._whole.calls, sample
        if self._next is None:
            self._solver = self._begun(index, sample)
            if not index and self._whole.mean_x0 is not None:
                seen = self._solver.begin(sample).to(sample.dtype)
        if self._next is None and index and calls[index:].count(calls[index]) > 1:
            return sample  # begun before an implicit corrector, which has nothing to correct: the second call is the first
        point = self._whole.levels[calls[index]]
        alpha, sigma = (torch.tensor(each, dtype=torch.float64) for each in (point.alpha, point.sigma))
        eps = to_epsilon(model_output, seen, alpha, sigma, self.config["prediction_type"])
        return self._solver.step(eps, seen).to(sample.dtype)
