"""Where tensors are computed: the words that a user says, and what they come to on this machine."""

from __future__ import annotations

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
