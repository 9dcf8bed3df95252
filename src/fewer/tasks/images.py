"""Images to learn from, to tune on and to test on: one of the known sets, or a user's own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.data import load_cifar10, load_digits, load_fashion_mnist, load_mnist
from fewer.errors import UserError
from fewer.fitting import evaluating
from fewer.inputs import read_examples
from fewer.papers import did_you_mean

Pair = tuple[Tensor, Tensor]
LOADERS: dict[str, Callable[..., Any]] = {
    "mnist": load_mnist, "fashion-mnist": load_fashion_mnist, "cifar-10": load_cifar10, "digits": load_digits,
}  # fmt: skip
IMAGES_HELP = f"the images to learn: {', '.join(LOADERS)}, or FILE.npz with x [N, H, W] or [N, C, H, W] and y [N]"
BRIGHTEST = {"digits": 16.0}  # the highest pixel, where it is not 255
HELD_OUT, TENTH = 5, 10  # a fifth is the test split where a set has none; a tenth of the rest is for validation


@dataclass(frozen=True)
class ImageTask:
    """Normalised images [N, C, H, W] with their class numbers [N].

    Attributes:
        train, validation, test: (images, classes) each.
        classes: how many there are.
        name: the set's real name, such as "cifar-10-jpeg", or the user's file.
        beside: a user's further arrays, the rows of the training images.
    """

    train: Pair
    validation: Pair
    test: Pair
    classes: int
    name: str
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train[0].shape[1:]
        return channels, height, width


def image_task(
    data: str,
    *,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    side: int | None = None,
    normalise: tuple[float, float] | None = None,
    beside: Sequence[str] = (),
) -> ImageTask:
    """A known set or a user's file, split in three, its pixels normalised.

    Known sets keep their own test split; of a file (and of the digits, which have none) a fifth is held out. The order is shuffled once
    and for all, so that every arm and seed has the same split.

    Args:
        data: "mnist", "fashion-mnist", "cifar-10", "digits", or the path of an .npz file with x and y.
        train, test: at most so many images; None: all.
        validation: so many, but at most a fifth of the training split; None: a tenth of it.
        side: images are averaged down to so many pixels a side.
        normalise: (mean, deviation) of pixels from 0 to 1, for a known set; by default those of each channel over the training images.
        beside: further arrays of a user's file that are read where they are there.

    Raises:
        UserError: no such set or file, or what the file holds cannot be used.

    Examples:
        >>> task = image_task("digits", train=1000)
        >>> task.shape, task.classes, len(task.train[0]), len(task.test[0])
        ((1, 8, 8), 10, 1000, 359)
    """
    if data in LOADERS:
        x, y, held, classes, name, further = _known(data)
    else:
        x, y, held, classes, name, further = _own(data, beside)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).numpy()
    if held is None:
        order, judged = order[: -(len(x) // HELD_OUT)], order[-(len(x) // HELD_OUT) :]
        held = x[judged], y[judged]
    kept_back = max(1, min(validation if validation is not None else len(order) // TENTH, len(order) // HELD_OUT))
    rows = order[kept_back : None if train is None else kept_back + train]
    norm = _normaliser(_pixels(x[rows], data, side), normalise if data in LOADERS else None)

    def pair(x: np.ndarray, y: np.ndarray) -> Pair:
        return norm(_pixels(x, data, side)), torch.as_tensor(y)

    return ImageTask(
        pair(x[rows], y[rows]),
        pair(x[order[:kept_back]], y[order[:kept_back]]),
        pair(held[0][:test], held[1][:test]),
        classes,
        name,
        {name: array[rows] for name, array in further.items()},
    )


def _known(data: str) -> tuple[Any, Any, Any, int, str, dict[str, Any]]:
    if data == "digits":
        images = load_digits()
        return images.x, images.y, None, len(images.classes), images.name, {}
    images, held = LOADERS[data]("train"), LOADERS[data]("test")
    return images.x, images.y, (held.x, held.y), len(images.classes), images.name, {}


def _own(file: str, beside: Sequence[str]) -> tuple[Any, Any, Any, int, str, dict[str, Any]]:
    if not file.endswith(".npz") and not (file and Path(file).is_dir()):
        raise UserError(
            f"data is {file!r}; expected one of {', '.join(LOADERS)}{did_you_mean(file, list(LOADERS))}, or the path of an .npz file, or of a folder of them"
        )
    try:
        arrays = read_examples(file, beside)
    except (OSError, ValueError) as mistake:
        raise UserError(str(mistake)) from mistake
    x, y, classes = arrays["x"], arrays["y"], int(arrays["y"].max()) + 1
    if x.ndim not in (3, 4):
        raise UserError(f"{file}: x is {x.shape}; expected images [N, H, W] or [N, C, H, W]: reshape it")
    if x.ndim == 4 and x.shape[1] > 4 and x.shape[3] <= 4:
        raise UserError(f"{file}: x is {x.shape}, which looks like channels last; expected [N, C, H, W]: write x.transpose(0, 3, 1, 2)")
    if len(x) < TENTH or classes < 2:
        raise UserError(f"{file}: {len(x)} images of {classes} classes; expected at least {TENTH} of at least 2: add some")
    return x, y, None, classes, file, {name: arrays[name] for name in beside if name in arrays}


def _pixels(x: np.ndarray, data: str, side: int | None) -> Float[Tensor, "N C H W"]:
    """Floats, from 0 to 1 where they were bytes, at most `side` pixels a side."""
    pixels = torch.as_tensor(x).float()
    if x.dtype.kind != "f":
        pixels = pixels / BRIGHTEST.get(data, 255.0)
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels
    return F.adaptive_avg_pool2d(pixels, side) if side is not None and min(pixels.shape[2:]) > side else pixels


def _normaliser(train: Tensor, given: tuple[float, float] | None) -> Callable[[Tensor], Tensor]:
    """(x - mean) / deviation, of each channel over the training images unless both are given."""
    if given is not None:
        return lambda x: (x - given[0]) / given[1]
    deviation, mean = torch.std_mean(train, dim=(0, 2, 3), keepdim=True, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)  # a channel that is the same everywhere
    return lambda x: (x - mean) / deviation


def accuracy(model: Callable[[Tensor], Tensor], data: Pair, batch: int = 500) -> float:
    """The fraction of images whose highest score is their class's; a module is in eval mode meanwhile.

    Examples:
        >>> accuracy(lambda x: x.flatten(1), (torch.eye(3).view(3, 1, 1, 3), torch.tensor([0, 1, 0])))
        0.6666666865348816
    """
    with torch.no_grad(), evaluating(*[model] if isinstance(model, nn.Module) else []):
        right = [(model(x).argmax(1) == y).float() for x, y in zip(data[0].split(batch), data[1].split(batch), strict=True)]
    return float(torch.cat(right).mean())
