"""Real deployments: rounds by SuperLink and SuperNodes and by Ray equal the in-process engine; a killed node costs a round its share; a
simulation's Ray listens on this machine alone. They run one after the other, and their patience is counted in what a start takes here."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch
from deployment import BIN, Deployment, Run, chosen, done_seconds, free_ports, start_seconds
from flower_app import ALGORITHMS, in_process, largest_difference

from fewer.federated import FedSpeedAlgorithm, Independent, Shards, load_checkpoint, save_checkpoint, simulate
from fewer.federated._shared.command import END_SUPERLINK, templates, write_app

pytestmark = pytest.mark.xdist_group("flower")
SETTINGS = {"rounds": 5, "fraction_train": 0.7, "fraction_evaluate": 0.0, "seed": 22, "local_epochs": 1}
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "app"
    write_app(templates()["fedspeed"], folder)
    return folder


@dataclass
class Finished:
    """What five rounds left behind, node 1 killed in the fourth and started again: the log, and the states after rounds 3 and 5."""

    app: Path
    text: str
    after_3: Path
    final: Path
    timeout: float


@pytest.fixture(scope="module")
def finished(app, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployment")
    done = Finished(app, "", folder / "after-3.pt", folder / "final.pt", timeout=round(10 + 10 * start_seconds()))
    deployment = Deployment(folder / "place", nodes=2)
    try:
        checkpoint = folder / "server.pt"
        run = deployment.run(app, **SETTINGS, timeout=float(done.timeout), checkpoint=str(checkpoint), final_model=str(done.final))
        run.until(r"configure_train: round 4, clients \[0, 1\]")
        shutil.copy(checkpoint, done.after_3)
        deployment.kill_node(1)
        deployment.start_node(1)
        run.until(r"round 4: no good answer from \[1\]")
        done.text = run.finish()
    finally:
        deployment.stop()
    return done


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
    assert f"round 4: no good answer from [1] in {finished.timeout:g} s; it goes on with 1 of 2 clients" in finished.text
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


def test_simulation_by_ray_equals_the_engine(tmp_path):
    file = tmp_path / "ray.pt"
    words = [sys.executable, str(Path(__file__).parent / "flower_app.py"), str(file)]
    environment = os.environ | QUIET | {"FLWR_HOME": str(tmp_path / "flwr")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=2 * done_seconds())
    assert done.returncode == 0, done.stdout + done.stderr
    by_ray = torch.load(file, weights_only=True)
    assert list(by_ray) == list(ALGORITHMS)
    for name, algorithm in ALGORITHMS.items():
        assert largest_difference(by_ray[name], in_process(algorithm)) <= 1e-6


def processes_of(home: Path) -> list[psutil.Process]:
    """All that Flower started with this FLWR_HOME, and all that these started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
    return found


def test_a_simulated_run_listens_on_this_machine_alone_and_its_superlink_ends_as_told(app, tmp_path):
    """`flwr run` as a user runs it: it starts a SuperLink of its own, which starts the process that starts Ray."""
    home, (link, control) = tmp_path / "flwr", free_ports(2)
    environment = os.environ | QUIET | {
        "FLWR_HOME": str(home), "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(link), "FLWR_LOCAL_CONTROL_API_PORT": str(control),
        "PYTHONUNBUFFERED": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    settings = chosen(SETTINGS | {"rounds": 2})
    try:
        run = Run([BIN / "flwr", "run", app, "--stream", "--run-config", settings], environment)
        run.until(r"configure_train: round 2")
        started = processes_of(home)
        names = " ".join(map(words, started))
        assert "raylet" in names
        assert "gcs_server" in names
        pids = {process.pid for process in started}
        listening = {each.laddr.ip for each in psutil.net_connections("inet") if each.status == "LISTEN" and each.pid in pids}
        assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}
        run.finish()
        deadline = time.monotonic() + done_seconds()
        while any("raylet" in words(process) for process in alive(home)) and time.monotonic() < deadline:
            time.sleep(0.2)
        told = re.search(r"pkill -f '(.*)'", END_SUPERLINK)
        assert told is not None
        left = alive(home)
        assert left
        for process in left:  # as the told command does, but of this test's processes alone
            if re.search(told[1], words(process)):
                process.terminate()
        psutil.wait_procs(left, timeout=done_seconds())
        assert not alive(home)
    finally:
        for process in alive(home):
            process.kill()


def words(process: psutil.Process) -> str:
    """A process's command line; empty where it has ended."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def alive(home: Path) -> list[psutil.Process]:
    running = []
    for process in processes_of(home):
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
    return running
