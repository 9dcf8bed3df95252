"""neuralop's FNO, which is raced and which ours is checked against; and its weights, copied."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fewer.errors import MissingExtra
from fewer.signals.transform_once.fno import FNO

UNUSED = ("wandb", "zarr", "h5py", "torch_harmonics", "torch_harmonics.examples")  # neuralop 0.3 imports them for other parts than the FNO

INSTALL = "pip install --no-deps neuraloperator==0.3.0 && pip install tensorly tensorly-torch opt_einsum configmypy"


def neuralop_fno(n_modes: Sequence[int], hidden_channels: int, **words: Any) -> nn.Module:
    """`neuralop.models.FNO`; MissingExtra where neuralop (0.3.0, without what it needs for spheres and logging) is not installed."""
    return _neuralop().FNO(n_modes=tuple(n_modes), hidden_channels=hidden_channels, **words)


def _neuralop() -> Any:
    """neuralop's models, empty modules in place of what their package imports and never uses here."""
    if any(importlib.util.find_spec(name) is None for name in ("neuralop", "tltorch")):
        raise MissingExtra(f"neuralop is not installed; install it with: {INSTALL}")
    missing = {
        name for name in UNUSED if name.partition(".")[0] not in sys.modules and importlib.util.find_spec(name.partition(".")[0]) is None
    }
    sys.modules.update({name: _Empty(name) for name in missing})
    try:
        return importlib.import_module("neuralop").models
    finally:
        for name in missing:
            del sys.modules[name]


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@torch.no_grad()
def with_weights_of(peer: nn.Module, ours: FNO) -> FNO:
    """Our FNO with the weights of neuralop's."""
    theirs: Any = peer

    def point(mine: Any, conv: Any) -> None:
        mine.weight.copy_(conv.weight.flatten(1))
        if mine.bias is not None:
            mine.bias.copy_(conv.bias[:, None])

    for mine, conv in zip((ours.lifting[0], ours.lifting[2]), theirs.lifting.fcs, strict=True):  # pyright: ignore[reportIndexIssue]
        point(mine, conv)
    for mine, conv in zip((ours.projection[0], ours.projection[2]), theirs.projection.fcs, strict=True):
        point(mine, conv)
    for i, (spectral, skip) in enumerate(zip(ours.spectral, ours.skips, strict=True)):
        layer: Any = spectral
        point(skip, theirs.fno_blocks.fno_skips[i])
        tensor = theirs.fno_blocks.convs.weight[i].tensor  # [D_in, D_out, m...]
        layer.weight.copy_(
            torch.view_as_real(torch.view_as_complex(tensor) if not tensor.is_complex() else tensor).movedim((0, 1), (-3, -2))
        )
        layer.bias.copy_(theirs.fno_blocks.convs.bias[i])
    return ours
