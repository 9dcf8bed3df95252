"""The short way for scripts: minimise the mean of some black boxes in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewer.checks import check_whole
from fewer.federated._shared.black_box import BlackBoxes, Function, Point
from fewer.federated._shared.sampling import Independent
from fewer.federated._shared.simulate import Round, simulate
from fewer.federated.fzoos.algorithm import FZooSAlgorithm, FZooSConfig
from fewer.federated.fzoos.peers import FedZO, FedZOConfig


@dataclass
class Result:
    """What a search found.

    Attributes:
        x: the point [d].
        values: the mean of the functions at the points that all clients were asked at anyway: at each round's end, where clients sum up;
            else at each round's start. No call is made for it.
        queries: of all clients, in each round.
        numbers_down, numbers_up: sent to and by all clients, in each round.
        ends: whether `values` are those of rounds' ends.
    """

    x: np.ndarray
    ends: bool
    values: list[float] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    numbers_down: list[int] = field(default_factory=list)
    numbers_up: list[int] = field(default_factory=list)


def minimize(
    functions: Sequence[Function],
    x0: Any,
    rounds: int,
    config: FZooSConfig | FedZOConfig | None = None,
    seed: int = 0,
    tell: Callable[[int, Result], None] | None = None,
) -> Result:
    """The point that is best for all of some black boxes, found with few calls.

    Args:
        functions: one a client: a point [d] (float64) to a number. A call is a query.
        x0: where to start [d].
        rounds: how many; each is two exchanges, or one without correction.
        config: FZooS's settings, or those of FedZO.
        seed: of the points that are drawn.
        tell: `tell(round, result so far)` after each round.

    Raises:
        ValueError: no function, a point that is no vector or lies outside the bounds, or a function that gives no finite number (client and point
            are named).

    Examples:
        >>> config = FZooSConfig(local_steps=5, features=200, active_round=5, lr=0.05)
        >>> found = minimize([lambda x: (x[0] - 0.2) ** 2 + x[1], lambda x: (x[0] - 0.6) ** 2 + x[1]], [0.9, 0.9], rounds=5, config=config)
        >>> found.values[-1] < found.values[0]
        True
    """
    check_whole(rounds=rounds)
    chosen = config or FZooSConfig()
    algorithm = FZooSAlgorithm(chosen) if isinstance(chosen, FZooSConfig) else FedZO(chosen)
    point = Point(x0)
    result = Result(point.x0.numpy(), algorithm.exchanges == 2)
    queries = numbers_down = numbers_up = 0

    def after(line: Round) -> None:
        nonlocal queries, numbers_down, numbers_up
        queries += int(line.counts.get("queries", 0))
        numbers_down += line.numbers_down
        numbers_up += line.numbers_up
        if line.round % algorithm.exchanges:
            return
        result.values.append(line.metrics["value"])
        for name, value in {"queries": queries, "numbers_down": numbers_down, "numbers_up": numbers_up}.items():
            getattr(result, name).append(value)
        queries = numbers_down = numbers_up = 0
        result.x = line.evaluation
        if tell is not None:
            tell(line.round // algorithm.exchanges, result)

    simulate(
        algorithm,
        point,
        BlackBoxes(functions),
        rounds * algorithm.exchanges,
        sampler=Independent(1.0),
        seed=seed,
        evaluate=lambda x: x.numpy().copy(),
        tell=after,
    )
    return result
