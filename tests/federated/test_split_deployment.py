"""Real processes: SFPrompt's exchange by Flower's simulation equals the engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from deployment import done_seconds, load
from split_app import in_process

pytestmark = pytest.mark.xdist_group("flower")
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}


def test_flowers_simulation_equals_the_engine(tmp_path):
    file = tmp_path / "ray.pt"
    words = [sys.executable, str(Path(__file__).parent / "split_app.py"), str(file)]
    environment = os.environ | QUIET | {"FLWR_HOME": str(tmp_path / "flwr")}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=2 * done_seconds())
    assert done.returncode == 0, done.stdout + done.stderr
    history, by_ray = in_process(2), load(file)
    assert max(float((by_ray[name] - tensor).abs().max()) for name, tensor in history.state_dict().items()) <= 1e-6
    assert (history.server.x - history.flat.initial()).norm() > 0.1
