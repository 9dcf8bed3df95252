"""Sampling and inverting a rectified flow in a few calls, as functions and as a scheduler of diffusers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401 - see ReflowScheduler
from jaxtyping import Float
from torch import Tensor, nn

from fewer.checks import check_choice, check_not_negative, check_whole
from fewer.diffusion._shared.noise_schedule import DiscreteSchedule, NoiseSchedule, check_config
from fewer.diffusion._shared.prediction import PREDICTIONS, at_least_single
from fewer.diffusion._shared.scheduler import FractionalTimeScheduler
from fewer.diffusion.rectified_flow_plus.velocity import EPS, Velocity, check_answer, check_images, vp_scale, vp_timestep, vp_velocity
from fewer.fitting import evaluating

SOLVERS, UPDATES = ("euler", "heun"), ("default", "new")
T_START = 1e-3  # of an inversion, and the noise that is added there


def grid(steps: int) -> list[float]:
    """k / N from 1 - 1e-5 down to 0."""
    return [1 - EPS, *(k / steps for k in range(steps - 1, -1, -1))]


def advance(x: Tensor, v: Tensor, t: float, following: float, z: Tensor, update: str) -> Tensor:
    """From t to the following time: along v ("default"), or onto the line from x_0 = x - t v to the initial noise z ("new")."""
    if update == "default":
        return x + (following - t) * v
    return (1 - following) * (x - t * v) + following * z


@torch.no_grad()
def states(
    model: Velocity, x: Float[Tensor, "B *shape"], z: Tensor, times: list[float], solver: str, update: str, *condition: Any
) -> Iterator[Float[Tensor, "B *shape"]]:
    """The state after each step through the times, float32 at least; the model sees it in the type of z, in eval mode.

    The last step is Euler's.
    """

    def velocity(x: Tensor, t: float) -> Tensor:
        v = model(x.to(z.dtype), torch.tensor(t, dtype=at_least_single(x.dtype), device=x.device), *condition)
        check_answer(v, x)
        return v.to(x.dtype)

    training = [model] if isinstance(model, nn.Module) and any(part.training for part in model.modules()) else []
    with evaluating(*training):
        for t, following in pairwise(times):
            v = velocity(x, t)
            if solver == "heun" and following != times[-1]:
                v = (v + velocity(advance(x, v, t, following, z, update), following)) / 2
            x = advance(x, v, t, following, z, update)
            yield x


def check_solving(z: Tensor, steps: int, solver: str, update: str) -> None:
    """ValueError where a flow cannot be followed so."""
    check_whole(steps=steps)
    check_choice(SOLVERS, solver=solver)
    check_choice(UPDATES, update=update)
    check_images(input=z)


def sample(
    model: Velocity, z: Float[Tensor, "B *shape"], steps: int = 2, solver: str = "euler", update: str = "default", *condition: Any
) -> Float[Tensor, "B *shape"]:
    """Where noises end on the flow from t = 1 - 1e-5 to 0.

    Args:
        model: `model(x, t, *condition)` with t a scalar tensor: `VelocityFromEDM`, `VelocityFromVP`, or a flow's own network.
        z: standard normal noises. The state is kept in float32 at least; what comes back has the type of z.
        steps: N.
        solver: "euler" (N calls) or "heun" (2 N - 1: the last step is Euler's).
        update: "default" follows the velocity; "new" goes back to the line through the initial noise at every step, which is better at 2
            to 4 steps of a nearly straight flow, and is no ODE solver: with many steps it does not come to the flow's end.
        condition: labels and the like, handed to the model.

    Raises:
        ValueError: a solver or an update that is not known, fewer than 1 step, noises that are no floats [B, *shape], or velocities of
            another shape than theirs.

    Examples:
        >>> end = sample(lambda x, t: torch.full_like(x, 2.0), torch.ones(1, 3), steps=4)
        >>> end.round(decimals=3)
        tensor([[-1., -1., -1.]])
    """
    check_solving(z, steps, solver, update)
    start = (1 - EPS) * z.to(at_least_single(z.dtype))
    return deque(states(model, start, z, grid(steps), solver, update, *condition), maxlen=1)[0].to(z.dtype)


def invert(
    model: Velocity,
    x: Float[Tensor, "B *shape"],
    steps: int = 2,
    solver: str = "euler",
    *condition: Any,
    update: str = "default",
    t_start: float = T_START,
    noise: float = T_START,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "B *shape"]:
    """The noises that images come from: the flow from t_start to 1, the velocity never asked at 1.

    Args:
        model, condition: as in `sample`; another label on the way back translates an image.
        x: images in [-1, 1].
        steps, solver: as in `sample`.
        update: "default" alone.
        t_start: where it begins, with (1 - t_start) x + noise * randn: a velocity is not trusted at 0. Costs about as much in a round trip.
        noise: what is added there.
        generator: of that noise, on any device.

    Raises:
        ValueError: as `sample`; update="new", which needs the noise that is looked for; t_start outside (0, 1 / steps).
    """
    check_solving(x, steps, solver, update)
    if update == "new":
        raise ValueError('update is "new", which starts from the noise that is looked for; expected update="default" for an inversion')
    check_not_negative(noise=noise)
    if not 0 < t_start < 1 / steps:
        raise ValueError(f"t_start is {t_start}; expected a time between 0 and 1 / steps = {1 / steps:g}: the default is {T_START}")
    state = (1 - t_start) * x.to(at_least_single(x.dtype))
    if noise:
        place = x.device if generator is None else generator.device
        state = state + noise * torch.randn(x.shape, generator=generator, device=place, dtype=state.dtype).to(x.device)
    times = [t_start, *(k / steps for k in range(1, steps + 1))]
    return deque(states(model, state, x, times, solver, "default", *condition), maxlen=1)[0].to(x.dtype)


def straightness(model: Velocity, z: Float[Tensor, "B *shape"], steps: int = 8, *condition: Any) -> float:
    """The mean over steps and elements of ((x_k-1 - x_k) N - (x_start - x_end))^2 along Euler's steps: 0 for straight lines (and for N = 1)."""
    check_solving(z, steps, "euler", "default")
    start = (1 - EPS) * z.to(at_least_single(z.dtype))
    passed = [start, *states(model, start, z, grid(steps), "euler", "default", *condition)]
    chord = passed[0] - passed[-1]
    return float(torch.stack([((a - b) * steps - chord).square().mean() for a, b in pairwise(passed)]).mean())


def slerp(a: Float[Tensor, "B *shape"], b: Float[Tensor, "B *shape"], share: float) -> Float[Tensor, "B *shape"]:
    """Noises on the arc from a (share 0) to b (share 1), over the flattened image: what lies on a straight line has too small a norm."""
    flat_a, flat_b = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(flat_a, flat_b)[:, None].clamp(-1, 1)
    angle = cosine.acos()
    near = angle.sin() < 1e-4  # the arc is a line there
    of_a = torch.where(near, 1 - share, ((1 - share) * angle).sin() / angle.sin())
    of_b = torch.where(near, share, (share * angle).sin() / angle.sin())
    return (of_a * flat_a + of_b * flat_b).reshape(a.shape)


class FlowSchedule(NoiseSchedule):
    """Of a flow's own network: alpha = 1 - t, sigma = t; the network's time is t times `num_train_timesteps`."""

    t_min, t_max = EPS, 1 - EPS

    def __init__(self, num_train_timesteps: int) -> None:
        self.num_train_timesteps = num_train_timesteps

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-t)

    def log_sigma(self, t: Tensor) -> Tensor:
        return t.log()

    def inverse(self, lambda_: Tensor) -> Tensor:
        return torch.sigmoid(-lambda_)

    def timestep(self, t: Tensor) -> Tensor:
        return t * self.num_train_timesteps

    def time(self, timestep: Tensor | float) -> Tensor:
        return torch.as_tensor(timestep).to("cpu", torch.float64) / self.num_train_timesteps


