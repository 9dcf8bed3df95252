"""FZooS: each client descends along the gradient of its surrogate, corrected towards the mean of all clients' surrogates where it stands.

Odd exchanges of the engine optimise (x and the mean weights go out, points come back), even ones sum up (x goes out, weights come back).
Without correction every exchange optimises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from fewer.checks import check_choice, check_positive, check_whole, is_number
from fewer.federated._shared.algorithm import Message, Reply, ServerState, Vectors, mean_of
from fewer.federated._shared.black_box import BlackBox
from fewer.federated.fzoos.surrogate import GradientSurrogate, Kernel, RandomFeatures, as_points
from fewer.federated.fzoos.trajectory import Bounds, Trajectory, clipped


@dataclass(frozen=True)
class FZooSConfig:
    """FZooS's settings; the defaults are those of the released code, save where "ours" stands.

    Args:
        local_steps: T, steps a round.
        lr: of Adam, which begins anew each round.
        features: M, random features that clients share; M numbers each way a round.
        feature_scale: the length scale of the kernel that they stand for.
        kernel: of the clients' surrogates, "matern52" or "rbf".
        length_scale: of it; None: the most likely of 13 values, once a round (ours).
        noise: added to the kernel matrix's diagonal.
        feature_noise: added to the features' (ours; the code has none). Both are raised by tens up to 1e-3, with a warning, where that is needed.
        near: nearest points that a step's surrogate is fitted to, at least 2.
        near_round: nearest points that the features are fitted to.
        active: most uncertain points asked after each step but the last.
        candidates: points that they are chosen among.
        radius: half the side of the box that these, and the first points, are drawn from.
        active_round, candidates_round: the same when summing up, around the new global point.
        init: points asked before the first round.
        correction: False: local surrogates alone, one exchange a round.
        bounds: of each number of a point; None: none.
        history: queries that a client keeps; when full the oldest goes.
        feature_seed: of the shared features' draw.

    Raises:
        ValueError: a number is out of its range.
    """

    local_steps: int = 10
    lr: float = 0.01
    features: int = 10_000
    feature_scale: float = 1.0
    kernel: Kernel = "matern52"
    length_scale: float | None = None
    noise: float = 1e-6
    feature_noise: float = 1e-6
    near: int = 150
    near_round: int = 500
    active: int = 5
    candidates: int = 100
    radius: float = 0.01
    active_round: int = 50
    candidates_round: int = 200
    init: int = 10
    correction: bool = True
    bounds: Bounds = (0.0, 1.0)
    history: int = 2000
    feature_seed: int = 0

    def __post_init__(self) -> None:
        check_whole(local_steps=self.local_steps, features=self.features, near_round=self.near_round, history=self.history)
        check_whole(least=2, near=self.near)
        check_whole(least=0, active=self.active, candidates=self.candidates, active_round=self.active_round, init=self.init)
        check_whole(least=0, candidates_round=self.candidates_round, feature_seed=self.feature_seed)
        check_positive(lr=self.lr, radius=self.radius)
        check_positive(feature_scale=self.feature_scale, noise=self.noise, feature_noise=self.feature_noise)
        if self.length_scale is not None:
            check_positive(length_scale=self.length_scale)
        check_choice(get_args(Kernel), kernel=self.kernel)
        check_bounds(self.bounds)
        for few, many in (("active", "candidates"), ("active_round", "candidates_round"), ("near_round", "history"), ("near", "history")):
            if getattr(self, few) > getattr(self, many):
                raise ValueError(f"{few} is {getattr(self, few)} and {many} {getattr(self, many)}; expected no more of the former")


def check_bounds(bounds: Any) -> None:
    if bounds is not None and not (len(bounds) == 2 and all(map(is_number, bounds)) and bounds[0] < bounds[1]):
        raise ValueError(f"bounds is {bounds!r}; expected a pair (low, high) of finite numbers, low < high, or None")


@dataclass(frozen=True)
class FZooSAlgorithm:
    """FZooS as the house's three pure functions, for `simulate` and for Flower alike.

    A client keeps its queries, the point where its last round ended, its weights, and three marks: how many queries it has made, and the
    exchanges that its point and its weights are of. The server marks what exchange the mean weights are of. One that missed an exchange is not
    corrected by weights of another, and nobody is where no weights came to the server.

    Args:
        config: its settings.
        features: the shared features; drawn from the configuration's seed by default.
        start: `start(client)`: the client's first points [n, d], in place of drawn ones.

    Raises:
        ValueError: no point is asked beside the path (`init` and `active` are 0), so that no surrogate would ever have a slope.
    """

    config: FZooSConfig = field(default_factory=FZooSConfig)
    features: RandomFeatures | None = None
    start: Callable[[int], np.ndarray] | None = field(default=None, repr=False)

    keeps: tuple[str, ...] = field(default=("points", "values", "marks", "z", "weights"), init=False, repr=False)
    receives: tuple[str, ...] = field(default=("x", "weights"), init=False, repr=False)
    sends: tuple[str, ...] = field(default=("model", "weights"), init=False, repr=False)
    optional: tuple[str, ...] = field(default=("model", "weights"), init=False, repr=False)  # each exchange has one of them

    def __post_init__(self) -> None:
        if self.start is None and not self.config.init and not self.config.active:
            raise ValueError("init and active are 0; expected one above 0, or points by `start`: from one point no surrogate has a slope")

    def lengths(self, size: int) -> dict[str, int]:
        history, weights = self.config.history, len(self.features.b) if self.features else self.config.features
        return {"points": history * size, "values": history, "marks": 3, "weights": weights}

    @property
    def exchanges(self) -> int:
        """Of the engine, a round."""
        return 2 if self.config.correction else 1

    def sums_up(self, exchange: int) -> bool:
        return self.config.correction and exchange % 2 == 0

    @cached_property
    def _drawn(self) -> dict[int, RandomFeatures]:
        return {}

    def features_of(self, size: int) -> RandomFeatures:
        """The shared features for points of so many numbers."""
        if self.features is not None:
            return self.features
        if size not in self._drawn:
            config = self.config
            self._drawn[size] = RandomFeatures.draw(size, config.features, config.feature_scale, config.feature_seed)
        return self._drawn[size]

    def initial(self, x: Tensor, clients: int) -> ServerState:
        check_inside(x, self.config.bounds)
        return ServerState(x.double(), clients)

    def configure(self, server: ServerState, client_ids: Sequence[int], round: int) -> list[Message]:
        vectors = {"x": server.x}
        if not self.sums_up(round) and int(server.vectors.get("weights_of", -1)) == round - 1:
            vectors["weights"] = server.vectors["weights"]
        return [Message(client, round, vectors) for client in client_ids]

    def local(self, client_state: Vectors, message: Message, shard: BlackBox, rng: Any) -> tuple[Vectors, Reply]:
        """One exchange of a client."""
        asked, z_of, weights_of = client_state["marks"].tolist()
        known = Trajectory(client_state["points"], client_state["values"], int(asked), shard, self.config.bounds)
        x = message.vectors["x"]
        if not known.asked:
            self._ask_first(known, x, shard.client, rng)
        value = known.value(x)
        if self.sums_up(message.round):
            end = client_state["z"] if z_of == message.round - 1 else x
            weights, weights_of = self._sum_up(known, x, end, rng), message.round
            z, sent, drift = client_state["z"], {"weights": weights}, (end - x).norm()
        else:
            corrected = "weights" in message.vectors and weights_of == message.round - 1
            apart = weights_apart(message.vectors["weights"], client_state["weights"], shard.client) if corrected else None
            z, z_of, weights = self._descend(known, x, apart, rng), message.round, client_state["weights"]
            sent, drift = {"model": z}, (z - x).norm()
        marks = torch.tensor([known.asked, z_of, weights_of], dtype=torch.float64)
        kept = {"points": client_state["points"], "values": client_state["values"], "marks": marks, "z": z, "weights": weights}
        metrics = {"examples": 1, "drift": float(drift), "value": value, "queries": known.asked - int(asked)}
        return kept, Reply(message.client, sent, metrics)

    def _ask_first(self, known: Trajectory, x: Tensor, client: int, rng: Any) -> None:
        """The points that the first surrogate is fitted to: given, or drawn around x."""
        if self.start is None:
            known.ask_around(x, self.config.radius, self.config.init, rng)
        else:
            points = as_points(np.asarray(self.start(client)))
            if points.shape[1] != len(x):
                raise ValueError(f"start({client}) gives points of {points.shape[1]} numbers; expected {len(x)}, as x0 has")
            for point in points:
                check_inside(point, self.config.bounds, f"a point of start({client})")
                known.value(point)

    def _descend(self, known: Trajectory, x: Tensor, apart: Tensor | None, rng: Any) -> Float64[Tensor, "d"]:
        """T steps of Adam from x along grad mu_i + gamma_t grad(z; w_mean - w_i), each ending with a query and some active ones."""
        config, z, adam = self.config, x.clone(), Adam(self.config.lr)
        scale = self._surrogate(known, z, config.length_scale).length_scale
        for t in range(1, config.local_steps + 1):
            surrogate = self._surrogate(known, z, scale)
            g = surrogate.gradient(z)
            if apart is not None:
                g = g + self.features_of(len(x)).gradient(z, apart) / t  # gamma_t = 1/t
            z = clipped(z - adam.step(g), config.bounds)
            known.value(z)
            if t < config.local_steps:
                known.ask_uncertain(surrogate, z, config.radius, config.candidates, config.active, rng)
        return z

    def _sum_up(self, known: Trajectory, x: Tensor, end: Tensor, rng: Any) -> Float64[Tensor, "M"]:
        """Ask at the new x and around it, and say the trajectory in the shared features."""
        config = self.config
        if config.active_round:
            around = float((x - end).abs().mean()) / 2
            known.ask_uncertain(
                self._surrogate(known, x, config.length_scale), x, around, config.candidates_round, config.active_round, rng
            )
        with named(known.box.client):
            return self.features_of(len(x)).fit(*known.nearest(x, config.near_round), config.feature_noise)

    def _surrogate(self, known: Trajectory, z: Tensor, length_scale: float | None) -> GradientSurrogate:
        points, values = known.nearest(z, self.config.near)
        with named(known.box.client):
            return GradientSurrogate(points, values, self.config.kernel, length_scale, self.config.noise)

    def aggregate(self, server: ServerState, replies: Sequence[Reply]) -> ServerState:
        """x <- the mean of the points, or w <- the mean of the weights, by which exchange this is."""
        name = "weights" if self.sums_up(server.round + 1) else "model"
        if not (useful := [reply for reply in replies if name in reply.vectors]):
            raise ValueError(f"exchange {server.round + 1}: no reply has {name!r}; expected one at least: the same settings on both sides")
        mean = mean_of(useful, name)
        if name == "model":
            return replace(server, x=mean)
        return replace(server, vectors=server.vectors | {"weights": mean, "weights_of": torch.tensor(server.round + 1)})


@contextmanager
def named(client: int) -> Iterator[None]:
    """Say whose kernel matrix it is that cannot be factored."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(f"client {client}: {error}") from error


