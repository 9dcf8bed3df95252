"""The app of a method without a server, as `fewer federated quickstart` writes it and torchrun runs it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import pytest
from deployment import BIN, done_seconds, free_ports

from house import ROOT

pytestmark = pytest.mark.xdist_group("flower")


def test_the_app_is_run_by_the_command_that_is_printed(fewer, tmp_path):
    """Four processes: each tells its own model's accuracy, one that of the mean of all."""
    said = fewer("federated", "quickstart", "dfedsam", str(tmp_path / "app")).stdout
    assert "flwr" not in said
    words = shlex.split(re.search(r"^run: +(torchrun .*)$", said, re.M)[1])
    assert words == ["torchrun", "--nproc-per-node", "4", str(tmp_path / "app" / "app.py")]
    environment = os.environ | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1",
        "PET_MASTER_PORT": str(free_ports(1)[0]), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    options = ["--rounds", "4", "--checkpoints", str(tmp_path / "checkpoints")]
    done = subprocess.run([*words, *options], env=environment, capture_output=True, text=True, timeout=done_seconds())
    assert done.returncode == 0, done.stdout + done.stderr
    own = {int(client): float(share) for client, share in re.findall(r"client (\d): \d+ digits, its own model (\S+)%", done.stdout)}
    assert sorted(own) == [0, 1, 2, 3]
    assert min(own.values()) > 60
    assert float(re.search(r"the mean of all 4 models: (\S+)%", done.stdout)[1]) > 60
    assert sorted(file.name for file in (tmp_path / "checkpoints").iterdir()) == [f"client-{client}.pt" for client in range(4)]


def test_its_settings_say_how_it_is_run_on_machines_of_their_own(fewer, tmp_path):
    fewer("federated", "quickstart", "dfedsam", str(tmp_path / "app"))
    assert "torchrun --nnodes 4 --node-rank RANK" in (tmp_path / "app" / "pyproject.toml").read_text()
    (tmp_path / "app" / "mine.txt").write_text("mine")
    refused = fewer("federated", "quickstart", "dfedsam", str(tmp_path / "app"), "--overwrite", status=2)
    assert "mine.txt, which fewer did not write there" in refused.stderr
