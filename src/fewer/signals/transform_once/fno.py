"""The Fourier Neural Operator, which T1 replaces: to frequency and back in every layer, as neuralop 0.3 computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_choice, check_whole
from fewer.signals.transform_once.model import vp_std
from fewer.signals.transform_once.transforms import at_least_single

INITS = ("neuralop", "naive", "vp")


class SpectralConv(nn.Module):
    """rfft, a complex D x D matrix for each kept mode, irfft.

    Weights [m_1, ..., m_d/2 + 1, D_in, D_out], modes of the leading axes from -m/2 to m/2 - 1; one product of matrices a mode.
    """

    def __init__(self, n_modes: Sequence[int], channels: int, std: float) -> None:
        super().__init__()
        self.n_modes = (*n_modes[:-1], n_modes[-1] // 2 + 1)
        self.weight = nn.Parameter(std * torch.randn(*self.n_modes, channels, channels, 2))
        self.bias = nn.Parameter(torch.zeros(channels, *[1] * len(n_modes)))

    def forward(self, x: Float[Tensor, "B D n"]) -> Float[Tensor, "B D n"]:
        points, dims, given = x.shape[2:], tuple(range(2, x.ndim)), x.dtype
        x, parameters = at_least_single(x), at_least_single(self.weight)
        kept = [min(m, size) for m, size in zip(self.n_modes, (*points[:-1], points[-1] // 2 + 1), strict=True)]
        spectrum = torch.fft.rfftn(x, dim=dims).narrow(-1, 0, kept[-1])
        weight = torch.view_as_complex(parameters).narrow(len(kept) - 1, 0, kept[-1])
        for axis, (m, n, size) in enumerate(zip(kept[:-1], points[:-1], self.n_modes[:-1], strict=True)):
            parts = spectrum.narrow(axis + 2, n - m // 2, m // 2), spectrum.narrow(axis + 2, 0, m - m // 2)
            spectrum = torch.cat(parts, axis + 2)  # slices, whose backward pass is quicker than an index's
            weight = weight.narrow(axis, (size - m) // 2, m)
        mixed = (spectrum.movedim((0, 1), (-2, -1)) @ weight).movedim((-2, -1), (0, 1))
        for axis, (m, n) in enumerate(zip(kept[:-1], points[:-1], strict=True)):
            below, above = mixed.split([m // 2, m - m // 2], axis + 2)
            gap = mixed.new_zeros([n - m if i == axis + 2 else size for i, size in enumerate(mixed.shape)])
            mixed = torch.cat([above, gap, below], axis + 2)
        return torch.fft.irfftn(mixed, s=points, dim=dims).to(given) + self.bias  # missing bins of the last axis are zeros


class Pointwise(nn.Module):
    """A linear map of channels at every point, as one product of matrices: quicker on a CPU than a convolution of one tap."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs, 1).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Float[Tensor, "B c n"]) -> Float[Tensor, "B o n"]:
        flat = x.flatten(2)
        weight = self.weight.expand(len(x), -1, -1)
        y = torch.bmm(weight, flat) if self.bias is None else torch.baddbmm(self.bias, weight, flat)
        return y.unflatten(2, x.shape[2:])


class FNO(nn.Module):
    """The baseline, with neuralop's conventions: `n_modes` counts both signs, channels first.

    Args:
        n_modes: modes of each axis, even numbers (16 are -8 to 7; of the last axis, half and one).
        hidden_channels: D.
        in_channels, out_channels: of the fields.
        n_layers: L.
        lifting_channels, projection_channels: hidden widths of the pointwise maps before and after; None lifts by one map.
        init: "neuralop" (sqrt(2 / 2D)), "naive" (1 / D^2) or "vp" (variance-preserving, of `resolution`).
        resolution: for "vp".
        positional_embedding: whether coordinates are input channels.

    Examples:
        >>> FNO((8, 8), 4)(torch.randn(2, 1, 16, 16)).shape
        torch.Size([2, 1, 16, 16])
    """

    def __init__(
        self, n_modes: Sequence[int], hidden_channels: int, in_channels: int = 1, out_channels: int = 1, n_layers: int = 4, *,
        lifting_channels: int | None = 256, projection_channels: int = 256, init: Literal["neuralop", "naive", "vp"] = "neuralop",
        resolution: Sequence[int] | None = None, positional_embedding: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice(INITS, init=init)
        check_whole(hidden_channels=hidden_channels, in_channels=in_channels, out_channels=out_channels, n_layers=n_layers)
        check_whole(optional=(), **{f"n_modes[{i}]": m for i, m in enumerate(n_modes)})
        if init == "vp" and resolution is None:
            raise ValueError("init is 'vp' and resolution None; expected the fields' resolution: it says how much variance is cut away")
        axes, width = len(n_modes), hidden_channels
        stds = {"neuralop": 1 / math.sqrt(width), "naive": 1 / width**2}
        std = vp_std(tuple(resolution or ()), tuple(n_modes), width, transform="rfft") if init == "vp" else stds[init] / math.sqrt(2)
        self.positional_embedding, self.axes, self.in_channels = positional_embedding, axes, in_channels
        inputs = in_channels + (axes if positional_embedding else 0)
        self.lifting = (
            nn.Sequential(Pointwise(inputs, lifting_channels), nn.GELU(), Pointwise(lifting_channels, width))
            if lifting_channels
            else Pointwise(inputs, width)
        )
        self.spectral = nn.ModuleList(SpectralConv(n_modes, width, std) for _ in range(n_layers))
        self.skips = nn.ModuleList(Pointwise(width, width, bias=False) for _ in range(n_layers))
        self.projection = nn.Sequential(Pointwise(width, projection_channels), nn.GELU(), Pointwise(projection_channels, out_channels))

    def forward(self, x: Float[Tensor, "B c n"]) -> Float[Tensor, "B c n"]:
        if x.ndim != self.axes + 2 or x.shape[1] != self.in_channels or not x.dtype.is_floating_point:
            raise ValueError(
                f"x is {x.dtype} of shape {tuple(x.shape)}; expected real fields [B, {self.in_channels}] and {self.axes} axes, as many as n_modes"
            )
        if self.positional_embedding:
            grids = torch.meshgrid(*(torch.linspace(0, 1, n, dtype=x.dtype, device=x.device) for n in x.shape[2:]), indexing="ij")
            x = torch.cat([x, torch.stack(grids).expand(len(x), -1, *x.shape[2:])], 1)
        x = self.lifting(x)
        for i, (spectral, skip) in enumerate(zip(self.spectral, self.skips, strict=True)):
            x = spectral(x) + skip(x)
            x = F.gelu(x) if i < len(self.spectral) - 1 else x
        return self.projection(x)
