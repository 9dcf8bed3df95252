"""A solver as a list of decisions: where each step ends, what it expands, from where and how far, and whether it is corrected."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from fewer.checks import check_choice, check_whole, is_number, is_whole
from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion._shared.noise_schedule import VariancePreserving
from fewer.diffusion._shared.spacing import spaced_lambdas
from fewer.diffusion.solver_search.taylor import RELAXATIONS, derivative_system
from fewer.files import read_json, whole_file

PREDICTIONS = ("noise", "data", "v3")
CORRECTORS = ("none", "pseudo", "implicit")
AFS = ("none", "zero_x0", "average_x0")
MAX_ORDER = 4
GRIDS = ("logsnr", "edm", "time_uniform")
PRESETS: dict[str, dict[str, Any]] = {
    "ddim": {"prediction": "data", "order": 1},
    "dpm++2m": {"prediction": "data", "order": 2, "relaxation": "dpmsolver-2"},
    "unip-3": {"prediction": "data", "order": 3},
    "unipc-2": {"prediction": "data", "order": 2, "relaxation": "unipc-bh2", "corrector": "pseudo"},
    "v3-3": {"prediction": "v3", "order": 3, "corrector": "pseudo"},
    "dpm-solver-2": {"prediction": "noise", "order": 2, "relaxation": "dpmsolver-2"},  # singlestep
}
Points = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class StepDecision:
    """How one step is taken.

    Attributes:
        prediction: what is expanded: "noise", "data", or "v3" (what is left of the noise by the statistics of DPM-Solver-v3).
        order: 1 to 4, at most the number of points so far.
        start: the point that the step starts from: -1 the newest (multistep), -p an older one (singlestep of order p).
        points: for F^(1), F^(2), .. the points it is estimated from, as -1, -2, ..; None: the `order - 1` newest besides the start.
            F^(1) may have fewer.
        relaxation: a name of `RELAXATIONS`, of the factor on F^(1).
        coefficient: c of "linear": 1 + c h.
        corrector: at the step's end: "none", "pseudo" (no call), or "implicit" (one call more).
    """

    prediction: str
    order: int
    start: int = -1
    points: Points | None = None
    relaxation: str = "none"
    coefficient: float = 0.0
    corrector: str = "none"

    @property
    def point_sets(self) -> Points:
        """The points of each derivative."""
        if self.points is not None:
            return self.points
        newest = [p for p in range(-1, -self.order - 1, -1) if p != self.start][: self.order - 1]
        return (tuple(newest),) * (self.order - 1)

    def check(self, i: int) -> None:
        """ValueError, naming step and field, where it cannot be step i (from 0), which has i + 1 points."""
        try:
            check_choice(PREDICTIONS, prediction=self.prediction)
            check_choice(RELAXATIONS, relaxation=self.relaxation)
            check_choice(CORRECTORS, corrector=self.corrector)
            if not is_whole(self.order) or not 1 <= self.order <= min(MAX_ORDER, i + 1):
                raise ValueError(f"order is {self.order!r} with {i + 1} points so far; expected 1 to {min(MAX_ORDER, i + 1)}: lower it")
            if not is_whole(self.start) or not -i - 1 <= self.start <= -1:
                raise ValueError(f"start is {self.start!r}; expected -1 to {-i - 1}: a point of the history")
            if not is_number(self.coefficient):
                raise ValueError(f"coefficient is {self.coefficient!r}; expected a finite number")
            self._check_points(i)
        except (ValueError, TypeError) as error:
            raise ValueError(f"step {i}: {error}") from None

    def _check_points(self, i: int) -> None:
        sets = self.point_sets
        if len(sets) != self.order - 1:
            raise ValueError(f"points has {len(sets)} sets for order {self.order}; expected one a derivative, {self.order - 1}")
        for k, points in enumerate(sets, start=1):
            if any(not is_whole(p) or not -i - 1 <= p <= -1 or p == self.start for p in points) or len(set(points)) != len(points):
                raise ValueError(
                    f"points of F^({k}) are {list(points)} from start {self.start}; expected others than the start, each once, of -1 to {-i - 1}"
                )
            if len(points) < (1 if k == 1 else self.order - 1):
                raise ValueError(f"points of F^({k}) are {list(points)}; expected {self.order - 1}: only F^(1) may have fewer")


@dataclass(frozen=True)
class SolverSchedule:
    """A solver for one number of network calls.

    Attributes:
        lambdas: log(alpha / sigma) at the start and at each step's end, rising; steps + 1 numbers.
        steps: how each step is taken.
        afs: what stands for the first call: "none" (a call), "zero_x0" (the clean image is taken as 0), "average_x0" (as the data's mean).
        meta: plain data that are kept with it.

    Examples:
        >>> schedule = SolverSchedule.preset("unipc-2", 5, NoiseSchedule.edm(0.02, 80.0))
        >>> schedule.nfe, SolverSchedule.from_json(schedule.to_json()) == schedule
        (5, True)
    """

    lambdas: tuple[float, ...]
    steps: tuple[StepDecision, ...]
    afs: str = "none"
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.lambdas, str) or not isinstance(self.lambdas, Iterable) or not isinstance(self.steps, Iterable):
            raise ValueError(f"lambdas and steps are {self.lambdas!r} and {self.steps!r}; expected numbers and decisions, in tuples")
        if type(self.lambdas) is not tuple or any(type(each) is not float for each in self.lambdas):
            object.__setattr__(self, "lambdas", tuple(float(each) if is_number(each) else each for each in self.lambdas))
        object.__setattr__(self, "steps", tuple(self.steps))

    @property
    def nfe(self) -> int:
        """Network calls of a sample: a step has one, without the first where it is saved, and one more for each implicit corrector."""
        return len(self.steps) - (self.afs != "none") + sum(step.corrector == "implicit" for step in self.steps)

    @property
    def uses_ems(self) -> bool:
        return any(step.prediction == "v3" for step in self.steps)

    def validate(self) -> SolverSchedule:
        """Itself; ValueError naming step and field where it is no solver."""
        _ = self._checked
        return self

    @cached_property
    def _checked(self) -> bool:
        """True; a search validates a schedule when it is made, and need not when it is scored."""
        check_choice(AFS, afs=self.afs)
        if len(self.lambdas) != len(self.steps) + 1 or not self.steps:
            raise ValueError(
                f"lambdas has {len(self.lambdas)} numbers for {len(self.steps)} steps; expected one more than steps, of which one at least"
            )
        for i, (s, t) in enumerate(zip(self.lambdas, self.lambdas[1:], strict=False)):
            if not is_number(s) or not is_number(t) or not s < t:
                raise ValueError(f"step {i}: lambdas go from {s} to {t}; expected rising finite numbers: sort them, each once")
        for i, step in enumerate(self.steps):
            step.check(i)
            for name, sets in zip(("points", "corrector"), self.active(i), strict=True):
                for points in sets if name == "points" or step.corrector != "none" else ():
                    try:
                        derivative_system(tuple(self.lambdas[p] - self.lambdas[i + 1 + step.start] for p in points))
                    except ValueError as error:
                        raise ValueError(f"step {i}: {name}: {error}") from None
        if self.steps[-1].corrector != "none":
            raise ValueError(
                f"step {len(self.steps) - 1}: corrector is {self.steps[-1].corrector!r}; expected 'none': it would cost a call"
            )
        if self.nfe < 1:
            raise ValueError(f"afs is {self.afs!r} with one step; expected one network call at least: take two steps")
        return True

    def active(self, i: int) -> tuple[list[list[int]], list[list[int]]]:
        """The points of step i's derivatives, counted from the first (0), for the predictor and for the corrector at its end.

        The corrector has the new point besides, and one derivative more: from the points of the one below it (after order 1: the new alone).
        """
        predictor = [[i + 1 + p for p in points] for points in self.steps[i].point_sets]
        corrector = [[i + 1, *points] for points in predictor]
        return predictor, [*corrector, corrector[-1] if corrector else [i + 1]]

    def from_step(self, first: int) -> SolverSchedule:
        """What is left from step `first` on, its history empty: orders are capped, steps start from the newest point."""
        if not first:
            return self
        steps = [
            replace(step, order=min(step.order, i + 1), start=-1, points=None if step.order > i + 1 or step.start != -1 else step.points)
            for i, step in enumerate(self.steps[first:])
        ]
        kept = [s if s.points is None or min(map(min, s.points)) >= -i - 1 else replace(s, points=None) for i, s in enumerate(steps)]
        return SolverSchedule(self.lambdas[first:], tuple(kept), "none", self.meta)

    def to_json(self) -> str:
        """One line of JSON; ValueError where `meta` holds what is none."""
        try:
            return json.dumps(asdict(self) | {"meta": dict(self.meta)})
        except (TypeError, ValueError) as error:
            raise ValueError(f"no JSON can be made of this schedule ({error}); expected plain numbers, words, lists and objects") from None

    @staticmethod
    def from_json(text: str) -> SolverSchedule:
        """What `to_json` wrote; ValueError on anything else."""
        try:
            return SolverSchedule.from_dict(json.loads(text))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"no JSON ({' '.join(str(error).split())}); expected what to_json wrote: write it again") from None

    @staticmethod
    def from_dict(read: Any) -> SolverSchedule:
        """Of plain data, as they stand in JSON; ValueError on unknown or missing names, and on what is no solver."""
        _check_names(read, SolverSchedule, "a schedule")
        if (
            not isinstance(read["lambdas"], Sequence)
            or not isinstance(read["steps"], Sequence)
            or not isinstance(read.get("meta", {}), Mapping)
        ):
            raise ValueError(
                "lambdas, steps or meta of a schedule are something else; expected two lists, and an object of names and values"
            )
        steps = []
        for i, step in enumerate(read["steps"]):
            _check_names(step, StepDecision, f"step {i}")
            try:
                points = step.get("points")
                steps.append(StepDecision(**{**step, "points": None if points is None else tuple(tuple(each) for each in points)}))
            except TypeError:
                raise ValueError(f"step {i}: points is {step['points']!r}; expected a list of lists of whole numbers") from None
        return SolverSchedule(tuple(read["lambdas"]), tuple(steps), read.get("afs", "none"), dict(read.get("meta", {}))).validate()

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write it into a JSON file, whole or not at all."""
        with whole_file(path, overwrite) as part:
            part.write_text(self.to_json() + "\n", encoding="utf8")

    @staticmethod
    def load(path: str | Path) -> SolverSchedule:
        """From a JSON file that `save` wrote; ValueError naming the file where it is none."""
        try:
            return SolverSchedule.from_dict(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path} holds no solver schedule: {error}") from None

    def table(self) -> str:
        """A row a step."""
        rows = [
            f"{'step':>4} {'sigma/alpha':>22} {'expands':>7} {'order':>5} {'start':>5} {'F^(1) from':>10} {'relaxation':>14}  corrector"
        ]
        for i, step in enumerate(self.steps):
            sigmas = " to ".join(f"{math.exp(-each):.4g}" for each in self.lambdas[i : i + 2])
            relaxed = f"1{step.coefficient:+.3f}h" if step.relaxation == "linear" else step.relaxation
            points = ",".join(map(str, step.point_sets[0])) if step.order > 1 else "-"
            made = step.prediction if i or self.afs == "none" else self.afs
            rows.append(f"{i:>4} {sigmas:>22} {made:>7} {step.order:>5} {step.start:>5} {points:>10} {relaxed:>14}  {step.corrector}")
        return "\n".join(rows)

    @staticmethod
    def preset(name: str, nfe: int, schedule: NoiseSchedule, spacing: str = "logsnr", lower_order_final: bool = True) -> SolverSchedule:
        """A named solver as a schedule.

        Args:
            name: of `PRESETS`: "ddim", "dpm++2m", "unip-3" (exact; diffusers' 3M substitutes), "unipc-2" (its first corrector exact),
                "v3-3" (needs EMS), "dpm-solver-2" (singlestep).
            nfe: network calls.
            schedule: sampled from its t_max to its t_min.
            spacing: "logsnr", "edm" (Karras), or "time_uniform" (of the schedule's t; for EDM's, of the linear VP schedule's).
            lower_order_final: the last steps of a multistep solver have orders .., 2, 1.
        """
        check_choice(PRESETS, name=name)
        check_whole(nfe=nfe)
        decision = StepDecision(**PRESETS[name])
        if name == "dpm-solver-2":
            return _singlestep(decision, nfe, schedule, spacing)
        orders = [min(decision.order, i + 1, nfe - i if lower_order_final else nfe) for i in range(nfe)]
        steps = [replace(decision, order=order, relaxation=decision.relaxation if order == 2 else "none") for order in orders]
        steps[-1] = replace(steps[-1], corrector="none")
        return SolverSchedule(tuple(grid(schedule, spacing, nfe).tolist()), tuple(steps), meta={"preset": name, "spacing": spacing})


def _singlestep(decision: StepDecision, nfe: int, schedule: NoiseSchedule, spacing: str) -> SolverSchedule:
    """Pairs of calls: DDIM to the middle in lambda, then all the way from the pair's start; an odd call is a step of order 1."""
    ends = grid(schedule, spacing, (nfe + 1) // 2).tolist()
    lambdas, steps, half = ends[:1], [], replace(decision, order=1, relaxation="none")
    for i, (s, t) in enumerate(pairwise(ends)):
        if 2 * i + 2 <= nfe:
            lambdas.append((s + t) / 2)
            steps += [half, replace(decision, start=-2, points=((-1,),))]
        else:
            steps.append(half)
        lambdas.append(t)
    return SolverSchedule(tuple(lambdas), tuple(steps), meta={"preset": "dpm-solver-2", "spacing": spacing})


def grid(schedule: NoiseSchedule, spacing: str, steps: int) -> Float64[Tensor, "steps_plus_1"]:
    """lambda over a schedule's whole range."""
    check_choice(GRIDS, spacing=spacing)
    if spacing != "time_uniform" or isinstance(schedule, VariancePreserving):
        return spaced_lambdas(schedule, spacing, steps, schedule.t_min)
    linear, ends = NoiseSchedule.linear(), schedule.lambda_(torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
    first, last = linear.inverse(ends).tolist()
    return torch.cat([ends[:1], linear.lambda_(torch.linspace(first, last, steps + 1, dtype=torch.float64))[1:-1], ends[1:]])


def _check_names(read: Any, kind: type, what: str) -> None:
    """ValueError where it is no object of the dataclass's fields."""
    if not isinstance(read, Mapping):
        raise ValueError(f"{what} is {type(read).__name__}; expected an object of names and values")
    known = [each.name for each in fields(kind)]
    unknown, missing = sorted(set(read) - set(known)), [name for name in known[:2] if name not in read]
    if unknown or missing:
        said = f"has {', '.join(map(repr, unknown))}" if unknown else f"lacks {', '.join(missing)}"
        raise ValueError(f"{what} {said}; expected {', '.join(known)}")
