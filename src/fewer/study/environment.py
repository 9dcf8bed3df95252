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


def commit() -> str:
    """The commit of the checkout this package runs from, with "+" where tracked files differ from it; "" for an installed package."""
    try:
        if Path(_git("rev-parse", "--show-toplevel")) / "src" / "fewer" != Path(fewer.__file__).resolve().parent:
            return ""
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    here = Path(__file__).parent
    return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
