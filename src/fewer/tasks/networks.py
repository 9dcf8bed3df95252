"""The small networks that studies of images train: a multilayer perceptron, a convolutional net, ResNet-20 and ResNet-18.

Each takes the shape of an image (channels, height, width) and the number of classes, then its widths. `norm` makes a layer's normalisation
from its channels: `nn.BatchNorm2d`, or `functools.partial(nn.GroupNorm, 4)` where batches must not meet (federated clients).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.checks import check_whole

Shape = tuple[int, int, int]
Norm = Callable[[int], nn.Module]
BLOCKS_20, BLOCKS_18 = 3, 2  # residual blocks a stage


def mlp(shape: Sequence[int], classes: int = 10, widths: Sequence[int] = (256, 256)) -> nn.Sequential:
    """Hidden layers (linear, ReLU) and a linear output layer, on flattened examples.

    Examples:
        >>> mlp((1, 8, 8), 10, (32, 16))(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    sizes = [torch.Size(shape).numel(), *widths]
    named: dict[str, Any] = {f"widths[{place}]": width for place, width in enumerate(widths)}
    check_whole(**named, classes=classes)
    hidden = [part for into, out in itertools.pairwise(sizes) for part in (nn.Linear(into, out), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))


def conv_net(
    shape: Shape,
    classes: int = 10,
    widths: Sequence[int] = (32, 64),
    *,
    norm: Norm | None = None,
    strides: Sequence[int] | None = None,
    pools: Sequence[int] | None = None,
) -> nn.Sequential:
    """3x3 convolutions (each: convolution, norm, ReLU, maximum) and a linear output layer.

    Args:
        shape: of an image (channels, height, width).
        classes: how many.
        widths: channels of the convolutions.
        norm: of the channels of a convolution; None: none.
        strides: of the convolutions, one each; by default each halves the image.
        pools: sides of the squares whose maximum is taken, one each; 1: none.

    Raises:
        ValueError: the image is too small for so many halvings, or `strides` or `pools` are not as many as the widths.

    Examples:
        >>> net = conv_net((1, 28, 28), 10, (16, 32, 56, 64), strides=(2, 1, 1, 1), pools=(1, 2, 1, 2))
        >>> sum(parameter.numel() for parameter in net.parameters())
        59074
        >>> from functools import partial
        >>> net = conv_net((1, 14, 14), norm=partial(nn.GroupNorm, 4))
        >>> sum(parameter.numel() for parameter in net.parameters())
        29258
    """
    strides, pools = strides or [2] * len(widths), pools or [1] * len(widths)
    if not len(widths) == len(strides) == len(pools):
        raise ValueError(f"{len(widths)} widths, {len(strides)} strides and {len(pools)} pools; expected one each a convolution")
    (into, *sides), layers = shape, list[nn.Module]()
    for out, stride, pool in zip(widths, strides, pools, strict=True):
        layers += [nn.Conv2d(into, out, 3, stride, 1), *([norm(out)] if norm else []), nn.ReLU()]
        layers += [nn.MaxPool2d(pool)] if pool > 1 else []
        into, sides = out, [-(-side // stride) // pool for side in sides]
    if min(sides) < 1:
        raise ValueError(f"images of {shape[1]} x {shape[2]} pixels are too small for these convolutions; expected larger ones, or fewer")
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(into * sides[0] * sides[1], classes))


class EmptyChannels(nn.Module):
    """A shortcut without weights: drops rows and columns, adds channels of zeros (He et al. 2016, option A)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, out - into

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D h w"]:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each followed by its norm, beside a shortcut."""

    def __init__(self, into: int, out: int, stride: int, norm: Norm, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), norm(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), norm(out)
        self.shortcut = shortcut

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D h w"]:
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def resnet20(
    shape: Shape, classes: int = 10, widths: Sequence[int] = (16, 32, 64), *, norm: Norm = nn.BatchNorm2d, stem_stride: int = 1
) -> nn.Sequential:
    """ResNet-20 for small images: a convolution, three stages of three blocks whose shortcuts have no weights, a linear layer.

    Examples:
        >>> sum(parameter.numel() for parameter in resnet20((1, 28, 28), 10, (4, 8, 16)).parameters())
        17254
    """
    return _resnet(shape, classes, widths, BLOCKS_20, norm, stem_stride, EmptyChannels)


def resnet18(
    shape: Shape,
    classes: int = 10,
    widths: Sequence[int] = (64, 128, 256, 512),
    *,
    norm: Norm = nn.BatchNorm2d,
    stem_stride: int = 1,
) -> nn.Sequential:
    """ResNet-18 for small images: a 3x3 convolution, four stages of two blocks whose shortcuts are 1x1 convolutions, a linear layer.

    Examples:
        >>> sum(parameter.numel() for parameter in resnet18((3, 32, 32)).parameters())
        11173962
    """

    def shortcut(into: int, out: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), norm(out))

    return _resnet(shape, classes, widths, BLOCKS_18, norm, stem_stride, shortcut)


def _resnet(
    shape: Shape,
    classes: int,
    widths: Sequence[int],
    blocks: int,
    norm: Norm,
    stem_stride: int,
    shortcut: Callable[[int, int, int], nn.Module],
) -> nn.Sequential:
    """A stem, stages of blocks (all but the first stage halve the image), the mean over pixels, a linear layer."""
    into = widths[0]
    layers: list[nn.Module] = [nn.Conv2d(shape[0], into, 3, stem_stride, 1, bias=False), norm(into), nn.ReLU()]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            plain = stride == 1 and into == width
            layers.append(ResidualBlock(into, width, stride, norm, nn.Identity() if plain else shortcut(into, width, stride)))
            into = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(into, classes))
