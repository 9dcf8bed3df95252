"""A whole search: equal to one written out in NumPy, to the Flower apps, to itself after a resume; every call counted."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from direct_grid import DirectGrid
from flwr.app import Array, ArrayRecord, Error
from flwr.app import Message as Reply
from searches import BOXES, SMALL, START, box_of, changed, counted, exchange_of, on_two_nodes, quadratic, run

from fewer import meters
from fewer.federated import (
    FedZOConfig,
    FZooS,
    FZooSAlgorithm,
    FZooSConfig,
    Message,
    RandomFeatures,
    fzoos_client_app,
    minimize,
    simulate,
)
from fewer.federated._shared.black_box import BlackBoxes, Point
from fewer.federated.fzoos import arrays_of
from fewer.federated.fzoos.trajectory import Trajectory


class ByHand:
    """FZooS of two clients written out: no active queries, given first points and features."""

    def __init__(self, starts, w, b, correction):
        self.w, self.b, self.correction = w, b, correction
        self.asked = [{tuple(p): BOXES[i](p) for p in points} for i, points in enumerate(starts)]

    def ask(self, i, z):
        self.asked[i].setdefault(tuple(z), BOXES[i](z))

    def fitted(self, i, z, scale=None):
        x, y = np.array(list(self.asked[i])), np.array(list(self.asked[i].values()))
        order = np.argsort(((x - z) ** 2).sum(1), kind="stable")[:20]
        x, y = x[order], y[order]
        scaled, range_ = (y - y.mean()) / (y.max() - y.min() + 1e-20), y.max() - y.min()
        distances = np.sqrt(((x[:, None] - x) ** 2).sum(-1))

        def factor(scale):
            r = np.sqrt(5) * distances / scale
            return np.linalg.cholesky((1 + r + r**2 / 3) * np.exp(-r) + 1e-6 * np.eye(len(x)))

        def solve(chol):
            return np.linalg.solve(chol.T, np.linalg.solve(chol, scaled))

        def likelihood(scale):
            chol = factor(scale)
            return -len(x) / 2 * np.log(scaled @ solve(chol) / len(x)) - np.log(np.diag(chol)).sum()

        scale = scale or max(np.geomspace(0.1, 100, 13), key=likelihood)
        return x, range_, solve(factor(scale)), scale

    def gradient(self, i, z, scale):
        x, range_, a, _ = self.fitted(i, z, scale)
        r = np.sqrt(5) * np.sqrt(((z - x) ** 2).sum(1)) / scale
        h = 5 / (3 * scale**2) * (1 + r) * np.exp(-r)
        return -range_ * ((h * a)[:, None] * (z - x)).sum(0)

    def of_features(self, z, weights):
        return -np.sqrt(2 / len(self.b)) * self.w @ (np.sin(z @ self.w + self.b) * weights)

    def search(self, x, rounds, steps, lr):
        weights = [np.zeros(len(self.b))] * 2
        for round in range(rounds):
            ends = []
            for i in range(2):
                z, m, v = x.copy(), 0.0, 0.0
                self.ask(i, z)
                scale = self.fitted(i, z)[3]
                for t in range(1, steps + 1):
                    g = self.gradient(i, z, scale)
                    if self.correction and round:
                        g = g + (self.of_features(z, np.mean(weights, axis=0)) - self.of_features(z, weights[i])) / t
                    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                    z = np.clip(z - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8), 0, 1)
                    self.ask(i, z)
                ends.append(z)
            x = np.mean(ends, axis=0)
            if self.correction:
                weights = [self.summed_up(i, x) for i in range(2)]
        return x

    def summed_up(self, i, x):
        self.ask(i, x)
        points, values = np.array(list(self.asked[i])), np.array(list(self.asked[i].values()))
        order = np.argsort(((points - x) ** 2).sum(1), kind="stable")[:40]
        points, values = points[order], values[order]
        phi = np.sqrt(2 / len(self.b)) * np.cos(points @ self.w + self.b)
        range_ = values.max() - values.min()
        return range_ * phi.T @ np.linalg.solve(phi @ phi.T + 1e-6 * np.eye(len(phi)), (values - values.mean()) / range_)


@pytest.mark.parametrize("correction", [True, False])
def test_a_whole_search_equals_one_written_out(correction):
    rng = np.random.default_rng(5)
    starts, features = rng.uniform(0.3, 0.7, (2, 6, 3)), RandomFeatures.draw(3, 50, seed=1)
    config = FZooSConfig(local_steps=3, lr=0.05, near=20, near_round=40, active=0, active_round=0, correction=correction)
    algorithm = FZooSAlgorithm(config, features, start=lambda client: starts[client])
    found = run(algorithm, 3 * algorithm.exchanges).server.x.numpy()
    expected = ByHand(starts, features.w.numpy(), features.b.numpy(), correction).search(START, 3, 3, 0.05)
    assert np.abs(found - expected).max() <= 1e-6
    assert np.abs(found - START).max() > 0.02


def test_the_correction_of_one_client_is_zero_and_of_two_it_is_not():
    def path(boxes, correction):
        config = changed(active=0, active_round=0, correction=correction)
        seen = []
        minimize(boxes, START, 4, config, tell=lambda round, result: seen.append(result.x))
        return np.array(seen)

    assert np.array_equal(path(BOXES[:1], True), path(BOXES[:1], False))
    assert np.abs(path(BOXES, True) - path(BOXES, False)).max() > 1e-3


@pytest.mark.parametrize(
    ("steps", "active", "active_round", "init", "rounds", "correction"),
    [(3, 2, 4, 5, 3, True), (2, 0, 0, 3, 2, True), (4, 3, 6, 8, 2, False)],
)
def test_queries_are_those_of_the_formula_and_no_point_is_asked_twice(steps, active, active_round, init, rounds, correction):
    settings = {"local_steps": steps, "active": active, "active_round": active_round, "init": init, "correction": correction}
    config = changed(**settings)
    boxes, asked = counted(BOXES)
    with meters.counting() as counts:
        result = minimize(boxes, START, rounds, config)
    if correction:
        expected = 2 * (init + 1 + rounds * (steps + (steps - 1) * active + 1 + active_round))
    else:
        expected = 2 * (init + rounds * (1 + steps + (steps - 1) * active))
    assert sum(map(len, asked)) == expected == sum(result.queries) == counts["queries"]
    assert [len(set(each)) for each in asked] == [len(each) for each in asked]
    d, m = 3, config.features
    assert result.numbers_down == ([2 * 2 * d] + [2 * (2 * d + m)] * (rounds - 1) if correction else [2 * d] * rounds)
    assert result.numbers_up == ([2 * (d + m)] if correction else [2 * d]) * rounds


@pytest.mark.parametrize("mode", ["plain", "prox", "scaffold"])
def test_fedzo_asks_for_every_gradient_anew(mode):
    boxes, asked = counted(BOXES)
    result = minimize(boxes, START, 3, FedZOConfig(local_steps=4, directions=7, mode=mode, lr=0.05))
    assert sum(map(len, asked)) == 2 * 3 * 4 * 8 == sum(result.queries)
    assert result.values[-1] < result.values[0]
    assert not result.ends


def test_finite_differences_of_a_linear_function_are_its_gradient_on_the_directions():
    slope = np.random.default_rng(0).standard_normal(6)
    from fewer.federated._shared.black_box import BlackBox
    from fewer.federated.fzoos.peers import finite_differences

    box = BlackBox(0, None, lambda x: float(slope @ x))
    z = torch.full((6,), 0.5, dtype=torch.float64)
    found = finite_differences(box, z, float(slope @ z.numpy()), FedZOConfig(directions=6), np.random.default_rng(1))
    assert np.abs(found.numpy() - slope / 6).max() <= 1e-9  # the directions are a whole basis


def test_scaffold_corrects_unlike_clients_and_prox_holds_back():
    values = {mode: minimize(BOXES, START, 12, FedZOConfig(local_steps=5, lr=0.03, mode=mode)).x for mode in ("plain", "prox", "scaffold")}
    for one, other in itertools.combinations(values.values(), 2):
        assert np.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("config", [SMALL, changed(correction=False), FedZOConfig(local_steps=3, mode="scaffold")])
def test_engine_script_and_flower_are_one(config):
    strategy = FZooS(config)
    exchanges = strategy.exchanges(3)
    by_script = minimize(BOXES, START, 3, config).x
    by_engine = run(strategy.algorithm, exchanges).server.x.numpy()
    by_flower, _, _ = on_two_nodes(config, exchanges)
    assert np.abs(by_script - by_engine).max() == 0
    assert np.abs(by_flower - by_script).max() <= 1e-9
    assert exchanges == (6 if config is SMALL else 3)


def test_resuming_in_the_middle_is_bit_equal(tmp_path):
    algorithm, file = FZooSAlgorithm(SMALL), tmp_path / "state.pt"
    whole = run(algorithm, 8).server.x
    run(algorithm, 4, checkpoint=file)
    assert torch.equal(run(algorithm, 8, checkpoint=file).server.x, whole)


def test_shifts_and_scales_of_the_functions_change_nothing():
    plain = minimize(BOXES, START, 3, SMALL).x
    shifted = minimize([quadratic(client, shift=5.0) for client in range(2)], START, 3, SMALL).x
    scaled = minimize([quadratic(client, scale=10.0) for client in range(2)], START, 3, SMALL).x
    assert np.abs(shifted - plain).max() <= 1e-6
    assert np.abs(scaled - plain).max() <= 1e-6


def test_a_client_that_missed_an_exchange_is_not_corrected_by_weights_of_another():
    """The second client misses the summing up: in the next exchange it moves as if there were no correction, the first one is corrected."""
    algorithm = FZooSAlgorithm(SMALL)

    def sampler(clients, exchange, seed):
        return [0] if exchange == 2 else list(clients)

    history = simulate(algorithm, Point(START), BlackBoxes(BOXES), 2, sampler=sampler)
    weights = history.server.vectors["weights"]

    def moved(client, **vectors):
        box = BlackBoxes(BOXES).shard(client, Point(START))
        message = Message(client, 3, {"x": history.server.x, **vectors})
        return algorithm.local(history.client_states.get(client), message, box, np.random.default_rng(0))[1].vectors["model"]

    assert torch.equal(moved(1, weights=weights), moved(1))
    assert torch.equal(moved(0, weights=weights), moved(0))  # the mean is its own
    assert not torch.equal(moved(0, weights=2 * weights), moved(0))


def test_nobody_is_corrected_by_mean_weights_of_an_exchange_that_failed():
    """All have summed up, and their answers are lost on the way: the server's mean is then of an earlier exchange than their weights."""

    def spoil(message, reply):
        return Reply(Error(code=0, reason="lost on the way"), reply_to=message) if exchange_of(message) == 4 else reply

    grid = DirectGrid(fzoos_client_app(box_of, SMALL), 2, spoil)
    FZooS(SMALL, seed=0).start(grid, arrays_of(START), num_rounds=6)
    sent = {exchange_of(message): set(message.content.array_records) for message, _ in grid.messages}
    assert ["weights" in sent[exchange] for exchange in (1, 3, 5)] == [False, True, False]


