"""UniPC in its B(h) form as linear combinations of the state and the buffered outputs, and one sampling by it with compensation.

From s = t_i to t, h = lambda_t - lambda_s, with nodes r_k = (lambda_{i-k} - lambda_s) / h and D_k = (m_{i-k} - m_i) / r_k (data prediction):

    x_t = (sigma_t / sigma_s) x - alpha_t (e^-h - 1) m_i - alpha_t B(h) sum_k rho_k D_k,   R rho = b,   R_jk = r_k^(j-1)

The corrector has the network's output at t as one more node, r = 1. All coefficients are made in float64, whatever the state's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from torch import Tensor

from fewer.diffusion.dc_solver.compensation import compensate, weighted_sum

SOLVER_TYPES = ("bh1", "bh2")


@dataclass(frozen=True)
class Level:
    """A noise level: x = alpha clean + sigma noise."""

    alpha: float
    sigma: float

    @property
    def lambda_(self) -> float:
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


def node_weights(nodes: Sequence[float], hh: float, b_of_h: float) -> list[float]:
    """rho of R rho = b, b_j = j! c_j / B, c_1 = expm1(hh) / hh - 1, c_(j+1) = c_j / hh - 1 / (j + 1)!; a single node has 1/2.

    >>> [round(weight, 4) for weight in node_weights([-1.0, 1.0], -0.5, math.expm1(-0.5))]
    [0.083, 0.4585]
    """
    if len(nodes) == 1:
        return [0.5]
    c, b = math.expm1(hh) / hh - 1, []
    for j in range(1, len(nodes) + 1):
        b.append(math.factorial(j) * c / b_of_h)
        c = c / hh - 1 / math.factorial(j + 1)
    return np.linalg.solve(np.vander(nodes, increasing=True).T, b).tolist()


def combination(
    start: Level, end: Level, before: Sequence[Level], *, solver_type: str = "bh2", predict_x0: bool = True, corrects: bool = False
) -> tuple[float, list[float]]:
    """The step from `start` to `end` as (weight of the state, weights of the outputs): newest first, then those of `before`.

    With `corrects` the output at `end` is a node too, and its weight comes last.
    """
    h = end.lambda_ - start.lambda_
    hh = -h if predict_x0 else h
    of_x = end.sigma / start.sigma if predict_x0 else end.alpha / start.alpha
    front = end.alpha if predict_x0 else end.sigma
    nodes = [(level.lambda_ - start.lambda_) / h for level in before] + [1.0] * corrects
    of_nodes = []
    if nodes:
        b_of_h = hh if solver_type == "bh1" else math.expm1(hh)
        of_nodes = [-front * b_of_h * rho / r for rho, r in zip(node_weights(nodes, hh, b_of_h), nodes, strict=True)]
    return of_x, [-front * math.expm1(hh) - sum(of_nodes), *of_nodes]


@dataclass(frozen=True)
class State:
    """A sampling after the output of step `index` was taken in; before the first, index is one less than where it begins.

    Attributes:
        x: the corrected state at that step's time.
        outputs: the buffered outputs, newest first; compensated ones stand in place of what they replace.
    """

    index: int
    x: Tensor | None = None
    outputs: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Solver:
    """A plan of M steps, one network call each.

    Attributes:
        levels: M + 1 noise levels, the end last.
        times: the M discrete times of the calls.
        order, solver_type, predict_x0, lower_order_final, disable_corrector: as in UniPC.
        dc_order: K; compensation reads off a polynomial through K + 1 outputs.
    """

    levels: tuple[Level, ...]
    times: tuple[float, ...]
    order: int = 2
    solver_type: str = "bh2"
    predict_x0: bool = True
    lower_order_final: bool = True
    use_corrector: bool = True
    disable_corrector: Collection[int] = ()
    dc_order: int = 2
    _made: dict[tuple[int, int, bool], tuple[float, list[float]]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def steps(self) -> int:
        return len(self.times)

    @property
    def first_compensated(self) -> int:
        """Before this step there are too few outputs."""
        return first_compensated(self.dc_order)

    def take(self, state: State, output: Float[Tensor, "*shape"], x: Float[Tensor, "*shape"]) -> State:
        """The network was called at `x`, where the last step ended: correct x, and buffer the output."""
        if self.corrects(state):
            of_x, of_outputs = self._combination(state, corrects=True)
            before = state.outputs[: len(of_outputs) - 1]
            assert state.x is not None
            x = weighted_sum([of_x, *of_outputs], [state.x, *before, output])
        room = max(self.order, self.dc_order + 1)
        return State(state.index + 1, x, (output, *state.outputs)[:room])

    def corrects(self, state: State) -> bool:
        """Whether the step from this state is corrected by the output at its end."""
        return self.use_corrector and bool(state.outputs) and state.index + 1 < self.steps and state.index not in self.disable_corrector

    def compensated(self, state: State, ratio: float | Tensor) -> State:
        """The newest output replaced, for the next predictor, corrector and compensation alike."""
        count = self.dc_order + 1
        if len(state.outputs) < count or (not isinstance(ratio, Tensor) and ratio == 1):
            return state
        times = [self.times[state.index - k] for k in range(count)]
        return replace(state, outputs=(compensate(state.outputs[:count], times, ratio), *state.outputs[1:]))

    def predict(self, state: State) -> Float[Tensor, "*shape"]:
        """The state at the end of this step, before any output there is known."""
        of_x, of_outputs = self._combination(state, corrects=False)
        assert state.x is not None
        return weighted_sum([of_x, *of_outputs], [state.x, *state.outputs[: len(of_outputs)]])

    def order_of(self, state: State) -> int:
        """Of the step from this state: no more than there are outputs, and than there are steps left."""
        left = self.steps - state.index if self.lower_order_final else self.order
        return min(self.order, len(state.outputs), left)

    def _combination(self, state: State, corrects: bool) -> tuple[float, list[float]]:
        key = (state.index, self.order_of(state), corrects)
        if key not in self._made:
            i, order, _ = key
            before = [self.levels[i - k] for k in range(1, order)]
            self._made[key] = combination(
                self.levels[i], self.levels[i + 1], before, solver_type=self.solver_type, predict_x0=self.predict_x0, corrects=corrects
            )
        return self._made[key]


def first_compensated(dc_order: int) -> int:
    return max(2, dc_order)


def descending(levels: Sequence[Level]) -> bool:
    """Whether each level has less noise than the one before."""
    return all(a.lambda_ < b.lambda_ for a, b in pairwise(levels))
