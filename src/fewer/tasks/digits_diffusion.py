"""Diffusion models of digits, trained on the spot on real images, with exact references to hold samplers against."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.data import load_digits, load_mnist
from fewer.data.fetching import cache_folder
from fewer.data.made_once import WEIGHTS, folder_of, made_once
from fewer.devices import one_thread
from fewer.errors import UserError
from fewer.tasks.digit_denoiser import DenoiserRecipe, DigitDenoiser, train_denoiser
from fewer.tasks.digit_features import DigitFeatures, train_features
from fewer.tasks.digit_sampling import Denoise, unipc
from fewer.tasks.tile_denoiser import TileDenoiser, TileRecipe, train_tiles

VERSION = 1  # of all that is not in the recipe: raise it when the code trains another model from the same settings
DIGITS_FOR_TRAINING = 1400  # of scikit-learn's 1,797

RECIPES = {
    "digits8": DenoiserRecipe(side=8, width=256, ema=0.995),
    "mnist16": DenoiserRecipe(side=16, width=512, classes=10),  # 2.07 million parameters
    "mnist28": DenoiserRecipe(side=28, width=768, classes=10, steps=6000),
    "mnist_tiles": TileRecipe(),  # 458,000 parameters; its images have 32 x 32 pixels, twice the side that it was trained on
}


class Schedule(Protocol):
    """A noise schedule over a continuous time t: x_t = alpha x_0 + sigma noise; `time` says which t a network's time step stands for."""

    def time(self, timestep: Tensor | float) -> Tensor: ...
    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class EpsilonOutput:
    """What a call of the model as a noise predictor gives, as diffusers' models do."""

    sample: Tensor


class EpsilonModel(nn.Module):
    """The denoiser as a noise predictor on a schedule, called as `UNet2DModel` is: `model(sample, timestep, class_labels).sample`."""

    def __init__(self, denoiser: nn.Module, schedule: Schedule, side: int) -> None:
        super().__init__()
        self.denoiser, self.schedule, self.in_channels, self.sample_size = denoiser, schedule, 1, side

    def forward(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None) -> EpsilonOutput:
        t = self.schedule.time(timestep)
        alpha, sigma = (value.to(sample) for value in (self.schedule.alpha(t), self.schedule.sigma(t)))
        if alpha.ndim:
            alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in (alpha, sigma))
        clean = self.denoiser(sample / alpha, (sigma / alpha).flatten() if alpha.ndim else sigma / alpha, class_labels)
        return EpsilonOutput((sample - alpha * clean) / sigma)


@dataclass(frozen=True)
class DigitsDiffusion:
    """A diffusion model of digits and what belongs to it.

    Attributes:
        kind: one of `RECIPES`.
        denoiser: D(x [B, 1, side, side], sigma, label [B] or None), x = clean + sigma * noise; of "mnist_tiles" a `TileDenoiser`, which
            takes more and any size.
        folder: where it is kept.
    """

    kind: str
    denoiser: DigitDenoiser | TileDenoiser
    folder: Path

    @property
    def recipe(self) -> DenoiserRecipe:
        return RECIPES[self.kind]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        side = self.recipe.side * (2 if self.kind == "mnist_tiles" else 1)
        return (1, side, side)

    def data(self, split: str) -> tuple[Tensor, Tensor]:
        """(images [N, 1, side, side] in [-1, 1], labels [N]) of "train" or "test"; the test images were not trained on."""
        return digit_images(self.kind, split)

    def epsilon(self, schedule: Schedule) -> EpsilonModel:
        """The model as a noise predictor on a schedule."""
        return EpsilonModel(self.denoiser, schedule, self.shape[-1])

    def guided(self, scale: float, label: Tensor) -> Denoise:
        """D with classifier-free guidance towards labels [B]: no label's answer plus `scale` times the way to the label's. Two calls in one."""
        if not self.recipe.classes:
            raise ValueError(f"{self.kind} knows no labels; guidance expects mnist16 or mnist28")

        def denoise(x: Tensor, sigma: Tensor | float) -> Tensor:
            both = torch.cat([torch.full_like(label, -1), label])
            plain, conditional = self.denoiser(x.repeat(2, 1, 1, 1), sigma, both).chunk(2)
            return plain + scale * (conditional - plain)

        return denoise

    def reference(self, x: Tensor, scale: float | None = None, label: Tensor | None = None) -> Tensor:
        """Where noises x [B, 1, side, side] of deviation 80 end at 0.02: 300 steps of diffusers' UniPC, kept on disk.

        Without `scale` the label (or none) is given as it is; with it the model is guided.

        Raises:
            ValueError: "mnist_tiles", which has no trajectory to be judged by at the size of its images.
        """
        if self.kind == "mnist_tiles":
            raise ValueError("mnist_tiles has no reference; expected another kind: it was never trained at the size of its images")
        given = [x.numpy().tobytes(), repr(scale).encode(), b"" if label is None else label.numpy().tobytes()]
        key = hashlib.sha256(b"\0".join([self.folder.name.encode(), *given])).hexdigest()[:16]

        def make(folder: Path) -> None:
            from safetensors.torch import save_file

            denoise = self.guided(scale, _needed(label)) if scale is not None else lambda x, sigma: self.denoiser(x, sigma, label)
            save_file({"x": unipc(denoise, x)}, folder / WEIGHTS)

        from safetensors.torch import load_file

        return load_file(made_once(cache_folder() / "digits-diffusion-references" / key, make) / WEIGHTS)["x"]

    @cached_property
    def _features(self) -> DigitFeatures:
        return load_features(self.kind)

    def features(self, x: Tensor) -> Tensor:
        """What an independently trained classifier sees in images [B, 1, side, side]: [B, 64], for Frechet distances."""
        judge = self._features
        with torch.no_grad():
            return torch.cat([judge.features(part) for part in x.float().split(1000)])