OTHER_TIMES = (  # settings of FlowMatchEulerDiscreteScheduler that choose other times than t * T in equal steps
    "use_dynamic_shifting", "shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas",
    "stochastic_sampling",
)  # fmt: skip


class ReflowScheduler(FractionalTimeScheduler):
    """One call a step along a rectified flow (arXiv 2405.20320), for networks that say its velocity or, as `VelocityFromVP` wraps them, noise.

    `DDPMPipeline.from_pretrained` opens it where this module is imported (and looks for `SchedulerMixin` in it).

    A network with betas keeps its own states and times: x_vp = x_t / sqrt((1 - t)^2 + t^2), its steps 0 to T - 1. So a U-Net that was
    trained inside `VelocityFromVP` stays what it was to a pipeline.

    Args:
        update: "default" or "new", as in `sample`.
        prediction_type: "velocity" (z - x at x_t), or "epsilon", "sample", "v_prediction" with betas.
        num_train_timesteps: T; a velocity's network is given t * T, as by `FlowMatchEulerDiscreteScheduler`.
        beta_start, beta_end, beta_schedule, trained_betas: the noise schedule, as in `DDPMScheduler`; not used by "velocity".

    Examples:
        >>> scheduler = ReflowScheduler(num_train_timesteps=1)
        >>> scheduler.set_timesteps(2)
        >>> x = torch.ones(1, 1, 2, 2)
        >>> for t in scheduler.timesteps:
        ...     x = scheduler.step(0.5 * torch.ones_like(x), t, x).prev_sample
        >>> float(x.mean().round(decimals=3))
        0.5
    """

    @register_to_config
    def __init__(
        self,
        update: str = "default",
        prediction_type: str = "velocity",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
    ) -> None:
        check_choice(UPDATES, update=update)
        check_whole(num_train_timesteps=num_train_timesteps)
        check_choice(("velocity", *(each for each in PREDICTIONS if each != "score")), prediction_type=prediction_type)
        is_flow = prediction_type == "velocity"
        self.schedule = FlowSchedule(num_train_timesteps) if is_flow else NoiseSchedule.from_diffusers(self.config)
        # what a pipeline multiplies its noises by: the first state is (1 - 1e-5) z, which is z to a network with betas
        self.init_noise_sigma = 1 - EPS if is_flow else 1.0
        self.num_inference_steps: int | None = None
        self.take_times(torch.zeros(0, dtype=torch.float64))

    @classmethod
    def from_config(cls, config: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From another scheduler's config: one with betas, or flow matching's without a shift; keywords override what stands in it.

        Raises:
            ValueError: a config under which states or times mean something else (EDM, shifted or inverted flow matching, thresholding, ...).
        """
        if "base_shift" in config:  # FlowMatchEulerDiscreteScheduler's alone
            unlike = [name for name in OTHER_TIMES if config.get(name)] or ["shift"] * (config.get("shift", 1.0) != 1)
            if unlike:
                raise ValueError(
                    f"the config has {unlike[0]}={config[unlike[0]]}, which chooses other times; expected it without: leave it out"
                )
            kwargs = {"prediction_type": "velocity"} | kwargs
        elif config.get("prediction_type") != "velocity":
            check_config(config)
        return super(FractionalTimeScheduler, cls).from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """N steps from 1 - 1e-5 to 0; forgets a sample that was under way."""
        check_whole(num_inference_steps=num_inference_steps)
        self._grid, self.num_inference_steps = grid(num_inference_steps), num_inference_steps
        times = torch.tensor(self._grid[:-1], dtype=torch.float64)
        if isinstance(self.schedule, DiscreteSchedule):
            times = self.schedule.time(vp_timestep(self.schedule, times))
        self.take_times(times, device)

    def moved(self, index: int, model_output: Tensor, sample: Tensor) -> Float[Tensor, "B *shape"]:
        """The state at the end of a step. Begun in the middle, "new" takes x_t + (1 - t) v for the initial noise."""
        t, following = self._grid[index], self._grid[index + 1]
        x, output, there = sample.to(at_least_single(sample.dtype)), model_output.to(at_least_single(sample.dtype)), 1.0
        if isinstance(self.schedule, DiscreteSchedule):
            x, there = x * vp_scale(t), vp_scale(following)
            output = vp_velocity(self.schedule, output, x, torch.tensor(t, dtype=torch.float64), self.config["prediction_type"])
        if self._next is None:
            self._noise = x / (1 - EPS) if index == 0 else x + (1 - t) * output
        return (advance(x, output, t, following, self._noise, self.config["update"]) / there).to(sample.dtype)