@pytest.mark.parametrize("config", [SMALL, FedZOConfig(local_steps=3, mode="scaffold")])
def test_a_start_of_single_precision_is_searched_from_in_double_precision(config):
    given = []

    def objective(context):
        return lambda x: given.append(x.dtype) or box_of(context)(x)

    start = ArrayRecord({"x": Array(START.astype(np.float32))})
    found = FZooS(config, seed=0).start(DirectGrid(fzoos_client_app(objective, config), 2), start, num_rounds=2).arrays["x"].numpy()
    assert set(given) == {np.dtype(np.float64)}
    assert np.array_equal(found, on_two_nodes(config, 2)[0])


def test_when_the_history_is_full_the_oldest_goes():
    small = changed(history=40, near_round=40, near=20)
    history = run(FZooSAlgorithm(small), 8)
    asked = history.client_states.get(0)["marks"][0]
    assert asked == 54
    points = history.client_states.get(0)["points"].view(40, 3)
    assert len(torch.unique(points, dim=0)) == 40
    assert np.isfinite(history.server.x.numpy()).all()


def test_the_oldest_points_leave_and_the_nearest_are_found_in_their_order():
    box = BlackBoxes([lambda x: float(x[0])]).shard(0, None)
    known = Trajectory(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0, box, None)
    for number in (1.0, 2.0, 3.0, 4.0, 5.0):
        known.value(torch.tensor([number], dtype=torch.float64))
    points, values = known.nearest(torch.tensor([4.0], dtype=torch.float64), 3)
    assert points[:, 0].tolist() == values.tolist() == [4.0, 3.0, 5.0]  # ties: the older first
    assert len(known) == 3


