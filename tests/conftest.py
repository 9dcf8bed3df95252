"""What the tests of the house share: the repository, an outside package installed once, the command line, and what tests cost."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import resource
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import hypothesis
import pytest

from house import ROOT, WORDS, command, command_environment, in_this_process, install

if "PYTEST_XDIST_WORKER" in os.environ:  # two workers share two cores
    os.environ["OMP_NUM_THREADS"] = "1"

for helper in sorted((ROOT / "tests").rglob("*.py")):  # modules that tests of one folder share, each of a name of its own
    if not helper.name.startswith(("test_", "conftest", "__")) and "outside" not in helper.parts and str(helper.parent) not in sys.path:
        sys.path.append(str(helper.parent))
hypothesis.settings.register_profile("house", deadline=None)  # no test is decided by how busy the machine is
hypothesis.settings.load_profile("house")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("FEWER_DATA", str(ROOT / ".." / "shared" / "data"))


@pytest.fixture(scope="session")
def outside(tmp_path_factory):
    """The folder into which the tiny outside package `guessing` has been installed."""
    return install(ROOT / "tests" / "outside", tmp_path_factory.mktemp("site"))


@pytest.fixture
def fewer(outside, tmp_path, monkeypatch):
    """`fewer(...)`: the command line, in a folder of its own, with the outside package installed; in this process, as that is quicker.

    With an environment of its own it runs in a fresh process.
    """

    def run(*words: str, cwd: Path = tmp_path, status: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        if environment:
            env = command_environment(outside, **environment)
            done = subprocess.run(command(*words), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
        else:
            with monkeypatch.context() as patch:
                patch.chdir(cwd)
                patch.syspath_prepend(str(outside))
                for name, value in WORDS.items():
                    patch.setenv(name, value)
                done = in_this_process(*words)
        if status is not None:
            assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


# What tests cost: processor seconds, which a busy machine changes little

MOST = 20.0  # of a method's tests together, on the machine that they were counted on
SLACK = 1.5  # the same tests take up to so much more beside busy neighbours, with whom they share caches
MORE = {  # methods that take more, each with its reason; to be brought down
    "control/smart_composites": 45.0,  # torch.export and gcc -O2 of 200 random networks (14 s), 400 ONNX graphs, controllers in C
    "federated/sfprompt": 25.0,  # vision transformers whose messages cross twice a batch; 17 alone, 26 beside a neighbour
    "signals/spright": 30.0,  # numba compiles anew where nothing is cached: 20 alone, 30 beside a neighbour
}
REFERENCE = 0.03  # processor seconds of `yardstick` on that machine
spent: dict[str, float] = defaultdict(float)  # folder of tests -> processor seconds
_before = [0.0]


def processor_seconds() -> float:
    """Of this process and all that it has started, living or not."""
    used = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    tick = os.sysconf("SC_CLK_TCK")
    waiting = [os.getpid()]
    while waiting:
        pid = waiting.pop()
        with contextlib.suppress(OSError):
            below = [int(child) for tasks in Path(f"/proc/{pid}/task").glob("*/children") for child in tasks.read_text().split()]
            for child in below:
                with contextlib.suppress(OSError):
                    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                    used += sum(map(int, fields[11:15])) / tick
            waiting += below
    return used


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    now = processor_seconds()
    outcome.get_result().user_properties.append(("processor seconds", max(0.0, now - _before[0])))
    _before[0] = now


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Every test, and the fixtures made for it, draws the same, whatever ran before it and on whichever worker."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    if item.session._setupstate.stack == {}:
        _before[0] = processor_seconds()


def pytest_runtest_logreport(report):
    parts = Path(report.nodeid.partition("::")[0]).parts
    folder = "/".join(parts[1:3]) if len(parts) > 3 else "/".join(parts[1:])
    spent[folder] += report.user_properties[-1][1] if report.user_properties else 0.0


def yardstick() -> float:
    """Processor seconds of a fixed piece of work: a slower machine is given as much more."""
    start = time.process_time()
    for _ in range(3):
        sorted(number * 7919 % 100_003 for number in range(100_000))
    return time.process_time() - start


@functools.cache
def slowness() -> float:
    return max(1.0, min(yardstick() for _ in range(3)) / REFERENCE)


def over_budget(slack: float = 1.0) -> list[str]:
    """The methods whose tests took more than their share."""
    methods = [folder for folder in spent if (ROOT / "src" / "fewer" / folder / "paper.toml").exists()]
    return [folder for folder in methods if spent[folder] > MORE.get(folder, MOST) * slack * slowness()]


def pytest_terminal_summary(terminalreporter):
    if spent and sum(spent.values()) > 1:
        terminalreporter.section("processor seconds by folder")
        above, far_above = over_budget(), over_budget(SLACK)
        for folder, seconds in sorted(spent.items(), key=lambda each: -each[1])[:20]:
            told = "   far above its share: the run fails" if folder in far_above else "   above its share" if folder in above else ""
            terminalreporter.line(f"{seconds:7.1f} {folder}{told}")


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput") and over_budget(SLACK) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
