"""What the study straightens: the digits' diffusion model, or one trained once on a user's images; its pairs and features are made once too."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.data import WEIGHTS, folder_of, made_once
from fewer.diffusion.rectified_flow_plus.pairs import EDMSampler, PairDataset, generate_pairs
from fewer.diffusion.rectified_flow_plus.premetric import FeatureDistance, classifier_distance, digit_classifier, of_classifier
from fewer.diffusion.rectified_flow_plus.velocity import VelocityFromEDM
from fewer.files import model_digest
from fewer.inputs import read_examples
from fewer.tasks import load_digits_diffusion
from fewer.tasks.digit_denoiser import DenoiserRecipe, DigitDenoiser, train_denoiser
from fewer.tasks.digit_features import DigitFeatures, train_features
from fewer.tasks.digits_diffusion import load_features

SAMPLER = EDMSampler(steps=18, sigma_min=0.02, sigma_max=20.0)
SIGMA_MAX = 80.0  # of the noise levels that teachers here are trained on
LARGEST_SIDE, CLASSES = 16, 10  # of a user's images; what judges them knows ten classes
VERSION = 1


@dataclass(frozen=True)
class Task:
    """A teacher and what belongs to it.

    Attributes:
        recipe: of the teacher's network.
        images: real ones [N, 1, side, side] in [-1, 1]; test: held out from all training.
        distance: what premetrics look at; judge: features of another classifier, which look at samples.
    """

    teacher: VelocityFromEDM
    recipe: DenoiserRecipe
    pairs: PairDataset
    distance: FeatureDistance
    images: Tensor
    test: Tensor
    judge: DigitFeatures

    def scratch(self, seed: int) -> VelocityFromEDM:
        """The teacher's network with random weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return VelocityFromEDM(DigitDenoiser(self.recipe), SIGMA_MAX)

    @torch.no_grad()
    def features(self, x: Tensor, space: str) -> Tensor:
        """Of images, what Frechet distances are taken of: their "pixels", or the judge's "features"."""
        return x.flatten(1) if space == "pixels" else torch.cat([self.judge.features(part) for part in x.float().split(1000)])


def of_digits(kind: str, pairs: int) -> Task:
    """The digits' diffusion model."""
    digits = load_digits_diffusion(kind)
    images, labels = digits.data("train")
    return _task(digits.denoiser, digits.recipe, load_features(kind), images, labels, digits.data("test")[0], pairs)


def of_file(file: str, pairs: int) -> Task:
    """A user's images, grey and at most 16 pixels a side; the last fifth is held out.

    Raises:
        FileNotFoundError, ValueError: what the file holds cannot be used.
    """
    arrays = read_examples(file)
    x, y = torch.from_numpy(arrays["x"]).float(), torch.from_numpy(arrays["y"])
    if x.ndim not in (3, 4) or len(x) < 50 or int(y.max()) >= CLASSES or float(x.max()) == float(x.min()):
        raise ValueError(
            f"{file}: x is {tuple(x.shape)} from {float(x.min()):g} to {float(x.max()):g}, y up to {int(y.max())}; expected at least 50 images "
            f"[N, H, W] or [N, C, H, W] that are not all one colour, of at most {CLASSES} classes: put classes together, or add images"
        )
    grey = x[:, None] if x.ndim == 3 else x.mean(1, keepdim=True)
    side = min(*grey.shape[2:], LARGEST_SIDE)
    images = F.adaptive_avg_pool2d((grey - x.min()) / (x.max() - x.min()) * 2 - 1, side)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels, held = images[order], y[order], len(images) // 5
    train, recipe = images[:-held], DenoiserRecipe(side=side, width=256, ema=0.995)

    def make(folder: Path) -> None:
        denoiser, judge = train_denoiser(recipe, train, labels[:-held], lambda *_: None), train_features(train, labels[:-held])
        parts = {"denoiser": denoiser, "judge": judge}
        save_file({f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}, folder / WEIGHTS)

    what = {"version": VERSION, "recipe": asdict(recipe), "images": _digest(train), "labels": _digest(labels[:-held])}
    read = load_file(made_once(folder_of("reflow-teachers", "own", what), make) / WEIGHTS)
    denoiser, judge = DigitDenoiser(recipe), DigitFeatures(side)
    for name, part in (("denoiser.", denoiser), ("judge.", judge)):
        part.load_state_dict({key.removeprefix(name): value for key, value in read.items() if key.startswith(name)})
        part.eval().requires_grad_(False)
    return _task(denoiser, recipe, judge, train, labels[:-held], images[-held:], pairs)


def _task(
    denoiser: nn.Module, recipe: DenoiserRecipe, judge: DigitFeatures, images: Tensor, labels: Tensor, test: Tensor, pairs: int
) -> Task:
    teacher, shape = VelocityFromEDM(denoiser, SIGMA_MAX).eval(), tuple(images.shape[1:])

    def make(folder: Path) -> None:
        generate_pairs(teacher, pairs, SAMPLER, folder / "pairs", shape)
        save_file(classifier_distance(images, labels).backbone.state_dict(), folder / WEIGHTS)

    what: dict[str, Any] = {"version": VERSION, "teacher": model_digest(denoiser), "sampler": repr(SAMPLER), "pairs": pairs}
    digests = {"images": _digest(images), "labels": _digest(labels)}
    folder = made_once(folder_of("reflow", f"side{recipe.side}", what | digests), make)
    classifier = digit_classifier(shape, int(labels.max()) + 1)
    classifier.load_state_dict(load_file(folder / WEIGHTS))
    return Task(teacher, recipe, PairDataset.open(folder / "pairs"), of_classifier(classifier), images, test, judge)


def _digest(x: Tensor) -> str:
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()
