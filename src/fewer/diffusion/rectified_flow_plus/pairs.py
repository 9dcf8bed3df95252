"""Pairs of a noise and the image that a teacher's flow makes of it: kept as bytes and as the seed of the noise, written part by part."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import Dataset

from fewer.checks import check_positive, check_whole
from fewer.diffusion.rectified_flow_plus.sampler import invert
from fewer.diffusion.rectified_flow_plus.velocity import Velocity, check_images
from fewer.files import model_digest, read_json, whole_file
from fewer.fitting import evaluating
from fewer.inputs import read_arrays

META = "pairs.json"
NOISE_IN_MEMORY = 2**28  # elements of noise that are drawn once and kept; more are drawn again for every batch


@dataclass(frozen=True)
class EDMSampler:
    """Heun's steps in sigma from x = sigma_max z to 0, as EDM chooses them: 2 steps - 1 calls (18 steps for 32 x 32, 40 for ImageNet-64)."""

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_whole(least=2, steps=self.steps)
        check_positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)
        if not self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min}, sigma_max {self.sigma_max}; expected sigma_min below sigma_max")

    @property
    def calls(self) -> int:
        return 2 * self.steps - 1

    @torch.no_grad()
    def __call__(self, velocity: Velocity, z: Float[Tensor, "B *shape"], *condition: Any) -> Float[Tensor, "B *shape"]:
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigmas = [*(np.linspace(first, last, self.steps) ** self.rho).tolist(), 0.0]

        def slope(x: Tensor, sigma: float) -> Tensor:
            """(x - D(x; sigma)) / sigma, D = x_t - t v."""
            t, x_t = sigma / (1 + sigma), x / (1 + sigma)
            return (x - x_t + t * velocity(x_t, torch.tensor(t, dtype=torch.float64), *condition)) / sigma

        x = self.sigma_max * z
        for sigma, following in pairwise(sigmas):
            d = slope(x, sigma)
            moved = x + (following - sigma) * d
            x = x + (following - sigma) * (d + slope(moved, following)) / 2 if following else moved
        return x


Sampler = Callable[..., Tensor]  # (velocity, z, *condition) -> x


def noise_of(seeds: Int64[Tensor, "B"], shape: tuple[int, ...]) -> Float[Tensor, "B *shape"]:
    """Standard normal noises, each from its own seed on the CPU: the same bits in every process and whatever is drawn beside them."""
    noise, draw = torch.empty(len(seeds), *shape), torch.Generator()
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        row.normal_(generator=draw.manual_seed(seed))
    return noise


