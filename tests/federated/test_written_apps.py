"""Real processes: the written apps of FZooS and SFPrompt on a SuperLink and SuperNodes, of which one dies in the middle of a round. What
comes out is what the engine makes of the same rounds."""

from __future__ import annotations

import importlib
import sys
import tomllib

import numpy as np
import pytest
import torch
from deployment import Deployment, load, start_seconds
from flwr.app import Context, RecordDict

from fewer.federated import SFPrompt, Shards, simulate
from fewer.federated._shared.black_box import BlackBoxes, Point
from fewer.federated._shared.command import templates, write_app
from fewer.federated.fzoos import FZooSAlgorithm
from fewer.federated.sfprompt import Wire

pytestmark = pytest.mark.xdist_group("flower")
NODES = 2


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    place = Deployment(tmp_path_factory.mktemp("deployment") / "place", nodes=NODES)
    yield place
    place.stop()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """`written(method, **settings)`: its app's folder, its task module, and a context of each client with these settings."""

    def write(method, **settings):
        folder = tmp_path / method
        write_app(templates()[method], folder)
        monkeypatch.syspath_prepend(folder)
        told = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
        told |= {name.replace("_", "-"): value for name, value in settings.items()}
        contexts = [Context(0, 0, {"partition-id": client, "num-partitions": NODES}, RecordDict(), told) for client in range(NODES)]
        return folder, importlib.import_module("quickstart.task"), contexts

    yield write
    for name in [name for name in sys.modules if name.startswith("quickstart")]:
        del sys.modules[name]


def run_with_a_death(deployment, app, at, **settings):
    """Run an app; node 1 is killed when this round begins, and started again."""
    run = deployment.run(app, **settings, timeout=float(round(10 + 10 * start_seconds())))
    run.until(rf"configure_train: round {at}, clients \[0, 1\]")
    deployment.kill_node(1)
    deployment.start_node(1)
    run.until(rf"round {at}: no good answer from \[1\]")
    return run.finish()


def first_alone_in(at):
    return lambda clients, round, seed: [0] if round == at else list(clients)


def test_a_search_goes_on_when_a_node_dies_in_the_middle(deployment, written, tmp_path):
    """In its second round FZooS loses client 1: the round is made of client 0 alone. (Without correction: an exchange a round.)"""
    settings = {"rounds": 2, "correction": False}
    app, task, contexts = written("fzoos", **settings)
    point = tmp_path / "point.txt"
    run_with_a_death(deployment, app, 2, **settings, final_point=str(point))

    algorithm = FZooSAlgorithm(task.config_of(contexts[0]))
    boxes, start = BlackBoxes([task.objective(context) for context in contexts]), Point(np.full(task.CLASSES, 0.5))
    found = simulate(algorithm, start, boxes, 2, sampler=first_alone_in(2)).server.x.numpy()
    assert np.abs(np.loadtxt(point) - found).max() <= 1e-9
    assert np.abs(found - 0.5).max() > 0.02


def test_split_training_goes_on_when_a_node_dies_in_the_middle(deployment, written, tmp_path):
    """SFPrompt loses client 1 among the messages of its round, which is made of client 0 alone."""
    settings = {"rounds": 1, "shortcut_epochs": 1, "batch_size": 300}
    app, task, contexts = written("sfprompt", **settings)
    final = tmp_path / "final.pt"
    run_with_a_death(deployment, app, 1, **settings, final_model=str(final))

    split = task.split_of(contexts[0])
    x, y = (torch.cat(parts) for parts in zip(*map(task.load_data, contexts), strict=True))
    ends = np.cumsum([0] + [len(task.load_data(context)[1]) for context in contexts])
    shards = Shards(x, y, [range(*ends[place : place + 2]) for place in range(NODES)])
    algorithm = SFPrompt(task.config_of(contexts[0]), Wire(split.server()))
    history = simulate(algorithm, split.client, shards, 1, sampler=first_alone_in(1))
    expected, got = history.state_dict(), load(final)
    assert max(float((got[name] - tensor).abs().max()) for name, tensor in expected.items()) <= 1e-6
    assert (history.server.x - history.flat.initial()).norm() > 0.05
