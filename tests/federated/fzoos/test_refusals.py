"""What FZooS refuses, and a client that fails: told with what was expected, the others go on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from direct_grid import DirectGrid
from searches import BOXES, SMALL, START, changed, counted, on_two_nodes, run

from fewer.federated import (
    FedZOConfig,
    FZooS,
    FZooSAlgorithm,
    FZooSConfig,
    fzoos_client_app,
    minimize,
)
from fewer.federated._shared.black_box import BlackBoxes
from fewer.federated.fzoos import arrays_of, surrogate


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (np.full((4, 2), 0.5), r"start\(0\) gives points of 2 numbers; expected 3, as x0 has"),
        (np.full(3, 0.5), r"x has the shape \(3,\); expected points"),
        (np.full((4, 3), 1.5), r"a point of start\(0\) is 1.5 at 0; expected all within the bounds"),
    ],
)
def test_bad_first_points_are_refused(points, said):
    boxes, asked = counted(BOXES)
    with pytest.raises(ValueError, match=said):
        run(FZooSAlgorithm(SMALL, start=lambda client: points), 1, boxes)
    assert not any(asked)


def test_a_matrix_that_cannot_be_factored_is_told_with_the_client(monkeypatch):
    monkeypatch.setattr(surrogate, "MOST_NOISE", 1e-17)
    for settings in ({"noise": 1e-17, "length_scale": 100.0, "kernel": "rbf"}, {"feature_noise": 1e-17, "features": 3}):
        with pytest.raises(RuntimeError, match="client 0: the kernel matrix of .* is not positive definite with noise 1e-17"):
            minimize(BOXES, START, 2, changed(**settings))


def test_a_client_whose_function_fails_is_left_out_and_the_search_goes_on():
    calls = itertools.count()

    def failing(x):
        return BOXES[1](x) if next(calls) < 30 else float("nan")

    x, _, grid = on_two_nodes(SMALL, 6, [BOXES[0], failing])
    assert np.isfinite(x).all()
    failed = [reply for _, reply in grid.messages if reply.has_error()]
    assert failed
    assert "the function of client 1 gives nan at [" in failed[0].error.reason
    alone, _, _ = on_two_nodes(SMALL, 2)
    assert not np.array_equal(alone, x)


def test_settings_that_differ_between_server_and_client_are_refused():
    grid = DirectGrid(fzoos_client_app(lambda context: BOXES[0], FZooSConfig(features=60)), 2)
    FZooS(SMALL).start(grid, arrays_of(START), num_rounds=1)
    assert all("expected the same settings on both sides" in reply.error.reason for _, reply in grid.messages if reply.has_error())
    assert any(reply.has_error() for _, reply in grid.messages)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"x0": [0.5, 1.5, 0.5]}, r"x0 is 1.5 at 1; expected all within the bounds \(0.0, 1.0\), or bounds=None"),
        ({"x0": [[0.5]]}, r"x0 has the shape \(1, 1\); expected a vector"),
        ({"x0": [np.nan]}, "x0 holds NaN"),
        ({"functions": []}, "no functions were given; expected one a client"),
        ({"functions": [BOXES[0], lambda x: float("nan")]}, r"the function of client 1 gives nan at \[0\.\d+, 0\.\d+, 0\.\d+\]; expected one finite"),
        ({"functions": [lambda x: x]}, r"client 0 gives an array of shape \(3,\)"),
        ({"functions": [lambda x: "far"]}, "client 0 gives 'far'"),
        ({"rounds": 0}, "rounds is 0"),
    ],
)  # fmt: skip
def test_bad_searches_are_refused(words, said):
    with pytest.raises(ValueError, match=said):
        minimize(**{"functions": BOXES, "x0": START, "rounds": 1, "config": SMALL, **words})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"near": 1}, "near is 1; expected a whole number of at least 2"),
        ({"features": 0}, "features is 0"),
        ({"active": 101}, "active is 101 and candidates 100; expected no more of the former"),
        ({"noise": 0}, "noise is 0"),
        ({"kernel": "matern"}, "did you mean 'matern52'"),
        ({"history": 400}, "near_round is 500 and history 400"),
        ({"local_steps": 0}, "local_steps is 0"),
        ({"radius": 0.0}, "radius is 0.0; expected a finite number above 0"),
        ({"bounds": (1, 0)}, "bounds is"),
    ],
)
def test_bad_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        FZooSConfig(**settings)


def test_a_search_that_could_not_move_is_refused():
    with pytest.raises(ValueError, match="init and active are 0; expected one above 0, or points by `start`"):
        minimize(BOXES, START, 1, changed(init=0, active=0))
    assert np.abs(minimize(BOXES, START, 2, changed(init=0)).x - START).max() > 0


def test_weights_of_another_length_are_refused():
    history = run(FZooSAlgorithm(SMALL), 2)
    algorithm = FZooSAlgorithm(SMALL)
    message = algorithm.configure(history.server, [0], 3)[0]
    message.vectors["weights"] = torch.zeros(49, dtype=torch.float64)
    with pytest.raises(ValueError, match="client 0 was sent 49 weights and has 50; expected as many: the same features on every client"):
        algorithm.local(history.client_states.get(0), message, BlackBoxes(BOXES).shard(0, None), np.random.default_rng(0))


def test_black_boxes_are_not_stacked_but_run_in_threads():
    from concurrent.futures import ThreadPoolExecutor

    with pytest.raises(ValueError, match="executor is 'vmap' with black boxes"):
        run(FZooSAlgorithm(SMALL), 2, executor="vmap")
    with ThreadPoolExecutor(2) as pool:
        together = run(FZooSAlgorithm(SMALL), 4, executor=pool)
    alone = run(FZooSAlgorithm(SMALL), 4)
    assert torch.equal(together.server.x, alone.server.x)
    assert [each.counts["queries"] for each in together.rounds] == [each.counts["queries"] for each in alone.rounds]


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"directions": 0}, "directions is 0"), ({"mode": "scafold"}, "did you mean 'scaffold'"), ({"smoothing": 0}, "smoothing is 0")],
)
def test_fedzos_settings_are_checked(settings, said):
    with pytest.raises(ValueError, match=said):
        FedZOConfig(**settings)