def weights_apart(mean: Tensor, own: Tensor, client: int) -> Float64[Tensor, "M"]:
    """w_mean - w_i: as the features' gradient is linear, that of the difference is the difference of both."""
    if mean.shape != own.shape:
        raise ValueError(
            f"client {client} was sent {len(mean)} weights and has {len(own)}; expected as many: the same features on every client and on the server"
        )
    return mean - own


def check_inside(x: Tensor, bounds: Bounds, name: str = "x0") -> None:
    if bounds is not None and not ((x >= bounds[0]) & (x <= bounds[1])).all():
        place = int(((x < bounds[0]) | (x > bounds[1])).nonzero()[0, 0])
        raise ValueError(f"{name} is {float(x[place]):g} at {place}; expected all within the bounds {bounds}, or bounds=None")


BETA_1, BETA_2, FLOOR = 0.9, 0.999, 1e-8


class Adam:
    """A step on one vector, begun anew each round, as in the released code: lr m^ / (sqrt(v^) + 1e-8), m^ and v^ the moments over 1 - beta^t."""

    def __init__(self, lr: float) -> None:
        self.lr, self.t, self.m, self.v = lr, 0, torch.zeros(()), torch.zeros(())

    def step(self, g: Tensor) -> Tensor:
        """What to subtract."""
        self.t += 1
        self.m = BETA_1 * self.m + (1 - BETA_1) * g
        self.v = BETA_2 * self.v + (1 - BETA_2) * g.square()
        return self.lr * (self.m / (1 - BETA_1**self.t)) / ((self.v / (1 - BETA_2**self.t)).sqrt() + FLOOR)
