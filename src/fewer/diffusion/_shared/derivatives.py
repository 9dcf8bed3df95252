"""Derivatives of a network along a direction, by forward mode or, where torch has none of a layer, by differentiating twice backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["forward", "double-backward"]


def directional(function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...], mode: Mode) -> tuple[Tensor, Tensor]:
    """(f(at), its derivative along a direction).

    >>> value, slope = directional(torch.sin, (torch.zeros(1),), (torch.ones(1),), "double-backward")
    >>> value.item(), slope.item()
    (0.0, 1.0)
    """
    if mode == "forward":
        value, product, *_ = torch.func.jvp(function, at, along)
        return value, product
    with torch.enable_grad():  # the vector-Jacobian product is linear in its vector
        at = tuple(each.detach().requires_grad_() for each in at)
        value = function(*at)
        vector = torch.zeros_like(value, requires_grad=True)
        back = torch.autograd.grad(value, at, vector, create_graph=True, allow_unused=True)
        pairs = [(gradient, direction) for gradient, direction in zip(back, along, strict=True) if gradient is not None]
        (product,) = torch.autograd.grad([gradient for gradient, _ in pairs], [vector], [direction for _, direction in pairs])
    return value.detach(), product.detach()
