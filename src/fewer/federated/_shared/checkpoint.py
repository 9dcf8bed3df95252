"""A federation's state in a file: what the server holds, and for the in-process engine what each client keeps. Whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewer.federated._shared.algorithm import ServerState
from fewer.files import whole_file


def save_checkpoint(path: Path, server: ServerState, clients: dict[str, Tensor] | None = None, **about: Any) -> None:
    """Write the state; the file, which may be an earlier checkpoint, appears whole or not at all."""
    content = {
        "x": server.x, "clients": server.clients, "round": server.round, "vectors": server.vectors, "kept": clients or {}, "about": about,
    }  # fmt: skip
    with whole_file(path, overwrite=True, option="checkpoint") as file:
        torch.save(content, file)


def load_checkpoint(path: Path, clients: int, size: int | None = None, **about: Any) -> tuple[ServerState, dict[str, Tensor]]:
    """(the server's state, what clients keep), of a model of so many parameters (None: of any).

    Raises:
        ValueError: the file is no checkpoint, or one of another number of clients, another model, seed or algorithm.
    """
    try:
        content = torch.load(path, weights_only=True)
        state = ServerState(content["x"], content["clients"], content["round"], content["vectors"])
    except (RuntimeError, EOFError, KeyError, TypeError, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is no checkpoint of a federation ({type(error).__name__}); expected one that was written here") from error
    except Exception as error:  # torch wraps what the unpickler refuses in errors of its own
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}); expected one that was written here") from error
    if state.clients != clients:
        raise ValueError(f"{path} was written with {state.clients} clients and is resumed with {clients}; expected the same number")
    if size is not None and state.x.numel() != size:
        raise ValueError(f"{path} has a model of {state.x.numel()} parameters and is resumed with one of {size}; expected the same model")
    for name, value in about.items():
        if content["about"].get(name) != value:
            raise ValueError(f"{path} was written with {name} {content['about'].get(name)!r}; resumed with {value!r}; expected the same")
    return state, content["kept"]
