"""The multistep predictor-corrector (algorithm of section 3.3), one network call a step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fewer.checks import check_choice, check_whole
from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion._shared.prediction import Epsilon, at_least_single
from fewer.diffusion._shared.spacing import SPACINGS, spaced_lambdas
from fewer.diffusion.dpm_solver_v3.ems import EMS
from fewer.diffusion.dpm_solver_v3.local_update import Combination, Integrals, combination

CORRECTORS = ("none", "full", "half")
MAX_ORDER = 4
TOO_ROUGH = 0.1  # of the noise at a step's end: what rounding may move it by (not in the paper; half precision did harm from 0.15 on)

Kind = Literal["edm", "scoresde", "latent"]


@dataclass(frozen=True)
class SolverConfig:
    """How the solver steps.

    Attributes:
        solver_order: 1 to 4, of the predictor.
        pseudo_predictor: the pseudo order, for few calls.
        corrector: "none", "full", or "half": only in the noisier half of the times (t > t_max / 2, as the released code has it; the
            paper's text says the other half).
        pseudo_corrector: the corrector has the predictor's order + 1, as a pseudo order.
        lower_order_final: the last steps have orders .., 2, 1.
        spacing: "logsnr" (equal steps of lambda), "time_uniform", "time_quadratic" or "edm".
        end_time: where sampling ends, at the schedule's own end at the earliest; None: there.
    """

    solver_order: int = 3
    pseudo_predictor: bool = False
    corrector: str = "none"
    pseudo_corrector: bool = False
    lower_order_final: bool = True
    spacing: str = "logsnr"
    end_time: float | None = None

    def __post_init__(self) -> None:
        if self.solver_order not in range(1, MAX_ORDER + 1):
            raise ValueError(f"solver_order is {self.solver_order}; expected 1 to {MAX_ORDER}")
        check_choice(CORRECTORS, corrector=self.corrector)
        check_choice(SPACINGS, spacing=self.spacing)


def preset(nfe: int, guided: bool = False, kind: Kind = "edm", large_scale: bool = False) -> dict[str, Any]:
    """The settings that the released scripts use for a number of network calls; keywords of `sample` and of the scheduler.

    Args:
        nfe: network calls.
        guided: with classifier or classifier-free guidance.
        kind: unguided, an "edm" model, a "scoresde" one (VP), or a "latent" one (LSUN).
        large_scale: a large guidance scale.

    Examples:
        >>> preset(6, kind="scoresde")["corrector"], preset(10)["corrector"]
        ('full', 'none')
    """
    check_whole(nfe=nfe)
    end = {} if kind == "edm" and not guided else {"end_time": 1e-3 if nfe <= 10 else 1e-4}
    if guided:
        return {"solver_order": 2, "corrector": "half" if large_scale else "full", "pseudo_corrector": True} | end
    if kind == "latent":
        return {"solver_order": 3, "corrector": "full", "pseudo_corrector": True} | end
    corrects = nfe <= 6 if kind == "edm" else nfe <= 8 or nfe > 10
    few = nfe <= 5
    return {
        "solver_order": 3,
        "pseudo_predictor": few,
        "corrector": "full" if corrects else "none",
        "lower_order_final": not (few and kind == "scoresde"),
    } | end


@dataclass(frozen=True)
class Plan:
    """All that is known before the first call, each for steps m = 0 .. M - 1 (and the end).

    Attributes:
        nodes: grid points [M + 1].
        times: the schedule's t there, float64 [M + 1].
        alphas, sigmas: there, float64 [M + 1].
        f_of_eps, f_of_x: f = f_of_eps eps + f_of_x x at each step.
        predictors: the step from node m to m + 1.
        correctors: at node m, of x there; None where it is left out.
    """

    nodes: tuple[int, ...]
    times: Float64[Tensor, "M_plus_1"]
    alphas: Float64[Tensor, "M_plus_1"]
    sigmas: Float64[Tensor, "M_plus_1"]
    f_of_eps: tuple[Tensor, ...]
    f_of_x: tuple[Tensor, ...]
    predictors: tuple[Combination, ...]
    correctors: tuple[Combination | None, ...]

    def to(self, like: Tensor) -> Plan:
        """The coefficients in the type and on the device of `like`; the times stay in float64."""
        return replace(
            self,
            f_of_eps=tuple(each.to(like) for each in self.f_of_eps),
            f_of_x=tuple(each.to(like) for each in self.f_of_x),
            predictors=tuple(each.to(like) for each in self.predictors),
            correctors=tuple(each.to(like) if each else None for each in self.correctors),
        )

    def roughness(self, output: torch.dtype, per_output: Sequence[float]) -> float:
        """How far the rounding of a network's output moves a step, at most, as a share of the noise at its end.

        Args:
            output: the type of the output.
            per_output: what one of the output adds to the noise, for each step (1 where it is the noise itself).
        """
        unit = torch.finfo(output).eps / 12**0.5  # deviation of the rounding of a number between 1 and 2
        moved = [
            sum(float((of_f * self.f_of_eps[m - j]).square().mean()) * per_output[m - j] ** 2 for j, of_f in enumerate(step.of_f)) ** 0.5
            for m, step in enumerate(self.predictors)
        ]
        return unit * max(each / float(sigma) for each, sigma in zip(moved, self.sigmas[1:], strict=True))

    def warn_of_rounding(self, output: torch.dtype, per_output: Sequence[float] | None = None) -> None:
        """A warning where the output's type costs more than the solver gains."""
        moved = self.roughness(output, per_output or [1.0] * len(self.predictors))
        if moved > TOO_ROUGH:
            warnings.warn(
                f"the network answers in {str(output).removeprefix('torch.')}, whose rounding alone moves a step by {moved:.2g} times the "
                f"noise at its end, which costs more than the solver gains; expected at most {TOO_ROUGH}: let the network answer in float32, "
                "take more steps or solver_order=1",
                stacklevel=3,
            )


def orders(steps: int, order: int, lower_order_final: bool) -> list[int]:
    """The predictor's order in each step: history builds up, and runs out at the end where that is wanted."""
    return [min(order, m, steps + 1 - m if lower_order_final else order) for m in range(1, steps + 1)]


def choose_nodes(ems: EMS, schedule: NoiseSchedule, steps: int, config: SolverConfig) -> list[int]:
    """The grid points nearest to the wanted spacing; ValueError where the EMS do not cover it or are too coarse for it."""
    check_whole(steps=steps)
    if steps > ems.num_timesteps:
        raise ValueError(f"{steps} steps on EMS of num_timesteps = {ems.num_timesteps}; expected 1 to that: raise num_timesteps")
    wanted = spaced_lambdas(schedule, config.spacing, steps, max(config.end_time or schedule.t_min, schedule.t_min))
    low, high = float(ems.lambdas[0]), float(ems.lambdas[-1])
    gap = (high - low) / ems.num_timesteps
    if abs(float(wanted[0]) - low) > gap / 2 or float(wanted[-1]) > high + gap / 2:
        given, known = ([f"{float(torch.exp(-each[i])):.4g}" for i in (0, -1)] for each in (wanted, ems.lambdas))
        raise ValueError(
            f"the schedule runs from sigma / alpha = {given[0]} to {given[1]}, the EMS from {known[0]} to {known[1]}; "
            "use the schedule that they were estimated on, or estimate others"
        )
    nodes = [int(node) for node in ((wanted - low) / gap).round().clamp(0, ems.num_timesteps)]
    if len(set(nodes)) != len(nodes):
        raise ValueError(f"two of {steps} steps fall on one of the EMS' grid points; expected distinct ones: raise num_timesteps")
    return nodes


def make_plan(
    ems: EMS, schedule: NoiseSchedule, steps: int, config: SolverConfig, integrals: Integrals | None = None, first: int = 0
) -> Plan:
    """Everything that does not depend on the network, ready for `steps` calls; the first `first` of them are left out."""
    nodes = choose_nodes(ems, schedule, steps, config)[first:]
    steps -= first
    times = schedule.inverse(ems.lambdas[nodes])
    alphas, sigmas = schedule.alpha(times), schedule.sigma(times)
    integrals = integrals or Integrals(ems)
    predicted = orders(steps, config.solver_order, config.lower_order_final)

    def made(m: int, others: list[int], pseudo: bool) -> Combination:
        """From node m to m + 1."""
        return combination(integrals, (float(alphas[m]), float(alphas[m + 1])), [nodes[i] for i in (m, *others)], nodes[m + 1], pseudo)

    predictors: list[Combination] = []
    correctors: list[Combination | None] = [None]
    for m, order in enumerate(predicted):
        predictors.append(made(m, [m - i for i in range(1, order)], config.pseudo_predictor))
        corrected = order + config.pseudo_corrector
        wanted = config.corrector == "full" or (config.corrector == "half" and float(times[m + 1]) > schedule.t_max / 2)
        if wanted and corrected > 1 and m + 1 < steps:
            correctors.append(made(m, [m + 1] + [m - i for i in range(1, corrected - 1)], config.pseudo_corrector))
        elif m + 1 < steps:
            correctors.append(None)
        integrals.forget_slices()
    l = integrals.l  # noqa: E741
    return Plan(
        tuple(nodes),
        times,
        alphas,
        sigmas,
        tuple((sigmas[m] / alphas[m]) for m in range(steps)),
        tuple(-l[nodes[m]] / alphas[m] for m in range(steps)),
        tuple(predictors),
        tuple(correctors),
    )


class Multistep:
    """The solver's memory between two network calls.

    It keeps f, which does not depend on s as g does, so g is made anew in every step. A corrector that moves x_t to x_c and the noise
    with it, eps_c = eps + l (x_c - x_t) / sigma, leaves f and so g as they are: no new call, and nothing to recompute.

    States and noises are float32 at least. Where the network saw a rounded state, f is taken there, as its noise belongs to that state:
    their errors cancel, while sigma / alpha times one of them would not be small. What somebody changed in a state between two steps (a
    region that is painted over) is not corrected: it lies on another trajectory than the last step.

    Attributes:
        f: of the last steps, newest first.
        x: the last state, corrected where a corrector ran.
        predicted: the next state, before anybody rounds or changes it.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.m = 0
        self.f: list[Tensor] = []
        self.x: Tensor | None = None
        self.predicted: Tensor | None = None

    def step(self, eps: Float[Tensor, "B *shape"], seen: Float[Tensor, "B *shape"]) -> Float[Tensor, "B *shape"]:
        """From the noise that the network sees in a state at node m, the state at node m + 1."""
        plan, m = self.plan, self.m
        x = seen.to(plan.f_of_eps[m].dtype)
        f = torch.addcmul(plan.f_of_eps[m] * eps.to(x.dtype), plan.f_of_x[m], x)
        change: Tensor | None = None
        if self.predicted is not None and seen is not self.predicted:
            change = (seen - self.predicted.to(seen.dtype)).to(x.dtype)  # 0 where it was rounded alone
            x = self.predicted + change
        corrector, predictor = plan.correctors[m], plan.predictors[m]
        if corrector is not None and self.x is not None:
            points = [self.f[0], f, *self.f[1:]]  # s, then the target, then older ones
            corrected = corrector(self.x, points[: len(corrector.of_f)])
            x = corrected if change is None else torch.where(change == 0, corrected, x)
        self.f = [f, *self.f][:MAX_ORDER]
        self.x, self.m = x, m + 1
        self.predicted = predictor(x, self.f[: len(predictor.of_f)])
        return self.predicted


@torch.no_grad()
def sample(
    eps: Epsilon, x: Float[Tensor, "B *shape"], schedule: NoiseSchedule, ems: EMS, steps: int, **options: Any
) -> Float[Tensor, "B *shape"]:
    """From noise to data with `steps` network calls.

    Args:
        eps: eps(x, t), the noise in x [B, *shape] at the schedule's time t, a float64 scalar tensor (`as_epsilon` makes one of a network).
        x: the noise at the schedule's t_max, [B, *shape], in the network's type; in half precision the states between are float32.
        ems: estimated for this network on this schedule.
        options: of `SolverConfig`; `preset` gives the paper's.

    Returns:
        x at the schedule's end (or at `end_time`), in the type of x.

    Raises:
        ValueError: EMS of another shape or another range, or too coarse for so many steps; unknown options.

    Warns:
        UserWarning: the network answers in half precision, and its rounding costs more than the solver gains.

    Examples:
        >>> schedule = NoiseSchedule.edm(0.02, 20.0)
        >>> ems = EMS.data_prediction(torch.linspace(*[float(schedule.lambda_(t)) for t in (20.0, 0.02)], 241, dtype=torch.float64))
        >>> points = sample(lambda x, t: x / (t**2 + 1).sqrt(), 20 * torch.ones(1, 2).double(), schedule, ems, 20, solver_order=2)
        >>> points.shape
        torch.Size([1, 2])
    """
    ems.check_shape(x.shape[1:])
    plan = make_plan(ems, schedule, steps, SolverConfig(**options)).to(x.to(at_least_single(x.dtype)))
    solver, state = Multistep(plan), x
    for t in plan.times[:-1]:
        noise = eps(state.to(x.dtype), t)
        if solver.m == 0 and noise.dtype in (torch.float16, torch.bfloat16):
            plan.warn_of_rounding(noise.dtype)
        state = solver.step(noise, state.to(x.dtype))
    return state.to(x.dtype)
