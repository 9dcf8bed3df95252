"""The written app, its parts run as Flower runs them, over nodes that are called in this process."""

from __future__ import annotations

import importlib
import sys
import tomllib

import numpy as np
import pytest
from direct_grid import DirectGrid
from flwr.app import Context, RecordDict

from fewer.federated._shared.command import templates, write_app

NODES = 3


@pytest.fixture
def app(tmp_path, monkeypatch):
    write_app(templates()["fzoos"], tmp_path / "app")
    monkeypatch.syspath_prepend(tmp_path / "app")
    yield tmp_path / "app"
    for name in [name for name in sys.modules if name.startswith("quickstart")]:
        del sys.modules[name]


def test_the_written_app_searches_and_writes_the_point(app, tmp_path):
    settings = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    settings |= {"rounds": 3, "final-point": str(tmp_path / "point.txt"), "min-available-nodes": NODES}
    client, server = (importlib.import_module(f"quickstart.{side}_app") for side in ("client", "server"))
    task = importlib.import_module("quickstart.task")
    grid = DirectGrid(client.app, NODES)
    for context in grid.contexts.values():
        context.run_config = settings
    server.main(grid, Context(7, 0, {}, RecordDict(), settings))
    point = np.loadtxt(tmp_path / "point.txt")

    def value(x):
        return np.mean([task.objective(context)(x) for context in grid.contexts.values()])

    assert value(point) < value(np.full(10, 0.5)) - 0.01
