"""Where tensors are computed: the words that a user says, and what they come to on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from enum import StrEnum

from fewer.errors import UserError


class Device(StrEnum):
    """The choices of `--device`."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def choose_device(device: str) -> str:
    """ "auto" becomes "cuda" where torch finds a GPU and "cpu" elsewhere; UserError on another word, or where no GPU is found.

    >>> choose_device("cpu")
    'cpu'
    """
    if device not in list(Device):
        raise UserError(f"--device {device}: expected auto, cpu or cuda")
    if device == "cpu":
        return "cpu"
    try:
        import torch

        found = torch.cuda.is_available()
    except ImportError:
        found = False
    if device == "cuda" and not found:
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu")
    return "cuda" if found else "cpu"


def keep_ray_local() -> None:
    """Let a Ray cluster that this process starts listen on the loopback address alone. To be called before Ray is imported.

    Ray has a switch for it, named after the systems that have it on by themselves; without it every one of its servers listens on all
    of the machine's addresses, and whoever reaches one runs code.
    """
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread inside the block: where processor time is taken (a second thread's waiting would count as work), and where
    work is so small that two threads are slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