class PairDataset(Dataset[tuple[Tensor, ...]]):
    """Pairs (x, z), or (x, z, label).

    Args:
        x: images [N, *shape]: uint8, which stand for 0 to 255 over [-1, 1], or floats in [-1, 1].
        z: noises [N, *shape], or the seeds of noises, int64 [N].
        label: int64 [N], where the teacher takes one.

    Raises:
        ValueError: images and noises of different shapes or numbers, images that are neither bytes nor floats, noises that are neither
            floats nor seeds, or labels that are no whole numbers.

    Examples:
        >>> pairs = PairDataset(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.arange(3))
        >>> x, z = pairs.batch(torch.tensor([2, 0]))
        >>> float(x.max()), torch.equal(z[0], pairs[2][1])
        (-1.0, True)
    """

    def __init__(self, x: Tensor, z: Tensor, label: Tensor | None = None) -> None:
        seeded = z.ndim == 1 and z.dtype == torch.int64
        wrong = [each for each in (z, label) if each is not None and len(each) != len(x)]
        if wrong or not len(x) or (not seeded and z.shape != x.shape):
            raise ValueError(f"x is {tuple(x.shape)} and z {tuple(z.shape)}; expected as many of one shape, or a seed a pair (int64 [N])")
        if x.dtype != torch.uint8:
            check_images(x=x)
        if not seeded:
            check_images(z=z)
        if label is not None and (label.dtype.is_floating_point or label.ndim != 1):
            raise ValueError(f"label is {tuple(label.shape)} {label.dtype}; expected whole numbers [{len(x)}], one a pair")
        self.x, self.z, self.label, self.seeded = x, z, label, seeded
        self._noise: Tensor | None = None if seeded else z

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image."""
        return tuple(self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(each[0] for each in self.batch(torch.tensor([index])))

    def batch(self, rows: Int64[Tensor, "B"]) -> tuple[Tensor, ...]:
        """(x, z) or (x, z, label) of these rows, x as floats in [-1, 1]."""
        if self._noise is None and self.x.numel() <= NOISE_IN_MEMORY:
            self._noise = noise_of(self.z, self.shape)
        z = noise_of(self.z[rows], self.shape) if self._noise is None else self._noise[rows]
        x = self.x[rows]
        x = x / 127.5 - 1 if x.dtype == torch.uint8 else x
        return (x, z) if self.label is None else (x, z, self.label[rows])

    @staticmethod
    def open(directory: str | Path) -> PairDataset:
        """What `generate_pairs` wrote; FileNotFoundError or ValueError where a part is missing or cannot be read."""
        folder = Path(directory)
        meta = read_json(folder / META)
        if not {"pairs", "part"} <= meta.keys():
            raise ValueError(f"{folder / META} does not say how many pairs there are; expected what generate_pairs writes: make them again")
        parts = [read_arrays(folder / name, ["x", "seed"], ["label"]) for name in part_names(meta["pairs"], meta["part"])]
        arrays = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        return PairDataset(arrays["x"], arrays["seed"], arrays.get("label"))


def part_names(pairs: int, part: int) -> list[str]:
    return [f"part-{number:05}.npz" for number in range(-(-pairs // part))]


def generate_pairs(
    teacher: nn.Module,
    n: int,
    sampler: Sampler,
    out: str | Path,
    shape: tuple[int, ...],
    *,
    classes: int = 0,
    batch_size: int = 500,
    part: int = 10_000,
    seed: int = 0,
    device: str = "cpu",
    tell: Callable[[int, int], None] | None = None,
) -> PairDataset:
    """One round of reflow: n noises and where the teacher's flow takes them.

    Each part is written whole before the next begins; what is there of the same teacher and settings is kept, so that a run that broke off
    goes on, and several machines may each make their own. Memory does not grow with n.

    Args:
        teacher: a velocity (`VelocityFromEDM`, `VelocityFromVP`, a flow); it is in eval mode meanwhile.
        n: pairs; the paper makes 1 million for CIFAR-10 and 5 million for ImageNet-64.
        sampler: `sampler(teacher, z, *condition)` gives images in [-1, 1], which are kept as bytes: `EDMSampler()`.
        out: a folder for `part-00000.npz` ... (`x` uint8, `seed` int64, `label` where there are classes) and `pairs.json`.
        shape: of one image.
        classes: of a conditional teacher, whose third argument is the label; drawn evenly.
        batch_size: noises in one call; part: pairs in one file; seed: of all; tell: called with (done, n).

    Raises:
        ValueError: the folder has pairs of another teacher or other settings; NotADirectoryError: it is a file.
    """
    check_whole(n=n, batch_size=batch_size, part=part)
    check_whole(least=0, classes=classes, seed=seed)
    folder, shape = Path(out), tuple(shape)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a folder for the pairs: name another")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"pairs": n, "part": part, "seed": seed, "shape": list(shape), "classes": classes}
    # an address is another in the process that goes on
    meta = settings | {"teacher": model_digest(teacher), "sampler": re.sub(" at 0x[0-9a-f]+", "", repr(sampler))}
    if (folder / META).exists() and (there := read_json(folder / META)) != meta:
        unlike = [name for name in meta if there.get(name) != meta[name]]
        raise ValueError(f"{folder} has pairs of other {' and '.join(unlike)}; expected none, or the same: choose another folder")
    if not (folder / META).exists() and any((folder / name).exists() for name in part_names(n, part)):
        raise ValueError(f"{folder} has parts without {META}, made who knows how; expected none: choose another folder")
    with whole_file(folder / META, overwrite=True) as file:
        file.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf8")
    for number, name in enumerate(part_names(n, part)):
        first, last = number * part, min((number + 1) * part, n)
        if not (folder / name).exists():
            draw = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
            seeds = torch.randint(2**63 - 1, (last - first,), generator=draw)
            label = torch.randint(classes, (last - first,), generator=draw) if classes else None
            with evaluating(teacher):
                x = _images(teacher, sampler, seeds, label, shape, batch_size, device)
            arrays = {"x": x, "seed": seeds.numpy()} | ({} if label is None else {"label": label.numpy()})
            with whole_file(folder / name) as file:
                np.savez(file, allow_pickle=False, **arrays)
        if tell:
            tell(last, n)
    return PairDataset.open(folder)


def _images(
    teacher: nn.Module, sampler: Sampler, seeds: Tensor, label: Tensor | None, shape: tuple[int, ...], batch_size: int, device: str
) -> np.ndarray:
    """A part's images as bytes [B, *shape]."""
    made = []
    for rows in torch.arange(len(seeds)).split(batch_size):
        condition = () if label is None else (label[rows].to(device),)
        x = sampler(teacher, noise_of(seeds[rows], shape).to(device), *condition)
        if x.shape[1:] != shape or not bool(x.isfinite().all()):
            raise ValueError(f"the sampler gives {tuple(x.shape)} for {len(rows)} noises; expected finite images of shape {shape}")
        made.append(((x.float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8))
    return torch.cat(made).numpy()


def real_pairs(
    model: nn.Module,
    images: Float[Tensor, "N *shape"],
    label: Tensor | None = None,
    *,
    steps: int = 4,
    solver: str = "euler",
    batch_size: int = 500,
    generator: torch.Generator | None = None,
) -> PairDataset:
    """Real images [-1, 1] with the noises that the trained model inverts them to (configuration G)."""
    check_images(images=images)
    parts = [
        invert(model, images[rows], steps, solver, *(() if label is None else (label[rows],)), generator=generator)
        for rows in torch.arange(len(images)).split(batch_size)
    ]
    return PairDataset(images, torch.cat(parts), label)
