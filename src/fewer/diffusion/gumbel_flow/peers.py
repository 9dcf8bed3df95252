"""What Gumbel-Softmax flows are held against, in the same interface: linear and Dirichlet flows, masked diffusion, counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from fewer.diffusion.gumbel_flow.path import Model, PathSample, asked, check_times, check_tokens, mean_over
from fewer.diffusion.gumbel_flow.sampling import Samples, draw_letters, onto_simplex


def uniform_on_simplex(*shape: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws of Dirichlet(1, ..., 1) over the last dimension."""
    draw = torch.empty(shape).exponential_(generator=generator)
    return draw / draw.sum(-1, keepdim=True)


@dataclass(frozen=True)
class LinearPath:
    """x_t = (1 - t) x_0 + t e_k from a uniform point of the simplex."""

    num_classes: int

    def start(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        return uniform_on_simplex(*shape, self.num_classes, generator=generator)

    def sample(self, x1: Tensor, t: float | Tensor, generator: torch.Generator | None = None) -> PathSample:
        one_hot, times = _one_hot(x1, self.num_classes), check_times(t, len(x1))
        noise = self.start(*one_hot.shape[:2], generator=generator)
        return PathSample(torch.lerp(noise, one_hot, times[:, None, None]), times, one_hot, noise)

    def velocity(self, posterior: Tensor, x: Tensor, t: float) -> Tensor:
        return (posterior - x) / (1 - t)


@dataclass(frozen=True)
class DirichletPath:
    """x_t ~ Dirichlet(1 + s e_k), s = t * longest (Stark et al. 2024, arXiv 2402.05841)."""

    num_classes: int
    longest: float = 8.0

    def start(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        return uniform_on_simplex(*shape, self.num_classes, generator=generator)

    def sample(self, x1: Tensor, t: float | Tensor, generator: torch.Generator | None = None) -> PathSample:
        one_hot, times = _one_hot(x1, self.num_classes), check_times(t, len(x1))
        shape = 1 + self.longest * times[:, None, None] * one_hot
        draw = torch._standard_gamma(shape, generator=generator)  # pyright: ignore[reportPrivateImportUsage] - as torch.distributions does
        return PathSample(draw / draw.sum(-1, keepdim=True), times, one_hot, draw)

    def velocity(self, posterior: Tensor, x: Tensor, t: float) -> Tensor:
        """sum_k p_k C(x_k, s) (e_k - x), which carries the conditional densities along."""
        flow = posterior * torch.from_numpy(self.speed(x.double().numpy(), t * self.longest)).to(x) * self.longest
        return flow - flow.sum(-1, keepdim=True) * x

    def speed(self, b: np.ndarray, s: float) -> np.ndarray:
        """C(b, s) = -d/da I_b(a, K - 1) B(a, K - 1) / ((1 - b)^(K - 1) b^s) at a = s + 1; the derivative as a difference.

        Near b = 1 the tail of I is taken, whose digits do not cancel.
        """
        from scipy.special import beta, betainc, betaincc

        b, a, k, eps = np.clip(b, 1e-6, 1 - 1e-6), s + 1, self.num_classes - 1, 1e-4
        below = (betainc(a + eps, k, b) - betainc(a - eps, k, b)) / (2 * eps)
        above = (betaincc(a - eps, k, b) - betaincc(a + eps, k, b)) / (2 * eps)
        return -np.where(b < 0.5, below, above) * beta(a, k) / ((1 - b) ** k * b**s)


@dataclass(frozen=True)
class MaskPath:
    """Masked discrete diffusion: a letter is hidden with probability 1 - t; a hidden position is a row of zeros."""

    num_classes: int

    def sample(self, x1: Tensor, t: float | Tensor, generator: torch.Generator | None = None) -> PathSample:
        one_hot, times = _one_hot(x1, self.num_classes), check_times(t, len(x1))
        shown = torch.rand(one_hot.shape[:2], generator=generator) < times[:, None]
        return PathSample(one_hot * shown[..., None], times, one_hot, shown)


def mask_loss(model: Model, path: MaskPath, tokens: Int[Tensor, "B L"], mask: Tensor | None = None, generator: Any = None) -> Tensor:
    """Cross-entropy at hidden positions."""
    drawn, logits, mask = asked(model, path, tokens, mask, None, None, generator)
    hidden = ~drawn.noise if mask is None else ~drawn.noise & mask
    return mean_over(F.cross_entropy(logits.movedim(-1, 1), tokens.long(), reduction="none"), hidden if hidden.any() else mask)


@torch.no_grad()
def sample_peer(
    model: Model,
    path: LinearPath | DirichletPath | MaskPath,
    length: int,
    batch: int,
    steps: int,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
) -> Samples:
    """Euler's steps on the simplex, or letters uncovered at random; the model is asked once a step."""
    real = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    corrections, h = 0, 1 / steps
    x = torch.zeros(batch, length, path.num_classes) if isinstance(path, MaskPath) else path.start(batch, length, generator=generator)
    for n in range(steps):
        x = x * real[..., None]
        p = torch.softmax(model(x, torch.full((batch,), n * h), None), dim=-1)
        if isinstance(path, MaskPath):
            hidden = x.sum(-1) == 0
            uncovered = hidden & (torch.rand(real.shape, generator=generator) < 1 / (steps - n))
            x = torch.where(uncovered[..., None], F.one_hot(draw_letters(p, real, generator), path.num_classes).to(x), x)
        else:
            x, cut = onto_simplex(x + h * path.velocity(p, x, n * h))
            corrections += int(cut[real].sum())
    x = x * real[..., None]
    return Samples(x.argmax(-1) * real, x, corrections, float(x.amax(-1)[real].mean()))


# Counts


def position_frequencies(tokens: Int[Tensor, "N L"], num_classes: int, count: int, generator: torch.Generator) -> Int[Tensor, "count L"]:
    """Sequences whose letters are drawn position by position from those of the data."""
    shares = F.one_hot(tokens, num_classes).double().mean(0)
    return torch.multinomial(shares, count, replacement=True, generator=generator).T


def markov_chain(tokens: Int[Tensor, "N L"], num_classes: int, count: int, generator: torch.Generator, order: int = 3) -> Tensor:
    """Sequences of a Markov chain with the data's counts (one more each), begun with words of the data: [count, L]."""
    words = num_classes ** torch.arange(order - 1, -1, -1)
    before = (tokens.unfold(1, order, 1)[:, :-1] * words).sum(-1)
    counts = torch.ones(num_classes**order * num_classes)
    counts.index_add_(0, (before * num_classes + tokens[:, order:]).flatten(), torch.ones(before.numel()))
    shares = counts.reshape(-1, num_classes)
    drawn = tokens[torch.randint(len(tokens), (count,), generator=generator), :order]
    for _ in range(tokens.shape[1] - order):
        last = (drawn[:, -order:] * words).sum(-1)
        drawn = torch.cat([drawn, torch.multinomial(shares[last], 1, generator=generator)], dim=1)
    return drawn


def _one_hot(x1: Tensor, num_classes: int) -> Float[Tensor, "B L K"]:
    tokens = check_tokens(x1, num_classes)
    return (x1 if tokens is None else F.one_hot(tokens, num_classes)).float()


def best_of(score: Any, tokens: Int[Tensor, "C N L"]) -> Int[Tensor, "N L"]:
    """Of C candidates each, the one that scores highest."""
    candidates, count, length = tokens.shape
    scores = score(tokens.reshape(-1, length)).reshape(candidates, count)
    return tokens[scores.argmax(0), torch.arange(count)]
