"""How near frames are to frames: peak signal-to-noise ratio, structural similarity, and the losses of training."""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Frames that can be compared: uint8 0..255 as floats in [0, 1], floats as they are; ValueError where one fits not the other."""
    if a.shape != b.shape or a.ndim != 4 or not len(a):
        raise ValueError(f"frames are {list(a.shape)} and {list(b.shape)}; expected twice the same [T, C, H, W], T >= 1")
    for each in (a, b):
        if each.dtype != torch.uint8 and not each.is_floating_point():
            raise ValueError(f"frames are {each.dtype}; expected uint8, or floats in [0, 1]: convert them first")
    first, second = (each.float() / 255 if each.dtype == torch.uint8 else each for each in (a, b))
    return first, second


def frame_psnr(a: Tensor, b: Tensor) -> Float[Tensor, " T"]:
    """10 log10(1 / mean squared error) of each frame [T, 3, H, W], in dB."""
    a, b = _pair(a, b)
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).log10()


def psnr(a: Tensor, b: Tensor) -> float:
    """The mean PSNR of frames in dB; infinite where all are equal.

    Args:
        a, b: [T, 3, H, W], uint8 or floats in [0, 1].

    Raises:
        ValueError: the shapes differ, there is no frame, or frames are of another type.

    >>> round(psnr(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1)), 4)
    20.0
    """
    return float(frame_psnr(a, b).mean())


@functools.cache
def _window() -> Tensor:
    """The Gaussian window [11, 11], of sum 1."""
    line = torch.exp(-((torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    line = line / line.sum()
    return line[:, None] * line


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """The mean structural similarity over all 11 x 11 Gaussian windows (sigma 1.5) that lie inside, data range 1; it has gradients.

    Args:
        a, b: [T, C, H, W], uint8 or floats in [0, 1], H and W at least 11.

    Raises:
        ValueError: the frames are smaller than a window, or do not fit, as for `psnr`.

    >>> float(ssim(torch.ones(1, 3, 12, 12), torch.ones(1, 3, 12, 12)))
    1.0
    """
    a, b = _pair(a, b)
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(
            f"frames are {a.shape[-2]} x {a.shape[-1]}; expected at least {WINDOW} x {WINDOW}, a window of SSIM: use loss='mse'"
        )
    channels = a.shape[1]
    kernel = _window().to(a).expand(channels, 1, WINDOW, WINDOW)
    mean_a, mean_b, square_a, square_b, product = F.conv2d(torch.cat([a, b, a * a, b * b, a * b]), kernel, groups=channels).chunk(5)
    var_a, var_b, covariance = square_a - mean_a**2, square_b - mean_b**2, product - mean_a * mean_b
    return ((2 * mean_a * mean_b + C1) * (2 * covariance + C2) / ((mean_a**2 + mean_b**2 + C1) * (var_a + var_b + C2))).mean()


def ssim_loss(found: Tensor, true: Tensor) -> Tensor:
    """The paper's: 0.7 L1 + 0.3 (1 - SSIM)."""
    found, true = _pair(found, true)
    return 0.7 * F.l1_loss(found, true) + 0.3 * (1 - ssim(found, true))


def mse_loss(found: Tensor, true: Tensor) -> Tensor:
    """For frames so small that a window of SSIM says little: 0.7 L1 + 3 MSE (ours)."""
    found, true = _pair(found, true)
    return 0.7 * F.l1_loss(found, true) + 3 * F.mse_loss(found, true)


LOSSES = {"ssim": ssim_loss, "mse": mse_loss}


def learning_rate(lr: float, epoch: float, epochs: int, warm_up: float = 0.2) -> float:
    """lr (0.1 + 0.9 e / W) for the first W = 0.2 epochs of all, then down a cosine to 0; `epoch` may be a fraction.

    >>> [round(learning_rate(1.0, e, 100), 3) for e in (0, 20, 60, 100)]
    [0.1, 1.0, 0.5, 0.0]
    """
    warm = warm_up * epochs
    if epoch < warm:
        return lr * (0.1 + 0.9 * epoch / warm)
    return lr * 0.5 * (1 + math.cos(math.pi * (epoch - warm) / (epochs - warm)))