def test_nothing_is_asked_beyond_the_bounds():
    away = lambda x: float(((x - 2) ** 2).sum())  # noqa: E731
    for config in (changed(lr=0.3), FedZOConfig(local_steps=3, lr=0.3)):
        boxes, asked = counted([away])
        found = minimize(boxes, START, 4, config)
        assert found.x.tolist() == [1.0, 1.0, 1.0]
        assert np.max(asked[0]) == 1.0
    free = minimize([away], START, 10, changed(lr=0.3, bounds=None))
    assert free.x.min() > 1.2


def test_algorithms_and_results_survive_copies():
    algorithm = FZooSAlgorithm(SMALL, RandomFeatures.draw(3, 50))
    assert repr(copy.deepcopy(algorithm)) == repr(pickle.loads(pickle.dumps(algorithm))) == repr(algorithm)
    result = minimize(BOXES, START, 1, SMALL)
    assert np.array_equal(pickle.loads(pickle.dumps(result)).x, result.x)
    assert np.array_equal(minimize(BOXES, START.astype(np.float32), 1, SMALL).x, result.x)
    strided = np.repeat(START, 2)[::2]
    assert np.array_equal(minimize(BOXES, strided, 1, SMALL).x, result.x)


def test_one_number_and_one_box():
    found = minimize([lambda x: float((x[0] - 0.3) ** 2)], [0.9], 10, changed(lr=0.1))
    assert abs(found.x[0] - 0.3) < 0.1
