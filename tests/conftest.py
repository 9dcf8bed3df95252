"""What the tests of the house share: the repository, an outside package installed once, and the command line in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FEWER_DATA", str(ROOT / ".." / "shared" / "data"))


@pytest.fixture(scope="session")
def outside(tmp_path_factory):
    """The folder into which the tiny outside package `guessing` has been installed."""
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-qq",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(target),
        str(ROOT / "tests" / "outside"),
    ]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": ""})
    return target


@pytest.fixture
def fewer(outside, tmp_path):
    """`fewer(...)`: the command line run in a fresh process, in a folder of its own, with the outside package installed."""

    def run(*words: str, cwd: Path = tmp_path, status: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command(*words), cwd=cwd, env=command_environment(outside, **environment), capture_output=True, text=True, timeout=300
        )
        if status is not None:
            assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def command(*words: str) -> list[str]:
    """`fewer WORDS` with this interpreter."""
    return [sys.executable, "-m", "fewer", *words]


def command_environment(outside: Path, **environment: str) -> dict[str, str]:
    """The environment of a command that sees this checkout and the outside package, and writes wide plain text."""
    return (
        os.environ
        | {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(outside))), "COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}
        | environment
    )
