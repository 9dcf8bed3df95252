"""Real processes: a SuperLink and four SuperNodes, of which one is killed and one never answers while the others go on; and the app that
`fewer federated quickstart` writes."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib

import pytest
import torch
from deployment import Deployment, done_seconds

from fewer.federated import Anarchic, AnarchicAlgorithm, Return, Shards, Update, simulate_anarchic
from fewer.federated._shared.command import templates, write_app

NODES, SEED = 4, 3
HANGS = '''

from threading import Event


def load_data(context, load=load_data):
    """Node 3 never answers: it waits for what does not come."""
    if context.node_config["partition-id"] == 3:
        Event().wait()
    return load(context)
'''


@pytest.fixture
def app(tmp_path):
    write_app(templates()["anarchic-fl"], tmp_path / "app")
    return tmp_path / "app"


@pytest.fixture
def task(app, monkeypatch):
    monkeypatch.syspath_prepend(app)
    yield importlib.import_module("quickstart.task")
    for name in [name for name in sys.modules if name.startswith("quickstart")]:
        del sys.modules[name]


def test_the_written_app_says_what_the_strategy_takes(app):
    settings = tomllib.loads((app / "pyproject.toml").read_text())
    assert settings["project"]["name"] == "anarchic-fl-quickstart"
    said = settings["tool"]["flwr"]["app"]["config"]
    words = (app / "quickstart" / "server_app.py").read_text() + (app / "quickstart" / "client_app.py").read_text()
    words += (app / "quickstart" / "task.py").read_text()
    assert set(re.findall(r'settings\["([\w-]+)"\]', words)) == set(said)


@pytest.mark.xdist_group("flower")
def test_one_node_dies_and_one_never_answers_while_the_others_go_on(app, task, tmp_path):
    """The model is that of the schedule that the log tells, made again in this process."""
    with (app / "quickstart" / "task.py").open("a") as file:
        file.write(HANGS)
    final = tmp_path / "final.pt"
    settings = {
        "updates": 5, "buffer": 2, "clients": NODES, "min_available_nodes": NODES, "seed": SEED, "most_steps": 4,
        "timeout": float(done_seconds()), "retry": 0.1, "final_model": str(final),
    }  # fmt: skip
    deployment = Deployment(tmp_path / "place", nodes=NODES)
    try:
        run = deployment.run(app, **settings)
        run.until("update 2:")
        deployment.kill_node(2)
        text = run.finish()
    finally:
        deployment.stop()
    lines = re.findall(r"update (\d+): clients \[(.*?)\], steps \[(.*?)\], delays \[(.*?)\], visits \[(.*?)\]", text)
    assert [int(number) for number, *_ in lines] == [1, 2, 3, 4, 5]
    updates = []
    for number, *columns in lines:
        rows = zip(*([int(each) for each in column.split(",")] for column in columns), strict=True)
        updates.append(
            Update(float(number), [Return(worker, int(number) - 1 - delay, steps, visit) for worker, steps, delay, visit in rows])
        )
    assert {each.worker for update in updates for each in update.returns} <= {0, 1, 2}
    assert {each.worker for update in updates[3:] for each in update.returns} <= {0, 1, 2}
    assert {0, 1} <= {each.worker for update in updates for each in update.returns}
    x, y = task.digits()
    config = Anarchic(task.config_of(Chosen(app, settings)), clients=NODES).algorithm.config
    shards = Shards(x, y, task.parts(NODES, 0.3, SEED))
    expected = simulate_anarchic(AnarchicAlgorithm(config), task.model_fn, shards, updates, seed=SEED).state_dict()
    found = torch.load(final, weights_only=True)
    assert max(float((found[name] - tensor).abs().max()) for name, tensor in expected.items()) <= 1e-6


class Chosen:
    """A context with the settings of a run."""

    def __init__(self, app, settings) -> None:
        written = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
        self.run_config = written | {name.replace("_", "-"): value for name, value in settings.items()}
