"""Layers that compute with the entries of their weights whose scores are among the highest: linear, convolution, and Fourier operator.

The mask of a tensor is 1 where its score reaches the threshold that leaves the share `capacity` of its entries. Backward it is passed
over: a weight's gradient is g m, and a score's g w for every entry, so that an entry left out can come back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_choice, check_whole, is_number

Placement = Literal["centred", "released"]
Masks = Sequence[Tensor] | None


def check_capacity(capacity: float) -> None:
    if not is_number(capacity) or not 0 < capacity <= 1:
        raise ValueError(f"capacity is {capacity!r}; expected a share of the weights above 0 and up to 1")


def winning_mask(score: Tensor, capacity: float) -> Tensor:
    """True where a score is at least the k-th smallest, k = 1 + round((1 - c)(n - 1)); more than c n entries where scores tie.

    >>> winning_mask(torch.tensor([3.0, 1.0, 2.0, 4.0]), 0.5).tolist()
    [True, False, False, True]
    """
    return score >= kth_smallest(score.detach(), 1 + round((1 - capacity) * (score.numel() - 1)))


def kth_smallest(score: Tensor, k: int) -> Tensor | float:
    """The k-th smallest entry, in O(n): it is looked for in every tensor at every step."""
    if score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64):
        return float(np.partition(score.numpy().reshape(-1), k - 1)[k - 1])  # several times as quick as torch's
    return score.flatten().kthvalue(k).values


class _Winning(torch.autograd.Function):
    """The mask as numbers; its gradient is the score's (straight through)."""

    @staticmethod
    def forward(score: Tensor, capacity: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return winning_mask(score, capacity).to(score.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None


class Subnetwork(nn.Module):
    """Tensors of weights, each with a score for every entry.

    Args:
        shapes: of the tensors.
        capacity: the share c of each tensor that computes.
        absolute: a score is |rho| (else rho itself, as released for the Fourier operator).
        generator: draws weights and rho, both Kaiming uniform with a = sqrt 5.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], capacity: float, absolute: bool, generator: torch.Generator | None) -> None:
        super().__init__()
        check_capacity(capacity)
        self.capacity, self.absolute = capacity, absolute
        self.weights = nn.ParameterList([nn.Parameter(torch.empty(*shape)) for shape in shapes])
        self.rho = nn.ParameterList([nn.Parameter(torch.empty(*shape)) for shape in shapes])
        for each in self.weights:
            nn.init.kaiming_uniform_(each, a=math.sqrt(5), generator=generator)
        self.reset_scores(generator)

    def reset_scores(self, generator: torch.Generator | None = None) -> None:
        """Draw all scores anew."""
        for each in self.rho:
            nn.init.kaiming_uniform_(each, a=math.sqrt(5), generator=generator)

    def scores(self) -> list[Tensor]:
        return [each.abs() if self.absolute else each for each in self.rho]

    def masks(self) -> list[Tensor]:
        """The entries that compute now, bool, one of each tensor's shape."""
        with torch.no_grad():
            return [winning_mask(score, self.capacity) for score in self.scores()]

    def effective(self, masks: Masks = None) -> list[Tensor]:
        """The weights with 0 at every entry left out: by the masks given, or by the scores, which then get gradients."""
        if masks is None and self.capacity == 1:
            return list(self.weights)
        if masks is None:
            return [weight * _Winning.apply(score, self.capacity) for weight, score in zip(self.weights, self.scores(), strict=True)]  # pyright: ignore[reportOperatorIssue]
        return [torch.where(mask, weight, 0) for weight, mask in zip(self.weights, masks, strict=True)]

    def run(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """The layer's function with these weights."""
        raise NotImplementedError

    def forward(self, x: Tensor, masks: Masks = None) -> Tensor:
        """The layer of x with the entries of the masks, one bool tensor a weight; by default those of the highest scores."""
        return self.run(x, self.effective(masks))


class SubnetLinear(Subnetwork):
    """x [..., features] -> [..., out] by a masked matrix without bias.

    >>> layer = SubnetLinear(4, 3, capacity=0.5)
    >>> layer(torch.ones(2, 4)).shape, int(layer.masks()[0].sum())
    (torch.Size([2, 3]), 6)
    """

    def __init__(self, features: int, out: int, *, capacity: float = 0.5, generator: torch.Generator | None = None) -> None:
        check_whole(features=features, out=out)
        super().__init__([(out, features)], capacity, True, generator)

    def run(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        return F.linear(x, weights[0])


class SubnetConv2d(Subnetwork):
    """x [B, C, H, W] -> [B, C', r H, r W]: a masked 3 x 3 convolution to C' r^2 channels without bias, and PixelShuffle(r)."""

    def __init__(
        self, channels: int, out: int, stride: int = 1, *, capacity: float = 0.5, generator: torch.Generator | None = None
    ) -> None:
        check_whole(channels=channels, out=out, stride=stride)
        super().__init__([(out * stride**2, channels, 3, 3)], capacity, True, generator)
        self.stride = stride

    def run(self, x: Float[Tensor, "B C H W"], weights: Sequence[Tensor]) -> Tensor:
        return F.pixel_shuffle(F.conv2d(x, weights[0], padding=1), self.stride)


class FourierSubneuralOperator(Subnetwork):
    """x [B, C, H, W] -> [B, C', r H, r W]: masked weights on the lowest frequencies, zeros on all others, and a larger inverse transform.

    Four real tensors [C, C', M1, M2]: real and imaginary part for the rows 0..M1-1 of the spectrum and for its last M1 rows.

    Args:
        channels, out: C and C'.
        modes: (M1, M2), at least 1 and at most half of H and W.
        stride: r.
        capacity: the share of each tensor that computes.
        placement: where the negative row frequencies go in the larger spectrum: "centred" (ours) at its end, which is the band-limited
            interpolation; "released" where the code put them, in which they become positive ones.
        generator: draws weights and scores.

    Raises:
        ValueError: a mode below 1, a capacity outside (0, 1], or an input of fewer rows or columns than two modes.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        modes: tuple[int, int],
        stride: int = 1,
        *,
        capacity: float = 0.5,
        placement: Placement = "centred",
        generator: torch.Generator | None = None,
    ) -> None:
        check_whole(channels=channels, out=out, stride=stride)
        check_whole(optional=(), **{"modes[0]": modes[0], "modes[1]": modes[1]})
        check_choice(("centred", "released"), placement=placement)
        super().__init__([(channels, out, *modes)] * 4, capacity, False, generator)
        self.modes, self.stride, self.placement = (int(modes[0]), int(modes[1])), stride, placement

    def run(self, x: Float[Tensor, "B C H W"], weights: Sequence[Tensor]) -> Tensor:
        (rows, columns), (height, width) = self.modes, x.shape[-2:]
        if height < 2 * rows or width < 2 * columns:
            raise ValueError(f"x is {height} x {width}; expected at least {2 * rows} x {2 * columns}, two of each mode: take fewer modes")
        single = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # there is no transform of half precision
        spectrum = torch.fft.rfft2(single, norm="forward")
        parts = [each.to(single.dtype) for each in weights]
        low, high = torch.complex(parts[0], parts[1]), torch.complex(parts[2], parts[3])
        tall, wide = self.stride * height, self.stride * width
        larger = spectrum.new_zeros(*x.shape[:-3], low.shape[1], tall, wide // 2 + 1)
        larger[..., :rows, :columns] = _mixed(spectrum[..., :rows, :columns], low)
        start = (tall if self.placement == "centred" else height) - rows
        larger[..., start : start + rows, :columns] = _mixed(spectrum[..., height - rows : height, :columns], high)
        return torch.fft.irfft2(larger, s=(tall, wide), norm="forward").to(x.dtype)


def _mixed(spectrum: Tensor, weight: Tensor) -> Tensor:
    """Y[o] = sum over the channels c of X[c] W[c, o], mode by mode."""
    return torch.einsum("bchw,cohw->bohw", spectrum, weight)
