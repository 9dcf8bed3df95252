"""What the arms share: fields that are made once or read, and training by processor time or by epochs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewer.data import WEIGHTS, folder_of, load_darcy, made_once
from fewer.inputs import read_arrays
from fewer.signals.transform_once.fno import FNO
from fewer.signals.transform_once.model import T1
from fewer.signals.transform_once.modes import ModeDataset, ModeLoss, check_fields
from fewer.signals.transform_once.solvers import navier_stokes, spectral_resize

BATCH, RATE = 20, 3e-3
SOLVED = 32  # points of an axis at which the equation is solved
RISE = 0.3  # share of a cycle in which the rate rises


class Pairs(NamedTuple):
    """Inputs and targets [N, c, n...], divided by their standard deviations over the training part."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def resolution(self) -> tuple[int, ...]:
        return tuple(self.x.shape[2:])


def scaled(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> Pairs:
    """Relative errors are the same for scaled fields, and no arm has to learn the scale."""
    across, along = x.std().clamp(min=1e-12), y.std().clamp(min=1e-12)
    return Pairs(x / across, y / along, test_x / across, test_y / along)


def vorticity(train: int, test: int, resolution: int, T: float, viscosity: float = 1e-3) -> Pairs:
    """Fields of Navier-Stokes at 32^2, brought to the resolution by zero-padded spectra; made once a machine and kept."""

    def make(part: Path) -> None:
        before, after = navier_stokes(train + test, SOLVED, viscosity, T, seed=0)
        save_file({"x": before, "y": after}, part / WEIGHTS)

    words = {"version": 1, "samples": train + test, "points": SOLVED, "viscosity": viscosity, "T": T}
    found = load_file(made_once(folder_of("fields", "navier-stokes", words), make) / WEIGHTS)
    x, y = (spectral_resize(found[name], (resolution, resolution))[:, None] for name in ("x", "y"))
    return scaled(x[:train], y[:train], x[train:], y[train:])


def darcy() -> Pairs:
    """1,000 permeabilities and pressures at 16^2, 50 more to judge on."""
    found = load_darcy()
    return scaled(*(torch.from_numpy(each)[:, None] for split in ("train", "test") for each in found[split]))


def yours(file: str) -> Pairs:
    """x, y of an .npz file, [N, n], [N, n, n] or [N, channels, n, n] (or another axis); the last fifth is held out."""
    arrays = read_arrays(file, ["x", "y"])
    fields = []
    for name in ("x", "y"):
        array = arrays[name]
        if array.dtype.kind not in "fiu" or not 2 <= array.ndim <= 5 or len(array) < 5:
            raise ValueError(
                f"{file}: {name} is {array.dtype} of shape {array.shape}; expected numbers [N, n], [N, n, n] or [N, channels, n, n], N >= 5"
            )
        each = torch.from_numpy(array).float()
        each = each[:, None] if each.ndim in (2, 3) else each  # [N, n] and [N, n, n] have one channel
        check_fields(f"{file}: {name}", each, targets=name == "y")
        fields.append(each)
    x, y = fields
    if len(x) != len(y) or x.shape[2:] != y.shape[2:]:
        raise ValueError(f"{file}: x is {tuple(x.shape)} and y {tuple(y.shape)}; expected as many samples, at one resolution")
    cut = len(x) - max(1, len(x) // 5)
    return scaled(x[:cut], y[:cut], x[cut:], y[cut:])


# Training


@dataclass(frozen=True)
class Budget:
    """How long is trained: processor seconds, or epochs."""

    seconds: float = 0.0
    epochs: int = 0


class Fitted(NamedTuple):
    seconds: float  # processor seconds, the transform of the data included
    epochs: float


def one_cycle(share: float) -> float:
    """The rate's factor after a share of the budget: up from 1/25 to 1, then down to 0, both along a cosine."""
    if share < RISE:
        return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * share / RISE)) / 2
    return (1 + math.cos(math.pi * min(1.0, (share - RISE) / (1 - RISE)))) / 2


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    """|| found - wanted || / || wanted ||, mean over samples."""
    return ((found - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)).mean()


def _clock(pairs: Pairs) -> Callable[[], float]:
    """Processor time; beside a GPU the time that passes."""
    return time.process_time if pairs.x.device.type == "cpu" else time.perf_counter


def fit_t1(model: T1, pairs: Pairs, budget: Budget, seed: int, tell: Callable[[float, float], None] | None = None) -> Fitted:
    """Data to modes once, then steps on modes."""
    start = _clock(pairs)()
    data, loss = ModeDataset(pairs.x, pairs.y, model), ModeLoss()
    draw = torch.Generator().manual_seed(seed)
    return _fit(
        model,
        lambda: data.batches(BATCH, draw),
        lambda z, targets: loss(model.forward_modes(z), targets),
        len(data),
        budget,
        (_clock(pairs), start),
        tell,
    )


def fit_fno(model: FNO, pairs: Pairs, budget: Budget, seed: int, tell: Callable[[float, float], None] | None = None) -> Fitted:
    start = _clock(pairs)()
    draw = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(pairs.x), generator=draw).split(BATCH):
            yield pairs.x[rows], pairs.y[rows]

    return _fit(model, batches, lambda x, y: relative(model(x), y), len(pairs.x), budget, (_clock(pairs), start), tell)


def _fit(
    model: nn.Module, batches: Callable[[], Iterator[tuple[Any, Any]]], loss_of: Callable[[Any, Any], Tensor], samples: int, budget: Budget,
    since: tuple[Callable[[], float], float], tell: Callable[[float, float], None] | None,
) -> Fitted:  # fmt: skip
    """AdamW on one cycle, which runs over the time spent or the steps taken; ends within a step of the budget."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    clock, start = since
    total, step = budget.epochs * -(-samples // BATCH), 0
    while True:
        for batch in batches():
            spent = clock() - start
            share = step / total if budget.epochs else spent / budget.seconds
            if share >= 1:
                return Fitted(spent, step * BATCH / samples)
            optimizer.param_groups[0]["lr"] = RATE * one_cycle(share)
            loss = loss_of(*batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if tell is not None and step % 10 == 0:
                tell(share, loss.item())


@torch.no_grad()
def judged(model: nn.Module, pairs: Pairs) -> float:
    """The mean relative L2 error of the full fields held out."""
    found = torch.cat([model(x) for x in pairs.test_x.split(50)])
    return relative(found, pairs.test_y).item()
