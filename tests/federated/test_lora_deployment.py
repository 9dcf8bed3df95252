"""Real processes: the quickstart's app by SuperLink and SuperNodes equals the engine, and a killed node's budget goes on where it was.Flower's simulation by Ray equals the engine too."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import lora_app
import pytest
from deployment import Deployment, done_seconds, load, start_seconds
from flwr.app import Context, RecordDict

from fewer.federated import FedLoRA, Shards, load_checkpoint, simulate
from fewer.federated._shared.command import templates, write_app

pytestmark = pytest.mark.xdist_group("flower")
SETTINGS = {"rounds": 3, "fraction_evaluate": 0.0, "seed": 4, "secure": False, "local_steps": 3}
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "app"
    write_app(templates()["ffa-lora"], folder)
    return folder


@pytest.fixture
def task(app, monkeypatch):
    """The written app's own model, data and settings."""
    monkeypatch.syspath_prepend(app)
    yield importlib.import_module("quickstart.task")
    for name in [name for name in sys.modules if name.startswith("quickstart")]:
        del sys.modules[name]


def context_of(app, **settings):
    told = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    told |= {name.replace("_", "-"): value for name, value in settings.items()}
    return Context(0, 0, {}, RecordDict(), told)


def in_process(task, context, rounds, sampler, clients=2):
    x, y = task.digits()
    x, y = x[task.BASE_ROWS :].flip(-2), y[task.BASE_ROWS :]
    shards = Shards(x, y, task.parts(clients, context.run_config["dirichlet"], context.run_config["seed"]))
    algorithm = FedLoRA(task.config_of(context))
    return simulate(algorithm, lambda: task.model_of(context), shards, rounds, sampler=sampler, seed=context.run_config["seed"])


def test_a_killed_node_goes_on_with_its_budget(app, task, tmp_path):
    """Node 1 dies in round 2 and loses its count with all it kept; in round 3 it says what the server has seen it spend."""
    deployment = Deployment(tmp_path / "place", nodes=2)
    timeout, checkpoint, final = float(round(10 + 10 * start_seconds())), tmp_path / "server.pt", tmp_path / "final.pt"
    try:
        run = deployment.run(app, **SETTINGS, timeout=timeout, checkpoint=str(checkpoint), final_model=str(final))
        run.until(r"configure_train: round 2, clients \[0, 1\]")
        deployment.kill_node(1)
        deployment.start_node(1)
        run.until(r"round 2: no good answer from \[1\]")
        text = run.finish()
    finally:
        deployment.stop()
    server, _ = load_checkpoint(checkpoint, 2)
    assert dict(server.vectors["rounds_taken"].tolist()) == {0: 3, 1: 2}

    def sampler(clients, round, seed):
        return [0] if round == 2 else list(clients)

    history = in_process(task, context_of(app, **SETTINGS), 3, sampler)
    expected, got = history.state_dict(), load(final)
    assert list(got) == list(expected)
    assert max(float((got[name] - tensor).abs().max()) for name, tensor in expected.items()) <= 1e-6
    assert history.server.x.norm() > 0.05
    assert len(re.findall(r"epsilon spent so far", text)) == 3


def test_flowers_simulation_equals_the_engine(tmp_path):
    file = tmp_path / "ray.pt"
    words = [sys.executable, str(Path(__file__).parent / "lora_app.py"), str(file)]
    environment = os.environ | QUIET | {"FLWR_HOME": str(tmp_path / "flwr")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=2 * done_seconds())
    assert done.returncode == 0, done.stdout + done.stderr
    history, by_ray = lora_app.in_process(2), load(file)
    assert max(float((by_ray[name] - tensor).abs().max()) for name, tensor in history.state_dict().items()) <= 1e-6
    assert history.server.x.norm() > 0.1
