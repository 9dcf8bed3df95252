"""A small diffusion model of digits: a residual MLP under the preconditioning of EDM (Karras et al. 2022), and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.fitting import MovingAverage, up_and_down

Denoiser = TypeVar("Denoiser", bound=nn.Module)
SIGMA_DATA = 0.5
FREQUENCIES = 32
EMBEDDING = 128


@dataclass(frozen=True)
class DenoiserRecipe:
    """A network's size and how it is trained."""

    side: int  # pixels of an image's side
    width: int
    blocks: int = 3
    classes: int = 0  # 0: the label is not given; else one more stands for "no label"
    steps: int = 2000
    batch: int = 256
    lr: float = 2e-3
    warm_up: int = 100
    ema: float = 0.998
    log_sigma_mean: float = -1.2
    log_sigma_deviation: float = 1.2
    wide_draws: float = 0.1  # share of the noise levels drawn log-uniformly from `wide_range`, so that every schedule is covered
    wide_range: tuple[float, float] = (0.005, 160.0)
    label_dropout: float = 0.1
    seed: int = 0


class Block(nn.Module):
    """h + W_2 silu(W_1 norm(h) + V e), W_2 zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.first, self.condition = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(EMBEDDING, width)
        self.last = zero_linear(width, width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        return h + self.last(F.silu(self.first(self.norm(h)) + self.condition(e)))


def zero_linear(features: int, out: int) -> nn.Linear:
    layer = nn.Linear(features, out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class DigitDenoiser(nn.Module):
    """D(x, sigma, label): the expected clean image behind a noisy one.

    Args:
        recipe: its size.

    Shapes: x [B, 1, side, side] = clean + sigma * noise, clean in [-1, 1]; sigma a number or [B]; label int64 [B], -1 (or no labels
    at all) for "no label".
    """

    frequencies: Tensor

    def __init__(self, recipe: DenoiserRecipe) -> None:
        super().__init__()
        pixels = recipe.side**2
        self.classes = recipe.classes
        self.register_buffer("frequencies", torch.randn(FREQUENCIES) * 2 * math.pi)
        self.noise = nn.Sequential(nn.Linear(2 * FREQUENCIES, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.label = nn.Embedding(recipe.classes + 1, EMBEDDING) if recipe.classes else None
        self.enter = nn.Linear(pixels, recipe.width)
        self.blocks = nn.ModuleList(Block(recipe.width) for _ in range(recipe.blocks))
        self.leave_norm, self.leave = nn.LayerNorm(recipe.width), zero_linear(recipe.width, pixels)

    def network(self, x: Tensor, c_noise: Tensor, label: Tensor | None) -> Tensor:
        """F(c_in x, c_noise, label) of EDM, on rows of pixels."""
        angles = c_noise[:, None] * self.frequencies
        e = self.noise(torch.cat([angles.cos(), angles.sin()], dim=1))
        if self.label is not None:
            none = torch.full((len(x),), -1, device=x.device) if label is None else label
            e = e + self.label(torch.where(none < 0, self.classes, none))
        e, h = F.silu(e), self.enter(x)
        for block in self.blocks:
            h = block(h, e)
        return self.leave(F.silu(self.leave_norm(h)))

    def forward(self, x: Tensor, sigma: Tensor | float, label: Tensor | None = None) -> Tensor:
        rows = x.flatten(1)
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        c_in, c_skip, c_out = (c[:, None] for c in preconditioning(sigma))
        denoised = c_skip * rows + c_out * self.network(c_in * rows, sigma.log() / 4, label)
        return denoised.reshape(x.shape)


def preconditioning(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(c_in, c_skip, c_out) of EDM, table 1."""
    total = sigma**2 + SIGMA_DATA**2
    return total.rsqrt(), SIGMA_DATA**2 / total, sigma * SIGMA_DATA * total.rsqrt()


def loss_weight(sigma: Tensor) -> Tensor:
    """lambda(sigma) of EDM, which makes the network's own error count alike at every noise level: 1 / c_out^2."""
    return (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2


def draw_sigma(recipe: DenoiserRecipe, count: int, generator: torch.Generator) -> Tensor:
    """Noise levels [count]: log-normal, some log-uniform over a wide range."""
    usual = recipe.log_sigma_mean + recipe.log_sigma_deviation * torch.randn(count, generator=generator)
    low, high = (math.log(end) for end in recipe.wide_range)
    wide = low + (high - low) * torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < recipe.wide_draws, wide, usual).exp()


def lr_at(recipe: DenoiserRecipe, step: int) -> float:
    """Up in a line, then down in a line to zero."""
    return recipe.lr * up_and_down(recipe.steps, recipe.warm_up)(step)


def train_denoiser(recipe: DenoiserRecipe, images: Tensor, labels: Tensor, tell: Callable[[int, int, str], None]) -> DigitDenoiser:
    """Train on images [N, 1, side, side] in [-1, 1] with labels [N]; the moving average of the weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = DigitDenoiser(recipe)

    def batch(draw: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (recipe.batch,), generator=draw)
        return images[rows], labels[rows]

    return fit_denoiser(model, recipe, batch, tell, "the digits' diffusion model")


def fit_denoiser(
    model: Denoiser,
    recipe: DenoiserRecipe,
    batch: Callable[[torch.Generator], tuple[Tensor, ...]],
    tell: Callable[[int, int, str], None],
    name: str,
) -> Denoiser:
    """EDM's training. `batch` draws (clean images, labels, and what else the model is told); the average of the weights, in eval mode."""
    average, draw = MovingAverage(model, recipe.ema), torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True)
    for step in range(recipe.steps):
        clean, labels, *told = batch(draw)
        sigma = draw_sigma(recipe, recipe.batch, draw)
        noisy = clean + sigma[:, None, None, None] * torch.randn(clean.shape, generator=draw)
        dropped = torch.rand(recipe.batch, generator=draw) < recipe.label_dropout
        error = model(noisy, sigma, labels.masked_fill(dropped, -1), *told) - clean
        loss = (loss_weight(sigma) * error.square().flatten(1).mean(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(recipe, step)
        optimizer.step()
        average.update(model)
        if step % 50 == 0:
            tell(step, recipe.steps, f"{name} learns: loss {loss.item():.3f}")
    return cast(Denoiser, average.model)
