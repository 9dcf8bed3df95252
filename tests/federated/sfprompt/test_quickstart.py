"""The written app, its parts run as Flower runs them, over nodes that are called in this process; and the verb that tells costs."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib

import pytest
import torch
from direct_grid import DirectGrid
from flwr.app import Context, RecordDict
from split_vits import vit

from fewer.federated import split_vit, wire_cost
from fewer.federated._shared.command import templates, write_app

NODES = 3


@pytest.fixture
def app(tmp_path, monkeypatch):
    write_app(templates()["sfprompt"], tmp_path / "app")
    monkeypatch.syspath_prepend(tmp_path / "app")
    yield tmp_path / "app"
    for name in [name for name in sys.modules if name.startswith("quickstart")]:
        del sys.modules[name]


def test_the_written_app_learns_and_writes_prompt_and_tail(app, tmp_path):
    settings = tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    settings |= {"rounds": 3, "final-model": str(tmp_path / "final.pt"), "min-available-nodes": NODES}
    client, server, task = (importlib.import_module(f"quickstart.{name}") for name in ("client_app", "server_app", "task"))
    grid = DirectGrid(client.app, NODES)
    for context in grid.contexts.values():
        context.run_config = settings
    context = Context(7, 0, {}, RecordDict(), settings)
    server.main(grid, context)
    split, (x, y) = task.split_of(context).eval(), task.load_test()

    def accuracy():
        with torch.no_grad():
            return float((split(x).argmax(1) == y).float().mean())

    before = accuracy()
    split.load_state_dict(torch.load(tmp_path / "final.pt", weights_only=True), strict=False)
    assert accuracy() > before + 0.1
    largest = max(len(task.load_data(each)[0]) for each in grid.contexts.values())
    cost = wire_cost(split, largest, settings["keep"], batch_size=settings["batch-size"])
    assert cost.sent_examples < cost.break_even


def test_costs_of_a_models_folder(tmp_path, fewer):
    vit().save_pretrained(tmp_path / "model")
    words = ["federated", "split-cost", str(tmp_path / "model"), "--examples", "1000", "--keep", "0.2", "--prompt-tokens", "2"]
    expected = wire_cost(split_vit(vit(), prompt_tokens=2), 1000, 0.2)
    told = json.loads(fewer(*words, "--json").stdout)
    assert told["messages"] == expected.numbers
    assert told["break_even"] == expected.break_even < told["sent"] == 200
    said = fewer(*words).stdout
    assert f"break-even: {expected.break_even} sent examples" in said
    assert "200 are sent: more than full fine-tuning moves" in said
    refused = fewer("federated", "split-cost", str(tmp_path), status=2)
    assert "has no config.json; expected a transformers directory" in refused.stderr
    refused = fewer(*words[:3], "--head-blocks", "4", status=2)
    assert "so that a body is left" in refused.stderr
