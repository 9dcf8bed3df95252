"""The space of solver schedules, and how evolution moves in it (arXiv 2312.07243, section 4): crossover, mutation, repair."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import torch

from fewer.checks import check_not_negative, check_share, check_whole, is_number
from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion.solver_search.decisions import AFS, CORRECTORS, MAX_ORDER, PREDICTIONS, SolverSchedule, StepDecision
from fewer.diffusion.solver_search.taylor import relaxation

Name = TypeVar("Name", str, int)
MIN_GAP = 1e-3  # of lambda: steps are no shorter
TRIES = 1000
DECISIONS = ("prediction", "order", "relaxation", "corrector")  # that are crossed apart; points go with the order, c with the relaxation


def chances(**given: float) -> Any:
    return field(default_factory=lambda: given.copy())


@dataclass(frozen=True)
class SearchSpace:
    """What a search may choose, and with which probabilities; by default the released ones for CIFAR-10.

    Attributes:
        noise_schedule: sampled from its t_max to its t_min; time is its t.
        nodes: the lambdas of the EMS, for v3 steps; without them there are none.
        has_mean: whether the mean of the data is known, for afs "average_x0".
        parents: how many of the best are parents.
        crossover, crossover_by_step: probability of a second parent, and of then choosing step by step.
        insert, delete: probabilities of a step more, and of one less.
        time_rate, decision_rate: probability of changing a step's time, and each of its decisions (ImageNet: 0.5 and 0.2).
        time_deviation: time *= 1 + N(0, this) (ImageNet: 0.06).
        end_times: the last time is drawn uniformly from this range; None: it stays. Schedules of other ends are only comparable where the
            reference is the same for all: that of the fixed end, denoised.
        orders, predictions, correctors, afs: probabilities.
        coefficient_deviation: c += N(0, this).
        uniform: all steps take the last one's decisions, as far as they can.
    """

    noise_schedule: NoiseSchedule
    nodes: tuple[float, ...] = ()
    has_mean: bool = False
    parents: int = 15
    crossover: float = 0.3
    crossover_by_step: float = 0.5
    insert: float = 0.2
    delete: float = 0.2
    time_rate: float = 0.3
    decision_rate: float = 0.3
    time_deviation: float = 0.08
    end_times: tuple[float, float] | None = None
    orders: Mapping[int, float] = field(default_factory=lambda: {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.1})
    predictions: Mapping[str, float] = chances(noise=0.3, data=0.3, v3=0.4)
    coefficient_deviation: float = 0.03
    correctors: Mapping[str, float] = chances(none=0.5, pseudo=0.5)
    afs: Mapping[str, float] = chances(none=0.3, zero_x0=0.3, average_x0=0.4)
    uniform: bool = False

    def __post_init__(self) -> None:
        for name in ("crossover", "crossover_by_step", "insert", "delete", "time_rate", "decision_rate"):
            check_share(**{name: getattr(self, name)})
        check_whole(parents=self.parents)
        check_not_negative(time_deviation=self.time_deviation, coefficient_deviation=self.coefficient_deviation)
        if self.insert + self.delete > 1:
            raise ValueError(f"insert and delete are {self.insert} and {self.delete}; expected at most 1 together")
        for name, known in (("orders", range(1, MAX_ORDER + 1)), ("predictions", PREDICTIONS), ("correctors", CORRECTORS), ("afs", AFS)):
            table = getattr(self, name)
            had = [table[each] for each in self.to_be_had(table)]
            if not set(table) <= set(known) or not all(is_number(each) and each >= 0 for each in table.values()) or not sum(had) > 0:
                raise ValueError(
                    f"{name} are {dict(table)}; expected probabilities of {', '.join(map(str, known))}, one at least above 0 "
                    "(v3 needs nodes, average_x0 has_mean)"
                )
        low, high = self.end_times or (self.noise_schedule.t_min,) * 2
        if not self.noise_schedule.t_min <= low <= high < self.noise_schedule.t_max:
            raise ValueError(
                f"end_times are {self.end_times}; expected a range of times from {self.noise_schedule.t_min:g}, where the noise schedule ends"
            )

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The first and the last lambda."""
        first, last = self.lambdas([self.noise_schedule.t_max, self.noise_schedule.t_min])
        return first, last

    def lambdas(self, times: Sequence[float]) -> list[float]:
        """Of times."""
        return self.noise_schedule.lambda_(torch.tensor(times, dtype=torch.float64)).tolist()

    def to_be_had(self, table: Mapping[Name, float]) -> list[Name]:
        """Without v3 where there are no nodes, without average_x0 where there is no mean."""
        return [name for name in table if (name != "v3" or self.nodes) and (name != "average_x0" or self.has_mean)]

    def pick(self, table: Mapping[Name, float], draw: random.Random) -> Name:
        """A name by its probability; those that are not to be had here have none."""
        names = self.to_be_had(table)
        return draw.choices(names, [table[name] for name in names])[0]

    def draw_step(self, draw: random.Random) -> StepDecision:
        """Decisions at random, before repair; `points` tells how many F^(1) has."""
        order = self.pick(self.orders, draw)
        c = draw.gauss(0, self.coefficient_deviation)
        return StepDecision(
            self.pick(self.predictions, draw), order, -1, newest(draw.choice((1, 2))), "linear", c, self.pick(self.correctors, draw)
        )

    def random(self, nfe: int, draw: random.Random, template: SolverSchedule | None = None) -> SolverSchedule:
        """Steps uniform in lambda with decisions at random; what is not searched is the template's, one of so many calls."""
        for _ in range(TRIES):
            afs = template.afs if template and not self.decision_rate else self.pick(self.afs, draw)
            count = nfe + (afs != "none")
            first, last = self.ends
            lambdas = [first, *sorted(draw.uniform(first, last) for _ in range(count - 1)), last]
            steps = [self.draw_step(draw) for _ in range(count)]
            if template and not self.time_rate:
                lambdas = list(template.lambdas)
            if template and not self.decision_rate:
                steps = list(template.steps)
            made = self.valid(lambdas, steps, afs)
            if made is not None and made.nfe == nfe:
                return made
        raise ValueError(f"no solver of {nfe} calls in {TRIES} tries; expected a space with room: fewer calls, or other probabilities")

    def child(self, parents: Sequence[SolverSchedule], nfe: int | None, draw: random.Random) -> SolverSchedule:
        """A child of some of these: perhaps crossed, then mutated, and repaired to be a solver of so many calls (None: of any number)."""
        for _ in range(TRIES):
            parent = draw.choice(parents)
            if draw.random() < self.crossover:
                parent = self.cross(parent, draw.choice(parents), draw)
            made = self.mutate(parent, nfe, draw)
            if made is not None and nfe in (None, made.nfe):
                return made
        raise ValueError(f"no child in {TRIES} tries that is a solver; expected a space with room: fewer calls, or other probabilities")

    def cross(self, a: SolverSchedule, b: SolverSchedule, draw: random.Random) -> SolverSchedule:
        """Each component as a whole from either parent, then perhaps step by step; may need repair."""
        frame = draw.choice((a, b))  # whose grid's length it has
        count = len(frame.steps)

        def sources(like: SolverSchedule | None = None) -> list[SolverSchedule]:
            whole = like or draw.choice((a, b))
            return [draw.choice((a, b)) for _ in range(count)] if draw.random() < self.crossover_by_step else [whole] * count

        lambdas = [each.lambdas[min(i, len(each.steps) - 1)] for i, each in enumerate(sources(frame))]
        of = {name: [each.steps[min(i, len(each.steps) - 1)] for i, each in enumerate(sources())] for name in DECISIONS}
        steps = [
            StepDecision(
                of["prediction"][i].prediction,
                of["order"][i].order,
                -1,
                fewest(of["order"][i]),
                of["relaxation"][i].relaxation,
                of["relaxation"][i].coefficient,
                of["corrector"][i].corrector,
            )
            for i in range(count)
        ]
        return SolverSchedule((*lambdas, frame.lambdas[-1]), tuple(steps), draw.choice((a, b)).afs)

    def mutate(self, parent: SolverSchedule, nfe: int | None, draw: random.Random) -> SolverSchedule | None:
        """A changed parent, or None where even repair makes no solver of it."""
        lambdas, steps = list(parent.lambdas), list(parent.steps)
        fate = draw.random()
        if fate < self.insert:
            self._insert(lambdas, steps, draw)
        elif fate < self.insert + self.delete:
            self._delete(lambdas, steps, draw)
        times = self.noise_schedule.inverse(torch.tensor(lambdas[1:-1], dtype=torch.float64)).tolist()
        moved = [t * (1 + draw.gauss(0, self.time_deviation)) if draw.random() < self.time_rate else t for t in times]
        if moved != times:
            low, high = self.noise_schedule.t_min, self.noise_schedule.t_max
            lambdas[1:-1] = self.lambdas([min(max(t, low), high) for t in moved])
        if self.end_times and draw.random() < self.time_rate:
            lambdas[-1] = self.lambdas([draw.uniform(*self.end_times)])[0]
        steps = [self.changed(step, t - s, draw) for step, s, t in zip(steps, lambdas, lambdas[1:], strict=False)]
        afs = self.pick(self.afs, draw) if draw.random() < self.decision_rate else parent.afs
        while nfe is not None:
            counted = (*steps[:-1], replace(steps[-1], corrector="none"))  # as repair will make it: it costs no call
            over = SolverSchedule(tuple(lambdas), counted, afs).nfe - nfe
            if not over:
                break
            if over > 0 and len(steps) == 1:
                return None
            (self._delete if over > 0 else self._insert)(lambdas, steps, draw)
        return self.valid(lambdas, steps, afs)

    def changed(self, step: StepDecision, h: float, draw: random.Random) -> StepDecision:
        """Each decision drawn anew with `decision_rate`; c is moved. Before repair."""
        new = self.draw_step(draw)

        def or_new(old: object, drawn: object) -> object:
            return drawn if draw.random() < self.decision_rate else old

        c = step.coefficient
        if step.relaxation not in ("none", "linear") and step.order == 2:  # the line through a preset's factor
            c = (relaxation(step.relaxation, -h if step.prediction == "data" else h, h) - 1) / h if h else 0.0
        kind, c = ("linear", c + new.coefficient) if draw.random() < self.decision_rate else (step.relaxation, step.coefficient)
        chosen = {
            "prediction": or_new(step.prediction, new.prediction),
            "order": or_new(step.order, new.order),
            "points": or_new(fewest(step), new.points),
            "corrector": or_new(step.corrector, new.corrector),
        }
        return replace(step, start=-1, relaxation=kind, coefficient=c, **chosen)  # pyright: ignore[reportArgumentType]

    def _insert(self, lambdas: list[float], steps: list[StepDecision], draw: random.Random) -> None:
        """One more step, its time uniform in the range of lambda: in that of EDM's t nine of ten would fall above sigma 8."""
        lambda_ = draw.uniform(*self.ends)
        at = max(1, sum(each < lambda_ for each in lambdas[:-1]))
        lambdas.insert(at, lambda_)
        steps.insert(at - 1, self.draw_step(draw))

    def _delete(self, lambdas: list[float], steps: list[StepDecision], draw: random.Random) -> None:
        """One step less, never the last."""
        if len(steps) > 1:
            at = draw.randrange(len(steps) - 1)
            del lambdas[at + 1], steps[at]

    def valid(self, lambdas: Sequence[float], steps: Sequence[StepDecision], afs: str) -> SolverSchedule | None:
        """Repaired: times sorted and kept apart (on the EMS' grid for v3 steps), orders capped, points made anew; None where it is no solver."""
        steps = [steps[-1]] * len(steps) if self.uniform else steps
        repaired = tuple(repair(step, i, i + 1 == len(steps)) for i, step in enumerate(steps))
        first, *inner, last = lambdas
        on_grid = any(step.prediction == "v3" for step in repaired)
        gap = self.nodes[1] - self.nodes[0] if on_grid else MIN_GAP
        inner = sorted(inner)
        for i in range(len(inner)):  # away from the start, then from the end
            inner[i] = max(inner[i], (inner[i - 1] if i else first) + gap)
        for i in reversed(range(len(inner))):
            inner[i] = min(inner[i], (inner[i + 1] if i + 1 < len(inner) else last) - gap)
        made = [first, *inner, last]
        if on_grid:
            made = [self.nodes[min(max(round((each - self.nodes[0]) / gap), 0), len(self.nodes) - 1)] for each in made]
        try:
            return SolverSchedule(tuple(made), repaired, afs).validate()
        except ValueError:  # steps without room, or points too near to one another for derivatives
            return None


def newest(count: int) -> tuple[tuple[int, ...]]:
    """So many points for F^(1), the newest before the start."""
    return (tuple(range(-2, -2 - count, -1)),)


def fewest(step: StepDecision) -> tuple[tuple[int, ...]]:
    """How many points F^(1) has, as the newest: what is left of a step's points when it is crossed or repaired."""
    return newest(max(1, len(step.point_sets[0]) if step.order > 1 or step.points else 1))


def repair(step: StepDecision, i: int, last: bool) -> StepDecision:
    """As step i can be: its order capped, from the newest point, its points made anew, no corrector at the end."""
    order = min(step.order, i + 1)
    few = len(fewest(step)[0])
    points = None if order < 3 or few >= order - 1 else (newest(few)[0], *((tuple(range(-2, -order - 1, -1)),) * (order - 2)))
    plain = order == 1 or (step.relaxation == "linear" and not step.coefficient) or (order != 2 and step.relaxation != "linear")
    return replace(
        step,
        order=order,
        start=-1,
        points=points,
        relaxation="none" if plain else step.relaxation,
        coefficient=0.0 if plain or not math.isfinite(step.coefficient) else step.coefficient,
        corrector="none" if last else step.corrector,
    )
