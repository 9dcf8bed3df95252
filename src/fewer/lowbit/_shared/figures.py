"""Figures of a cast: what noise it adds, how far a block's largest value stands out, and what is lost at either end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fewer.lowbit._shared.block_formats import BlockFormat
from fewer.lowbit._shared.blocks import checked_cast, checked_dim, cut, pieces, prepare
from fewer.lowbit._shared.formats import Rule, check_floating


@torch.no_grad()
def qsnr(x: Tensor, y: Tensor) -> float:
    """-10 log10(sum (x - y)^2 / sum x^2) in dB, sums in float64; inf where nothing is lost, NaN where x is zero.

    >>> round(qsnr(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 2)
    20.0
    """
    if x.shape != y.shape:
        raise ValueError(f"x is {tuple(x.shape)} and y {tuple(y.shape)}; expected equal shapes: compare a tensor with its own cast")
    noise = energy = 0.0
    for part, other in zip(x.reshape(-1).split(1 << 20), y.reshape(-1).split(1 << 20), strict=True):
        wide = part.double()
        energy += float(wide.square().sum())
        noise += float((wide - other.double()).square().sum())
    if energy == 0 or math.isnan(noise):
        return math.nan
    return math.inf if noise == 0 else -10 * math.log10(noise / energy)


@torch.no_grad()
def crest_factor(x: Tensor, block: int | None, dim: int = -1) -> Tensor:
    """max |x| / rms of each block: float64, from 1 to the root of the block's size; 0 for a block of zeros.

    >>> crest_factor(torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0]), 4)
    tensor([2., 1.], dtype=torch.float64)
    """
    check_floating(x)
    dim = checked_dim(x, dim)
    BlockFormat("int8", block, "fp32")
    if x.numel() == 0:
        return x.new_zeros(0, dtype=torch.float64)
    blocks = cut(x.double(), block, dim)
    counts = cut(x.new_ones(x.shape[dim], dtype=torch.float64), block, 0).sum(1) if block is not None else x.new_tensor([[x.numel()]])
    top = blocks.abs().amax(1)
    rows = top.shape[0] // counts.shape[0]
    energy = (blocks / torch.where(top > 0, top, 1.0)[:, None]).square_().sum(1)  # in units of the block's own maximum
    crest = (counts.repeat(rows, 1).double() / energy).sqrt()
    return torch.where(top > 0, crest, 0.0).reshape(-1)


def underflow(x: Tensor, y: Tensor) -> float:
    """The share of what is not zero in x that is zero in y, its cast.

    >>> underflow(torch.tensor([0.0, 0.1, 2.0]), torch.tensor([0.0, 0.0, 2.0]))
    0.5
    """
    there = x != 0
    return float(((y == 0) & there).sum() / there.sum().clamp(min=1))


@torch.no_grad()
def saturation(x: Tensor, fmt: str | BlockFormat, dim: int = -1, tensor_amax: Tensor | float | None = None) -> float:
    """The share of x that lies beyond its block's largest code.

    >>> saturation(torch.tensor([1.0, 2.0, 3.0, 7.5]), "mxfp4")
    0.25
    """
    fmt, dim = checked_cast(x, fmt, dim, Rule(), tensor_amax)
    if x.numel() == 0:
        return 0.0
    made = prepare(x.contiguous(), fmt, dim, Rule(), tensor_amax)
    step = made.steps()
    return sum(int((made.blocks[r, c].abs() > fmt.elements.max * step[r]).sum()) for r, c in pieces(made.blocks)) / x.numel()
