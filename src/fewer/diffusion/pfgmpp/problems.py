"""What the study trains on and with: digits, known sets or a user's own images, a network for them, and how samples are judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewer.data import load_cifar10
from fewer.diffusion.pfgmpp.loss import EDMPrecond, PFGMPPLoss
from fewer.fitting import MovingAverage, fit_steps, up_and_down
from fewer.tasks import frechet_distance
from fewer.tasks.digit_denoiser import DenoiserRecipe, DigitDenoiser
from fewer.tasks.digits_diffusion import digit_images
from fewer.tasks.image_judges import Judge, floor_of, judges_of, read_own_images, split_fifth

DIGITS = "digits8", "mnist28"
WIDTH, BATCH, LR, WARM_UP, EMA = 256, 256, 2e-3, 100, 0.995
SIGMA_MIN, SIGMA_MAX = 0.02, 20.0
WIDTHS = 64, 128, 128  # of the U-Net
Tell = Callable[[int, float], None]


@dataclass(frozen=True)
class Task:
    """Images [N, C, H, W] in [-1, 1] to learn, and others to judge by.

    Attributes:
        judges: figure -> what its Frechet distance is taken between: pixels (where there are more than `DIRECTIONS`, the images' leading
            principal directions), and what a classifier sees in digits.
        steps: of training.
        samples: that are judged.
        large: whether a U-Net is trained; else a perceptron.
    """

    train: Tensor
    test: Tensor
    judges: dict[str, Judge]
    steps: int
    samples: int
    large: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.train.shape[1:])

    def distance(self, figure: str, x: Tensor, images: Tensor | None = None) -> float:
        """The Frechet distance of samples to the training images, or to others."""
        seen = self.judges[figure]
        return frechet_distance(seen(x.cpu()), seen(self.train if images is None else images))

    def floor(self, figure: str) -> float:
        """That of one half of the training images to the other: real images of half the number."""
        return floor_of(self.judges[figure](self.train))


def make_task(data: str, steps: int, large: bool) -> Task:
    """A known set by its name, or a user's own images.

    Raises:
        FileNotFoundError, ValueError: a file that cannot be used.
    """
    name = data or ("mnist28" if large else "digits8")
    if name in DIGITS:
        train, test = (digit_images(name, split)[0] for split in ("train", "test"))
    elif name == "cifar-10":
        train, test = (torch.from_numpy(load_cifar10(split).x).float() / 127.5 - 1 for split in ("train", "test"))
    else:
        images = read_own_images(name)
        if large and (images.shape[2] % 4 or images.shape[3] % 4):
            raise ValueError(f"{name}: images of {tuple(images.shape[2:])} pixels; expected multiples of 4 at full scale: pad them")
        train, test = split_fifth(images)
    judges = judges_of(train, name if name in DIGITS else "")
    return Task(train, test, judges, steps or (30_000 if large else 1500), 10_000 if large else 2000, large)


class FramedDenoiser(nn.Module):
    """The digits' denoiser for images of any shape: their numbers in a row, zeros after them up to a square."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.side = math.isqrt(math.prod(shape) - 1) + 1
        self.denoiser = DigitDenoiser(DenoiserRecipe(side=self.side, width=WIDTH))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        rows = x.flatten(1)
        framed = nn.functional.pad(rows, (0, self.side**2 - rows.shape[1]))
        return self.denoiser(framed, sigma)[:, : rows.shape[1]].reshape(x.shape)


def make_network(task: Task, seed: int) -> nn.Module:
    """D(x, sigma), preconditioned, of the same weights for the same seed."""
    torch.manual_seed(seed)
    if not task.large:
        return FramedDenoiser(task.shape)
    from diffusers.models.unets.unet_2d import UNet2DModel

    channels, height, width = task.shape
    down, up = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    net = UNet2DModel((height, width), channels, channels, block_out_channels=WIDTHS, down_block_types=down, up_block_types=up)
    return EDMPrecond(net)


def train(task: Task, D: float, seed: int, device: str = "cpu", tell: Tell | None = None) -> nn.Module:
    """A network trained with D extra dimensions: initial weights and the order of the images are the seed's, whatever D is."""
    model = make_network(task, seed).to(device)
    average, loss, images = MovingAverage(model, EMA), PFGMPPLoss(D), task.train.to(device)
    order, noise = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)

    def batches() -> Iterator[Tensor]:
        while True:
            yield images[torch.randint(len(images), (BATCH,), generator=order).to(device)]

    def after(step: int, value: float) -> None:
        average.update(model)
        if tell:
            tell(step, value)

    optimizer = torch.optim.Adam(model.parameters(), lr=LR if not task.large else LR / 10, fused=True)
    schedule = up_and_down(task.steps, min(WARM_UP, task.steps // 2))
    fit_steps(optimizer, lambda y: loss(model, y, generator=noise).mean(), batches(), task.steps, schedule=schedule, tell=after)
    return average.model
