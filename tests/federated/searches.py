"""Two clients' quadratics that FZooS's tests search."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from direct_grid import DirectGrid

from fewer.federated import FZooS, FZooSConfig, Independent, fzoos_client_app, simulate
from fewer.federated._shared.black_box import BlackBoxes, Point
from fewer.federated.fzoos import arrays_of

CENTRES = np.array([[0.2, 0.7, 0.4], [0.6, 0.3, 0.8]])
CURVES = np.array([[1.0, 2.0, 0.5], [2.0, 0.5, 1.5]])
START = np.array([0.5, 0.5, 0.5])
EVERYBODY = Independent(1.0)
SMALL = FZooSConfig(local_steps=3, lr=0.05, features=50, active=2, candidates=10, active_round=4, candidates_round=12, init=5, near=20, near_round=40, history=200)  # fmt: skip


def quadratic(client, shift=0.0, scale=1.0):
    return lambda x: scale * float((CURVES[client] * (x - CENTRES[client]) ** 2).sum()) + shift


def changed(**settings: Any) -> FZooSConfig:
    return dataclasses.replace(SMALL, **settings)


BOXES = [quadratic(client) for client in range(2)]


def run(algorithm, rounds, boxes=BOXES, x0=START, **keywords):
    return simulate(algorithm, Point(x0), BlackBoxes(boxes), rounds, sampler=EVERYBODY, **keywords)


def counted(boxes):
    """The boxes, and the points that each was asked at."""
    asked = [[] for _ in boxes]

    def one(client):
        def function(x):
            asked[client].append(tuple(x))
            return boxes[client](x)

        return function

    return [one(client) for client in range(len(boxes))], asked


def on_two_nodes(config, exchanges, boxes=BOXES, **keywords):
    def objective(context):
        return boxes[context.node_config["partition-id"]]

    grid = DirectGrid(fzoos_client_app(objective, config), 2)
    strategy = FZooS(config, seed=0, **keywords)
    result = strategy.start(grid, arrays_of(START), num_rounds=exchanges)
    return result.arrays["x"].numpy(), strategy, grid


def exchange_of(message):
    return message.content.config_records["config"].get("round")


def box_of(context):
    return BOXES[context.node_config["partition-id"]]
