"""What tests import: the repository's root, and the command line in this process or as words for a fresh one."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS = {"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"}  # wide plain text


def in_this_process(*words: str) -> subprocess.CompletedProcess[str]:
    """`fewer WORDS` as the entry point runs it, its streams caught."""
    from fewer import papers
    from fewer.cli import main

    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, signal.getsignal(signal.SIGTERM))
    papers._catalogue.cache_clear()
    try:
        sys.argv = ["fewer", *words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 0
    finally:
        sys.argv = before[0]
        signal.signal(signal.SIGTERM, before[1])
        papers._catalogue.cache_clear()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def command(*words: str) -> list[str]:
    """`fewer WORDS` with this interpreter."""
    return [sys.executable, "-m", "fewer", *words]


def command_environment(outside: Path, **environment: str) -> dict[str, str]:
    """The environment of a command that sees this checkout and the outside package, and writes wide plain text."""
    return os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(outside)))} | WORDS | environment


def install(project: Path, target: Path) -> Path:
    """A package installed into a folder of its own, without what it needs and without a network."""
    words = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-build-isolation", "--target", str(target), str(project)]
    subprocess.run(words, check=True, env=os.environ | {"PYTHONPATH": ""})
    return target


def on_two_processes(work: Callable[..., None], folder: Path, *args: object) -> None:
    """`work(rank, folder, *args)` in two processes of one torch.distributed group (gloo), of a thread each; both must end well.

    They are forked, so that nothing is imported again. Neither leaves while the other still speaks.
    """

    def one(rank: int) -> None:
        import torch
        from torch import distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        work(rank, folder, *args)
        dist.barrier()
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    pair = [context.Process(target=one, args=(rank,), daemon=True) for rank in (0, 1)]
    for each in pair:
        each.start()
    for each in pair:
        each.join(300)
    assert [each.exitcode for each in pair] == [0, 0], "a process's own words stand on stderr"
