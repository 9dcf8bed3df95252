"""A fully convolutional diffusion model of digits that has seen 16 x 16 pixels only: whole small digits, and pieces of larger ones.

It knows fine strokes locally and whole digits coarsely, which is the situation of a text-to-image model above its training size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.tasks.digit_denoiser import DenoiserRecipe, fit_denoiser, preconditioning, zero_linear

EMBEDDING, FREQUENCIES, TOKENS = 64, 32, 4
WIDTHS = (48, 96)
WHOLE, PIECE = 0, 1  # what a 16 x 16 image is, as SDXL's size conditions say it
Grid = tuple[int, int]
Mix = Callable[[Tensor, Tensor, Grid], Tensor]  # (attention's output [B, h w, width], values [B, tokens, width], (h, w)) -> output
Keep = Callable[[Tensor, Grid], None]  # (attention's map [B, h w, tokens], averaged over heads; (h, w))


@dataclass(frozen=True)
class TileRecipe(DenoiserRecipe):
    """How it is trained; half of a batch are whole digits of `side` pixels, half are pieces of digits twice as large."""

    side: int = 16
    width: int = WIDTHS[0]
    classes: int = 10
    steps: int = 2500
    batch: int = 64
    lr: float = 3e-3


class ConvBlock(nn.Module):
    """h + conv1x1(silu(conv3x3(norm h) (1 + a) + b)), a and b of the embedding; the last convolution is zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.first = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.condition, self.last = nn.Linear(EMBEDDING, 2 * width), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(cast(Tensor, self.last.bias))

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        a, b = self.condition(e)[:, :, None, None].chunk(2, dim=1)
        return h + self.last(F.silu(self.first(self.norm(h)) * (1 + a) + b))


class ClassAttention(nn.Module):
    """Cross-attention of every position to the class's learned tokens, of four heads."""

    def __init__(self, width: int, classes: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.GroupNorm(4, width)
        self.tokens = nn.Parameter(torch.randn(classes, TOKENS, EMBEDDING))
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(EMBEDDING, width), nn.Linear(EMBEDDING, width)
        self.leave = zero_linear(width, width)

    def forward(self, h: Tensor, label: Tensor, mix: Mix | None, keep: Keep | None) -> Tensor:
        grid: Grid = (h.shape[2], h.shape[3])
        tokens = self.tokens[label]
        query, key, value = self.query(self.norm(h).flatten(2).mT), self.key(tokens), self.value(tokens)
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in (query, key, value))
        probabilities = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
        if keep is not None:
            keep(probabilities.mean(1), grid)
        out = (probabilities @ v).transpose(1, 2).flatten(2)
        if mix is not None:
            out = mix(out, value, grid)
        return h + self.leave(out).mT.unflatten(-1, grid)


class TileDenoiser(nn.Module):
    """D(x, sigma, label, flag): the clean image behind a noisy one, of any size that 4 divides.

    Shapes: x [B, 1, H, W] = clean + sigma * noise, clean in [-1, 1]; sigma a number or [B]; label int64 [B], -1 or none at all for
    "no label"; flag 0 for whole digits of 16 x 16 pixels, 1 for pieces of larger ones, a number or [B].

    `mix` and `keep` reach into the cross-attention: see `Mix` and `Keep`.
    """

    frequencies: Tensor

    def __init__(self, recipe: TileRecipe) -> None:
        super().__init__()
        fine, coarse = WIDTHS
        self.classes = recipe.classes
        self.register_buffer("frequencies", torch.randn(FREQUENCIES) * 2 * math.pi)
        self.noise = nn.Sequential(nn.Linear(2 * FREQUENCIES, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING))
        self.label, self.flag = nn.Embedding(recipe.classes + 1, EMBEDDING), nn.Embedding(2, EMBEDDING)
        self.enter, self.down = nn.Conv2d(4, fine, 3, padding=1), nn.Conv2d(fine, coarse, 2, stride=2)
        self.before, self.after = ConvBlock(fine), ConvBlock(fine)
        self.middle = nn.ModuleList(ConvBlock(coarse) for _ in range(3))
        self.attention = ClassAttention(coarse, recipe.classes + 1)
        self.up, self.leave = nn.Conv2d(coarse, 4 * fine, 1), nn.Conv2d(fine, 4, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(cast(Tensor, self.leave.bias))

    def network(self, x: Tensor, c_noise: Tensor, label: Tensor, flag: Tensor, mix: Mix | None, keep: Keep | None) -> Tensor:
        """F(c_in x, c_noise, label, flag) of EDM."""
        angles = c_noise[:, None] * self.frequencies
        e = F.silu(self.noise(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.label(label) + self.flag(flag))
        fine = self.before(self.enter(F.pixel_unshuffle(x, 2)), e)
        h = self.middle[1](self.middle[0](self.down(fine), e), e)
        h = self.middle[2](self.attention(h, label, mix, keep), e)
        return F.pixel_shuffle(self.leave(self.after(F.pixel_shuffle(self.up(h), 2) + fine, e)), 2)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | float,
        label: Tensor | None = None,
        flag: Tensor | int = WHOLE,
        mix: Mix | None = None,
        keep: Keep | None = None,
    ) -> Tensor:
        if x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(f"images of {x.shape[2]} x {x.shape[3]} pixels; expected sides divisible by 4: pad them")
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        none = torch.full((len(x),), -1, device=x.device) if label is None else label
        which = torch.as_tensor(flag, device=x.device).expand(len(x))
        c_in, c_skip, c_out = (c[:, None, None, None] for c in preconditioning(sigma))
        answer = self.network(c_in * x, sigma.log() / 4, torch.where(none < 0, self.classes, none), which, mix, keep)
        return c_skip * x + c_out * answer


def halved(images: Tensor) -> Tensor:
    """Means of 2 x 2 pixels."""
    return F.avg_pool2d(images, 2)


def train_tiles(recipe: TileRecipe, images: Tensor, labels: Tensor, tell: Callable[[int, int, str], None]) -> TileDenoiser:
    """Train on images [N, 1, 2 side, 2 side] in [-1, 1] with labels [N]; the moving average of the weights, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = TileDenoiser(recipe)
    small, half, side = halved(images), recipe.batch // 2, recipe.side
    flag = torch.tensor([WHOLE] * half + [PIECE] * (recipe.batch - half))

    def batch(draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.randint(len(images), (recipe.batch,), generator=draw)
        corners = torch.randint(side + 1, (recipe.batch - half, 2), generator=draw).tolist()
        pieces = [
            images[row, :, top : top + side, left : left + side] for row, (top, left) in zip(rows[half:].tolist(), corners, strict=True)
        ]
        return torch.cat([small[rows[:half]], torch.stack(pieces)]), labels[rows], flag

    return fit_denoiser(model, recipe, batch, tell, "the model of digits' pieces")
