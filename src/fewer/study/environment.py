"""Where a trial runs: machine, versions, commit. Kept with every trial and shown beside every result."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

import fewer

HOUSE = Path(fewer.__file__).parent
SHOWN_PACKAGES = ("torch", "numpy", "scikit-learn", "diffusers", "transformers", "peft", "flwr", "torch_geometric", "numba")


@cache
def environment() -> dict[str, Any]:
    """The machine and versions as plain data: processor, cores, memory (bytes), system, Python, packages, fewer's version and commit."""
    packages = {}
    for name in SHOWN_PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": usable_cores(),
        "memory": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": packages,
        "fewer": fewer.__version__,
        "commit": commit(),
    }


def usable_cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit(folder: Path = HOUSE) -> str:
    """The commit of the checkout that tracks `folder`, with "+" where the tree differs from it; "" where none does."""
    try:
        _git(folder, "ls-files", "--error-unmatch", ".")
        return _git(folder, "rev-parse", "--short=12", "HEAD") + ("+" if _git(folder, "status", "--porcelain", ":/") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
