"""A mixture of Gaussians as data: its best denoiser and the flow from noise to data are known, so a sampler's error is known too."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

RK4_STEPS = 2000
HALVINGS = 200


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """sum_k w_k N(mu_k, diag v_k).

    Args:
        means: float64 [K, D].
        weights: float64 [K], positive, with sum 1.
        variances: float64 [K, D], positive.

    Examples:
        >>> two = GaussianMixture(torch.tensor([[-1.0], [2.0]]).double(), torch.tensor([0.3, 0.7]).double(), torch.full((2, 1), 0.01).double())
        >>> bool((two.denoiser(torch.tensor([[2.1]]).double(), 0.01) - 2.1).abs() < 0.01)
        True
    """

    means: Float64[Tensor, "K D"]
    weights: Float64[Tensor, "K"]
    variances: Float64[Tensor, "K D"]

    def __post_init__(self) -> None:
        shapes = tuple(self.means.shape), tuple(self.weights.shape), tuple(self.variances.shape)
        if len(shapes[0]) != 2 or shapes[1] != shapes[0][:1] or shapes[2] != shapes[0]:
            raise ValueError(f"means, weights, variances are {shapes}; expected [K, D], [K], [K, D]")
        if not bool((self.variances > 0).all()) or not bool((self.weights > 0).all()) or abs(float(self.weights.sum()) - 1) > 1e-6:
            raise ValueError("expected positive variances, and positive weights with sum 1")

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def draw(self, count: int, generator: torch.Generator | None = None) -> Float64[Tensor, "N D"]:
        """Points of the mixture."""
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dim, dtype=torch.float64, generator=generator)
        return self.means[which] + self.variances[which].sqrt() * noise

    def responsibilities(self, x: Float[Tensor, "N D"], sigma: float | Tensor) -> Float[Tensor, "N K"]:
        """How likely each component is behind x = point + sigma * noise."""
        total = self.variances.to(x) + _column(sigma, x)[..., None] ** 2  # [N or 1, K, D]
        distance = (x[:, None] - self.means.to(x)) ** 2 / total
        return torch.softmax(self.weights.to(x).log() - (distance + total.log()).sum(-1) / 2, dim=1)

    def denoiser(self, x: Float[Tensor, "N D"], sigma: float | Tensor) -> Float[Tensor, "N D"]:
        """E[point | x] for x = point + sigma * noise; sigma a number or [N]."""
        squared, v = _column(sigma, x)[..., None] ** 2, self.variances.to(x)
        each = (self.means.to(x) * squared + v * x[:, None]) / (v + squared)
        return (self.responsibilities(x, sigma)[..., None] * each).sum(1)

    def epsilon(self, x: Float[Tensor, "N D"], lambda_: float | Tensor, alpha: float | Tensor | None = None) -> Float[Tensor, "N D"]:
        """E[noise | x] for x = alpha * point + sigma * noise with log(alpha / sigma) = lambda_; alpha^2 + sigma^2 = 1 where alpha is not given."""
        lambda_ = torch.as_tensor(lambda_, dtype=x.dtype)
        alpha = torch.sigmoid(2 * lambda_).sqrt() if alpha is None else torch.as_tensor(alpha, dtype=x.dtype)
        ratio = torch.exp(-lambda_)
        alpha_column, ratio_column = _column(alpha, x), _column(ratio, x)
        return (x / alpha_column - self.denoiser(x / alpha_column, ratio)) / ratio_column

    def transport(self, x: Float64[Tensor, "N D"], sigma_a: float, sigma_b: float) -> Float64[Tensor, "N D"]:
        """Where the flow dx/dsigma = (x - denoiser(x, sigma)) / sigma takes x from sigma_a to sigma_b.

        In closed form for one component, by quantiles in one dimension, else by 2,000 steps of Runge and Kutta in log sigma.
        """
        if len(self.means) == 1:
            return self.means + (x - self.means) * torch.sqrt((self.variances + sigma_b**2) / (self.variances + sigma_a**2))
        if self.dim == 1:
            return self._by_quantiles(x, sigma_a, sigma_b)
        step = (math.log(sigma_b) - math.log(sigma_a)) / RK4_STEPS

        def slope(at: Tensor, log_sigma: float) -> Tensor:
            return at - self.denoiser(at, math.exp(log_sigma))

        for i in range(RK4_STEPS):
            s = math.log(sigma_a) + i * step
            k_1 = slope(x, s)
            k_2 = slope(x + step / 2 * k_1, s + step / 2)
            k_3 = slope(x + step / 2 * k_2, s + step / 2)
            k_4 = slope(x + step * k_3, s + step)
            x = x + step / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
        return x

    def tails(self, x: Float64[Tensor, "N 1"], sigma: float) -> tuple[Float64[Tensor, "N"], Float64[Tensor, "N"]]:
        """(P(X < x), P(X > x)) of one-dimensional points with noise sigma added."""
        z = (x - self.means[:, 0]) / torch.sqrt(2 * (self.variances[:, 0] + sigma**2))
        return (self.weights * torch.erfc(-z)).sum(1) / 2, (self.weights * torch.erfc(z)).sum(1) / 2

    def _by_quantiles(self, x: Tensor, sigma_a: float, sigma_b: float) -> Tensor:
        """In one dimension the flow keeps the order of points: the quantile stays. The smaller tail is the more exact one."""
        below, above = self.tails(x, sigma_a)
        reach = 40 * float(torch.sqrt(self.variances.max() + sigma_b**2)) + float(self.means.abs().max())
        low, high = torch.full_like(below, -reach), torch.full_like(below, reach)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            its_below, its_above = self.tails(middle[:, None], sigma_b)
            too_low = torch.where(below < above, its_below < below, its_above > above)
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        return ((low + high) / 2)[:, None]


def _column(value: float | Tensor, x: Tensor) -> Tensor:
    """A number or [N] as [1, 1] or [N, 1]."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device).reshape(-1, 1)
