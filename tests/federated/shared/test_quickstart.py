"""The Flower app that `fewer federated quickstart` writes: whole, never over a user's files, and what it says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib

import pytest

from house import command_environment

APP = {"pyproject.toml", "quickstart/__init__.py", "quickstart/client_app.py", "quickstart/server_app.py", "quickstart/task.py"}


def files(folder):
    return {str(each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()}


@pytest.fixture
def quickstart(fewer):
    def run(*words, status=0, **keywords):
        return fewer("federated", "quickstart", *words, status=status, **keywords)

    return run


def test_quickstart_writes_an_app_whole_and_never_over_something(quickstart, tmp_path):
    target = tmp_path / "app"
    done = quickstart("fedspeed", str(target))
    assert f"flwr run {target}" in done.stdout
    assert files(target) == {".fewer.json", *APP}
    (target / "mine.txt").write_text("mine")
    for overwrite in ([], ["--overwrite"]):
        refused = quickstart("fedspeed", str(target), *overwrite, status=2)
        assert refused.stderr.count("error:") == 1
        assert (target / "mine.txt").read_text() == "mine"
    assert "mine.txt, which fewer did not write there" in refused.stderr
    unknown = quickstart("fedspede", str(tmp_path / "other"), status=2)
    assert "did you mean 'fedspeed'" in unknown.stderr
    assert not (tmp_path / "other").exists()


def test_overwrite_replaces_what_it_wrote_and_nothing_else(quickstart, tmp_path):
    target = tmp_path / "app"
    quickstart("fedspeed", str(target))
    (target / "pyproject.toml").write_text("changed")
    (target / "quickstart" / "__pycache__").mkdir()
    quickstart("fedspeed", str(target), "--overwrite")
    assert files(target) == {".fewer.json", *APP}
    assert tomllib.loads((target / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]["server-rule"] == "released"


def test_the_folder_that_one_stands_in_is_never_replaced(quickstart, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "is the folder you stand in" in quickstart("fedspeed", ".", "--overwrite", status=2).stderr
    assert files(tmp_path) == {"thesis.txt"}


def test_it_says_how_to_end_the_superlink_that_flower_keeps(quickstart, tmp_path):
    from fewer.federated._shared.command import END_SUPERLINK

    done = quickstart("fedspeed", str(tmp_path / "app"))
    assert END_SUPERLINK in done.stdout
    assert END_SUPERLINK in (tmp_path / "app" / "pyproject.toml").read_text()


def test_the_app_keeps_ray_to_this_machine_before_ray_is_imported(quickstart, tmp_path):
    """Flower loads the client app, then Ray: what the app's package says comes first. (A real run is looked at in test_deployment.)"""
    quickstart("fedspeed", str(tmp_path / "app"))
    code = "import sys, quickstart.client_app; assert 'ray' not in sys.modules; from ray._private import ray_constants as c; print(c.ENABLE_RAY_CLUSTER)"
    environment = command_environment(tmp_path / "app")
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") != "0"
