"""A user's images without labels, and what samples are judged in beside real ones: pixels, and what a classifier sees in digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.inputs import read_arrays
from fewer.tasks.digit_features import frechet_distance
from fewer.tasks.digits_diffusion import load_features

DIRECTIONS = 64  # principal ones of the images, in which samples are judged where there are more pixels
FEWEST = 200  # images of a user's own
Judge = Callable[[Tensor], Tensor]  # images -> rows that a Frechet distance is taken between


def read_own_images(file: str) -> Float[Tensor, "N C H W"]:
    """A user's images in [-1, 1]: x [N, H, W] or [N, C, H, W] of an .npz file, uint8 or floats in [-1, 1].

    Raises:
        FileNotFoundError, ValueError: a file that cannot be used.
    """
    x = read_arrays(file, ["x"])["x"]
    if x.ndim not in (3, 4) or len(x) < FEWEST or 0 in x.shape or not (x.dtype == "uint8" or x.dtype.kind == "f"):
        raise ValueError(
            f"{file}: x is {x.shape} {x.dtype}; expected images [N, H, W] or [N, C, H, W], N >= {FEWEST}, uint8 or floats in [-1, 1]"
        )
    images = torch.from_numpy(x).float()
    if x.dtype == "uint8":
        images = images / 127.5 - 1
    elif not bool((images.abs() <= 1).all()):  # NaN is not
        raise ValueError(f"{file}: x has values outside [-1, 1], or none; expected floats in [-1, 1], or uint8: scale them")
    return images if images.ndim == 4 else images.unsqueeze(1)


def split_fifth(images: Tensor) -> tuple[Tensor, Tensor]:
    """(training, held out: a fifth), drawn once for all."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[len(images) // 5 :]], images[order[: len(images) // 5]]


def judges_of(train: Float[Tensor, "N C H W"], digits: str = "") -> dict[str, Judge]:
    """Figure -> judge: pixels or their leading directions; of a kind of digits also what an independent classifier sees."""
    found: dict[str, Judge] = {"frechet": _pixels_of(train)}
    if digits:
        network = load_features(digits)
        found["frechet_features"] = lambda x: torch.cat([network.features(part) for part in x.float().split(1000)]).detach()
    return found


def _pixels_of(images: Tensor) -> Judge:
    if images[0].numel() <= DIRECTIONS:
        return lambda x: x.flatten(1).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        directions = torch.pca_lowrank(images.flatten(1).double(), DIRECTIONS)[2]
    return lambda x: x.flatten(1).double() @ directions


def floor_of(rows: Float[Tensor, "N F"]) -> float:
    """The Frechet distance of one half of real images, as they are judged, to the other: real images of half the number."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    half = len(rows) // 2
    return frechet_distance(rows[order[:half]], rows[order[half:]])
