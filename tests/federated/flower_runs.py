"""Real runs of Flower, started when the first test here starts and looked at by the last ones: they mostly wait for each other."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from deployment import DONE, Deployment

from fewer.federated.fedspeed.command import templates, write_app

SETTINGS = {"rounds": 5, "fraction_train": 0.7, "fraction_evaluate": 0.0, "seed": 22, "local_epochs": 1}
TIMEOUT = 15.0  # seconds after which a node that does not answer is left out


class FlowerRuns:
    """The same three rounds by Ray, and five by SuperLink and two SuperNodes, one of which is killed in round 4 and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.app, self.text, self.errors = folder, folder / "app", "", []
        self.ray_file, self.after_3, self.final = folder / "ray.pt", folder / "after-3.pt", folder / "final.pt"
        write_app(templates()["fedspeed"], self.app, overwrite=False)
        self.threads = [threading.Thread(target=self._guarded, args=(story,)) for story in (self._deployment, self._ray)]
        for thread in self.threads:
            thread.start()

    def _guarded(self, story) -> None:
        try:
            story()
        except BaseException as error:  # told by the test that waits for it
            self.errors.append(error)

    def _ray(self) -> None:
        words = [sys.executable, str(Path(__file__).parent / "flower_app.py"), str(self.ray_file)]
        environment = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(self.folder / "ray"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=2 * DONE)
        assert done.returncode == 0, done.stdout + done.stderr

    def _deployment(self) -> None:
        place = self.folder / "deployment"
        place.mkdir()
        checkpoint = place / "server.pt"
        deployment = Deployment(place, nodes=2)
        try:
            run = deployment.run(self.app, **SETTINGS, timeout=TIMEOUT, checkpoint=str(checkpoint), final_model=str(self.final))
            run.until(r"configure_train: round 4, clients \[0, 1\]")
            shutil.copy(checkpoint, self.after_3)
            deployment.kill_node(1)
            deployment.start_node(1)
            run.until(r"round 4: no good answer from \[1\]")
            self.text = run.finish()
        finally:
            deployment.stop()

    def wait(self) -> FlowerRuns:
        for thread in self.threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        return self


_started: list[FlowerRuns] = []


def flower_runs(request: pytest.FixtureRequest) -> FlowerRuns | None:
    """The runs, started by whoever asks first; None where no test of this session will look at them."""
    if not _started and any(item.path.name == "test_superlink.py" for item in request.session.items):
        _started.append(FlowerRuns(request.getfixturevalue("tmp_path_factory").mktemp("flower")))
    return _started[0] if _started else None
