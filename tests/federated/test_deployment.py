"""Real deployments: three rounds by SuperLink and SuperNodes and by Ray equal the in-process engine; a killed node costs a round its share."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from flower_app import ALGORITHMS, in_process, largest_difference
from flower_runs import SETTINGS, flower_runs

from fewer.federated import FedSpeedAlgorithm, Independent, Shards, load_checkpoint, save_checkpoint, simulate


@pytest.fixture(scope="module")
def finished(request):
    runs = flower_runs(request)
    assert runs is not None
    return runs.wait()


def test_simulation_by_ray_equals_the_engine(finished):
    done = torch.load(finished.ray_file, weights_only=True)
    assert list(done) == list(ALGORITHMS)
    for name, algorithm in ALGORITHMS.items():
        assert largest_difference(done[name], in_process(algorithm)) <= 1e-6


@pytest.fixture
def same_in_process(finished, monkeypatch):
    """`run(rounds, sampler, file)`: what the written app does, by the engine."""
    monkeypatch.syspath_prepend(finished.app)
    task = importlib.import_module("quickstart.task")
    config = replace(FedSpeedAlgorithm().config, local_epochs=SETTINGS["local_epochs"], lr=0.1, rho=0.1, prox=0.1, batch_size=20)
    x, y = task.digits()
    shards = Shards(x, y, task.parts(2, 0.3, SETTINGS["seed"]))

    def run(rounds, sampler, checkpoint=None):
        return simulate(
            FedSpeedAlgorithm(config), task.model_fn, shards, rounds, sampler=sampler, seed=SETTINGS["seed"], checkpoint=checkpoint
        )

    yield run
    for name in [name for name in sys.modules if name.startswith("quickstart")]:
        del sys.modules[name]


def test_superlink_and_supernodes_equal_the_engine(finished, same_in_process):
    server, _ = load_checkpoint(finished.after_3, 2)
    assert server.round == 3
    sampler = Independent(SETTINGS["fraction_train"])
    history = same_in_process(3, sampler)
    assert [each.clients for each in history.rounds] == [[0, 1], [1], [1]]
    assert (server.x - history.server.x).abs().max() <= 1e-6
    start = history.flat.initial()
    assert (history.server.x - start).norm() > 0.1


def test_a_killed_node_costs_its_round_its_share_and_the_next_one_works(finished, same_in_process, tmp_path):
    """Node 1 dies in round 4 and loses what it kept; started again it takes part in round 5."""
    assert "round 4: no good answer from [1] in 15 s; it goes on with 1 of 2 clients" in finished.text
    assert "configure_train: round 5, clients [0, 1]" in finished.text
    assert "round 5: no good answer" not in finished.text
    drawn = Independent(SETTINGS["fraction_train"])

    def sampler(clients, round, seed):
        return [0] if round == 4 else drawn(clients, round, seed)

    file = tmp_path / "state.pt"
    same_in_process(4, sampler, file)
    server, kept = load_checkpoint(file, 2)
    assert kept["correction"][1].norm() > 0
    kept["correction"][1] = 0
    save_checkpoint(file, server, kept, **torch.load(file, weights_only=True)["about"])
    expected = same_in_process(5, sampler, file).state_dict()
    final = torch.load(finished.final, weights_only=True)
    assert max(float((final[name] - tensor).abs().max()) for name, tensor in expected.items()) <= 1e-6
