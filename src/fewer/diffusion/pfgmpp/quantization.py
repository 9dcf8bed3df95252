"""Weights on a grid of few values, for the protocol that asks how much of it a sampler bears."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fewer.checks import check_whole

MOST_BITS = 16
Module = TypeVar("Module", bound=nn.Module)


def words_of(name: str) -> str:
    """Its words and numbers between dots: ".blocks.0.norm.1." of "blocks.0.norm_1"."""
    return f".{'.'.join(re.findall('[a-z]+|[0-9]+', name.lower()))}."


def affine_grid(w: Tensor, bits: int) -> tuple[float, float]:
    """(scale, zero) of a tensor's own grid scale (k - zero), k = 0 ... 2^bits - 1; scale 0 for a constant one."""
    low, high, last = float(w.min()), float(w.max()), 2**bits - 1
    scale = (high - low) / last
    return scale, float(int(min(max(-low / scale, 0.0), last))) if scale else 0.0


def to_grid(w: Tensor, scale: float, zero: float, bits: int) -> Tensor:
    """Each weight's nearest value of the grid."""
    if not scale:
        return w
    q = (zero + w.double() / scale).clamp(0, 2**bits - 1).round()
    return (scale * (q - zero)).to(w.dtype)


@torch.no_grad()
def quantize_weights(module: Module, bits: int, skip: Sequence[str] = ("norm", "noise")) -> Module:
    """A copy whose weights lie on grids of 2^bits values, one a tensor, without training (the paper's protocol of robustness).

    Args:
        module: any; it stays as it is.
        bits: 1 to 16.
        skip: a word of a name ("norm" of `blocks.0.norm_1`), or several that stand together ("time_embedding"), whose parameters stay
            as they are: norms and the embedding of the noise level. Only what is called `weight` and has two dimensions or more is put on
            a grid; biases, buffers and other norms stay.

    Raises:
        ValueError: other bits, a skip that is one string, weights that are not finite, or no weight that is put on a grid.

    Examples:
        >>> layer = nn.Linear(1, 4)
        >>> len(quantize_weights(layer, 2).weight.unique()) <= 4
        True
    """
    check_whole(bits=bits)
    if bits > MOST_BITS:
        raise ValueError(f"bits is {bits}; expected at most {MOST_BITS}")
    if isinstance(skip, str):
        raise ValueError(f"skip is {skip!r}; expected several strings: ({skip!r},)")
    made, skipped = copy.deepcopy(module), [words_of(each) for each in skip]
    chosen = {
        name: each for name, each in made.named_parameters() if name.rpartition(".")[2] == "weight" and each.ndim >= 2 and each.numel()
    }
    chosen = {name: each for name, each in chosen.items() if not any(each in words_of(name) for each in skipped)}
    if not chosen:
        raise ValueError(f"no weight of {type(module).__name__} is put on a grid (skip is {tuple(skip)}); expected one: skip less")
    for name, parameter in chosen.items():
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{name} is not finite; expected trained weights")
        parameter.copy_(to_grid(parameter, *affine_grid(parameter.double(), bits), bits))
    return made
