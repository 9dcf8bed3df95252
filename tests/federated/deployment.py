"""A Flower deployment on the loopback address: a SuperLink and SuperNodes as real processes, and runs of an app on them."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BIN = Path(sys.executable).parent


@functools.cache
def start_seconds() -> float:
    """How long a process takes here, now, that imports what each of Flower's processes imports: all patience is counted in it."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, flwr.serverapp, flwr.clientapp, fewer.federated as f; f.FedSpeed"], check=True)
    return time.monotonic() - started


def done_seconds() -> float:
    """Seconds after which something that has not happened is a failure."""
    return 60 + 60 * start_seconds()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Deployment:
    """SuperLink and SuperNodes, each with the partition-id of its place; their logs lie in the folder."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.count = folder, nodes
        self.port, *self.node_ports = free_ports(nodes + 1)
        self.environment = os.environ | {
            "FLWR_HOME": str(folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }  # fmt: skip
        (folder / "flwr").mkdir(parents=True)
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(self.port)]
        self.processes = {"link": self._start("link", *link, "--disable-runtime-dependency-installation")}
        for node in range(nodes):
            self.start_node(node)
        self._wait_for_link()

    def _wait_for_link(self) -> None:
        deadline = time.monotonic() + done_seconds()
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                return
            time.sleep(0.1)
        raise AssertionError(self.logs())

    def start_node(self, node: int) -> None:
        self.processes[f"node{node}"] = self._start(
            f"node{node}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{self.port}",
            "--port", str(self.node_ports[node]), "--node-config", f"partition-id={node} num-partitions={self.count}",
        )  # fmt: skip

    def _start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(words, stdout=log, stderr=log, env=self.environment, start_new_session=True)

    def kill_node(self, node: int) -> None:
        """As by a power cut: the node and all it started are gone at once."""
        process = self.processes.pop(f"node{node}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def run(self, app: Path, **settings: object) -> Run:
        """Start a run of an app."""
        return Run([BIN / "flwr", "run", app, "here", "--stream", "--run-config", chosen(settings)], self.environment, self.logs)

    def logs(self) -> str:
        return "\n".join(f"=== {file.name}\n{file.read_text()[-3000:]}" for file in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        for process in self.processes.values():
            os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(10 + 10 * start_seconds())
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class Run:
    """A run whose log is read line by line as it comes; `logs()` says what else a failure should show."""

    def __init__(self, words: list[Any], environment: dict[str, str], logs: Callable[[], str] = str) -> None:
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)
        self.logs, self.text = logs, ""

    def until(self, pattern: str) -> str:
        """Read the log until a line matches; the line."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + done_seconds()
        for line in self.process.stdout:
            self.text += line
            if re.search(pattern, line):
                return line
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.text}\n{self.logs()}"
        raise AssertionError(f"the run ended without {pattern!r}:\n{self.text}\n{self.logs()}")

    def finish(self) -> str:
        """The whole log, when the strategy has finished."""
        self.until("Bytes on the wire")
        self.process.terminate()
        self.process.wait()
        return self.text


def chosen(settings: dict[str, object]) -> str:
    """Settings as `flwr run --run-config` takes them."""
    return " ".join(f"{name.replace('_', '-')}={toml(value)}" for name, value in settings.items())


def toml(value: object) -> str:
    return json.dumps(value) if isinstance(value, str | bool) else str(value)


def load(file: Path) -> dict[str, torch.Tensor]:
    return torch.load(file, weights_only=True)