def _needed(label: Tensor | None) -> Tensor:
    if label is None:
        raise ValueError("guidance needs labels; give label=[B]")
    return label


def load_digits_diffusion(kind: str = "mnist16", tell: Callable[[int, int, str], None] | None = None) -> DigitsDiffusion:
    """The diffusion model of a kind; trained first where it is not there yet (mnist16: about 80 s on two idle cores).

    Raises:
        UserError: an unknown kind.
        DataUnavailable: the images can be had from nowhere.
    """
    if kind not in RECIPES:
        raise UserError(f"no kind {kind!r}; expected one of {', '.join(RECIPES)}")
    from safetensors.torch import load_file, save_file

    images, labels = digit_images(kind, "train")
    recipe = RECIPES[kind]

    def make(folder: Path) -> None:
        said = tell or (lambda step, steps, words: None)
        if isinstance(recipe, TileRecipe):
            with one_thread():  # small convolutions: two threads that share a machine are slower than one
                model = train_tiles(recipe, images, labels, said)
        else:
            model = train_denoiser(recipe, images, labels, said)
        save_file(model.state_dict(), folder / WEIGHTS)

    folder = made_once(folder_of("digits-diffusion", kind, _what(recipe, images)), make)
    denoiser = TileDenoiser(recipe) if isinstance(recipe, TileRecipe) else DigitDenoiser(recipe)
    denoiser.load_state_dict(load_file(folder / WEIGHTS))
    return DigitsDiffusion(kind, denoiser.eval().requires_grad_(False), folder)


def load_features(kind: str) -> DigitFeatures:
    """The classifier whose features judge images of a kind; trained first where it is not there yet (some seconds)."""
    from safetensors.torch import load_file, save_file

    images, labels = digit_images(kind, "train")

    def make(folder: Path) -> None:
        save_file(train_features(images, labels).state_dict(), folder / WEIGHTS)

    folder = made_once(folder_of("digits-features", kind, _what(None, images)), make)
    features = DigitFeatures(images.shape[-1])
    features.load_state_dict(load_file(folder / WEIGHTS))
    return features.eval().requires_grad_(False)


def _what(recipe: DenoiserRecipe | None, images: Tensor) -> dict[str, Any]:
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return {"version": VERSION, "recipe": asdict(recipe) if recipe else None, "images": digest}


def digit_images(kind: str, split: str) -> tuple[Tensor, Tensor]:
    """(images [N, 1, side, side] in [-1, 1], labels int64 [N]).

    digits8 are scikit-learn's, 1,400 for training and 397 for test; mnist28 is MNIST; mnist16 is MNIST with a margin of two pixels, each
    square of four pixels averaged; mnist_tiles is MNIST with that margin.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    if kind == "digits8":
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.x))
        rows = order[:DIGITS_FOR_TRAINING] if split == "train" else order[DIGITS_FOR_TRAINING:]
        return torch.from_numpy(digits.x[rows]).float().div(8).sub(1).unsqueeze(1), torch.from_numpy(digits.y[rows])
    images = load_mnist("train" if split == "train" else "test")
    pixels = torch.from_numpy(images.x).float().div(127.5).sub(1).unsqueeze(1)
    if kind in ("mnist16", "mnist_tiles"):
        pixels = F.pad(pixels, (2, 2, 2, 2), value=-1.0)
    if kind == "mnist16":
        pixels = F.avg_pool2d(pixels, 2)
    return pixels, torch.from_numpy(images.y)
