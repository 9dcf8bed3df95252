"""Fields and what a differential equation makes of them: the small benchmark files of neuraloperator."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fewer.data.declarations import DataSet, File, Source
from fewer.data.fetching import obtain

if TYPE_CHECKING:
    import numpy as np


def _file(name: str, sha256: str, size: int) -> File:
    inside = f"neuralop/datasets/data/{name}"
    return File(name, sha256, size, (Source("pip", "neuraloperator==0.3.0", inside),))


DARCY = DataSet(
    "darcy",
    title="Darcy flow: 1,000 permeabilities and pressures at 16 x 16, 50 more at 16 x 16 and at 32 x 32",
    licence="MIT (neuraloperator)",
    citation="Li et al. 2021, Fourier neural operator for parametric partial differential equations",
    files=(
        _file("darcy_train_16.pt", "0be662acdb1dab7dfd1a1da0b140e97f75cc94f98a14edcf768abe6968b3b418", 1_280_999),
        _file("darcy_test_16.pt", "d2b19af9d4a6ae04ba2de54b8ecccc8b89766472faf6ce7f506c0b2a60f69a4c", 64_999),
        _file("darcy_test_32.pt", "bcbd10622373e94df84a17fcdb72ac4317d76e024c2499d21fd1fd34d0742cfd", 256_999),
    ),
)
BURGERS = DataSet(
    "burgers",
    title="Burgers' equation: initial states and how they move on, low resolution",
    licence="MIT (neuraloperator)",
    citation="Li et al. 2021, Fourier neural operator for parametric partial differential equations",
    files=(_file("burgers_lowres.pt", "0bdfd68a13ab9f6b7777628bb82527b9d77524e08e01eafc3fc353df39416d5d", 2_766_150),),
)
SETS = (DARCY, BURGERS)


class Fields(NamedTuple):
    x: np.ndarray  # float32 [n, ...]: what is given
    y: np.ndarray  # float32 [n, ...]: what the operator makes of it


def _read(declared: DataSet, name: str) -> dict:
    import torch

    return torch.load(obtain(declared)[name], map_location="cpu", weights_only=True)


def load_darcy() -> dict[str, Fields]:
    """ "train", "test" and "test_32" -> permeability (0 or 1) and pressure, float32 [n, 16, 16] or [n, 32, 32].

    Raises:
        DataUnavailable: a file can be had from nowhere; the message names the ways.
    """
    found = {}
    for split, name in (("train", "darcy_train_16.pt"), ("test", "darcy_test_16.pt"), ("test_32", "darcy_test_32.pt")):
        part = _read(DARCY, name)
        found[split] = Fields(part["x"].float().numpy(), part["y"].float().numpy())
    return found


def load_burgers() -> Fields:
    """1,200 states u(., 0) at 16 points, float32 [1200, 16], and how they move on, [1200, 17, 16]: 17 times from 0 to 1, viscosity 1/100.

    No split is given: whoever trains takes the first ones, and tells how many.

    Raises:
        DataUnavailable: the file can be had from nowhere; the message names the ways.
    """
    found = _read(BURGERS, "burgers_lowres.pt")
    return Fields(found["input"].float().numpy(), found["output"].float().numpy())
