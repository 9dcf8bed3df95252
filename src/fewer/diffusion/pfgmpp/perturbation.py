"""The perturbation kernel of PFGM++, a Student-t distribution around each data point: its noise, its radii, and the mean of what lies behind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fewer.checks import check_whole, is_number
from fewer.diffusion._shared.prediction import at_least_single

PIECE = 2**21  # float64 numbers of a working array, 16 MiB; the exact field holds at most ten of them at once


def check_dimensions(D: float) -> None:
    """ValueError where D is no number above 0; math.inf is one."""
    if not (is_number(D) or (isinstance(D, float) and math.isinf(D))) or D <= 0:
        raise ValueError(f"D is {D!r}; expected a number above 0, whole or not, or math.inf (a diffusion model)")


def check_images(**images: Tensor) -> None:
    """ValueError naming the first that is no floating-point tensor [B, ...]."""
    for name, value in images.items():
        if not value.is_floating_point() or value.ndim < 1:
            raise ValueError(f"{name} is {tuple(value.shape)} {value.dtype}; expected floating-point [B, ...], such as images / 127.5 - 1")


def check_sigma(sigma: Tensor, count: int) -> None:
    """ValueError where sigma is not [B] of finite numbers above 0."""
    if not isinstance(sigma, Tensor) or sigma.shape != (count,):
        given = tuple(sigma.shape) if isinstance(sigma, Tensor) else repr(sigma)
        raise ValueError(f"sigma is {given}; expected a tensor ({count},), one noise level a sample: torch.full(({count},), sigma)")
    if torch.compiler.is_compiling():
        return
    if not bool((torch.isfinite(sigma) & (sigma > 0)).all()):
        raise ValueError(f"sigma holds {float(sigma[~(torch.isfinite(sigma) & (sigma > 0))][0])}; expected finite numbers above 0")


def per_sample(values: Float[Tensor, "B"], like: Float[Tensor, "B *shape"]) -> Float[Tensor, "B *ones"]:
    """One number a sample, in the shape that multiplies a batch."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def student_t_noise(
    shape: Sequence[int],
    D: float,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> Float[Tensor, "B *shape"]:
    """Noise of the kernel at sigma = 1: g sqrt(D / c), g ~ N(0, I), c ~ chi-square(D), one c a sample (section 4).

    It is Student's t in N dimensions with D degrees of freedom: Cauchy at D = 1 (PFGM), and `torch.randn` bit for bit at D = math.inf.

    Args:
        shape: (B, ...), N numbers a sample.
        D: extra dimensions, any number above 0.
        generator: replays the noise; each rank of a data-parallel run needs one of its own. None: torch's global one.
        dtype: half precisions are drawn in float32.
        device: by default the generator's.

    Raises:
        ValueError: D is no number above 0, a shape without a batch, or a dtype of whole numbers.

    Examples:
        >>> noise = student_t_noise((4, 1, 8, 8), 64, torch.Generator().manual_seed(0))
        >>> noise.shape, noise.dtype
        (torch.Size([4, 1, 8, 8]), torch.float32)
    """
    check_dimensions(D)
    if not dtype.is_floating_point or not len(shape):
        raise ValueError(f"shape {tuple(shape)}, dtype {dtype}; expected (B, ...) and a floating-point dtype")
    device = device or (generator.device if generator is not None else "cpu")
    g = torch.randn(*shape, generator=generator, dtype=at_least_single(dtype), device=device)
    if math.isinf(D):
        return g.to(dtype)
    # Not by R = r sqrt(b / (1 - b)), b ~ Beta(N / 2, D / 2): near 1 a b has no digits left, and clipping it changes the law
    half = torch.full((len(g),), D / 2, dtype=torch.float64, device=device)
    chi_square = 2 * torch._standard_gamma(half, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
    return (g * per_sample((D / chi_square).sqrt().to(g.dtype), g)).to(dtype)


def perturb(
    y: Float[Tensor, "B *shape"], sigma: Float[Tensor, "B"], D: float, generator: torch.Generator | None = None
) -> Float[Tensor, "B *shape"]:
    """y with the kernel's noise at r = sigma sqrt(D): p(x | y) ~ (||x - y||^2 + r^2)^(-(N + D) / 2) (eq. 4).

    Args:
        y: data, N numbers a sample.
        sigma: noise levels, as a diffusion model's.
        D: extra dimensions; math.inf adds sigma randn.
        generator: replays the noise.

    Returns:
        x, of y's dtype; it is computed in float32 at least.

    Raises:
        ValueError: data that are not floating-point, a sigma that is not [B] or not above 0, or a D that is not.

    Examples:
        >>> perturb(torch.zeros(2, 3), torch.tensor([0.1, 10.0]), D=128).shape
        torch.Size([2, 3])
    """
    check_images(y=y)
    check_sigma(sigma, len(y))
    dtype = at_least_single(y.dtype)
    noise = student_t_noise(y.shape, D, generator, dtype, y.device)
    return (y.to(dtype) + per_sample(sigma.to(noise), y) * noise).to(y.dtype)


def radius_quantiles(N: int, D: float, q: Any) -> Float64[Tensor, "*q"]:
    """Quantiles of R / sigma, R = ||x - y||: R^2 / (sigma^2 N) ~ F(N, D), which tells how wide a shell D makes.

    The relative spread is about sqrt(1 / (2 N) + 1 / (2 D)): a D well above N changes little, one well below widens the shell.

    Args:
        N: numbers of a sample.
        D: extra dimensions, or math.inf.
        q: probabilities between 0 and 1: a number, a sequence or a tensor.

    Raises:
        ValueError: N, D or q out of range.

    Examples:
        >>> [round(float(each), 2) for each in radius_quantiles(64, 16, [0.1, 0.5, 0.9])]
        [6.36, 8.13, 10.67]
    """
    from scipy import stats

    check_whole(N=N)
    check_dimensions(D)
    chances = torch.as_tensor(q, dtype=torch.float64)
    if not bool(((chances > 0) & (chances < 1)).all()):
        raise ValueError(f"q is {q}; expected numbers between 0 and 1")
    square = stats.chi2.ppf(chances, N) if math.isinf(D) else N * stats.f.ppf(chances, N, D)
    return torch.as_tensor(square, dtype=torch.float64).sqrt()


def posterior_mean(
    x: Float[Tensor, "B *shape"],
    sigma: Float[Tensor, "B"],
    data: Float[Tensor, "M *shape"],
    D: float,
    weights: Float[Tensor, "M"] | None = None,
) -> Float[Tensor, "B *shape"]:
    """E[y | x], the minimiser of the training loss on a finite set: sum_j p_j y_j, p_j ~ w_j (||x - y_j||^2 + r^2)^(-(N + D) / 2).

    The field is (x - E[y | x]) / sigma (eq. 3). Sums are float64; beside its inputs and its answer it takes at most 256 MiB.

    Args:
        x: where the field is asked for.
        sigma: noise levels; r = sigma sqrt(D).
        data: the charges.
        weights: their sizes, not negative; all alike by default.

    Returns:
        Of x's dtype.

    Raises:
        ValueError: shapes that do not belong together, integers, or weights that are negative or all zero.

    Examples:
        >>> x, data = torch.tensor([[0.0]]), torch.tensor([[-1.0], [2.0]])
        >>> posterior_mean(x, torch.tensor([1.0]), data, D=1.0)
        tensor([[-0.1429]])
    """
    check_images(x=x, data=data)
    check_sigma(sigma, len(x))
    check_dimensions(D)
    if data.shape[1:] != x.shape[1:] or not len(data):
        raise ValueError(f"data is {tuple(data.shape)}; expected (M, {', '.join(map(str, x.shape[1:]))}) with M >= 1, as x is")
    N = math.prod(x.shape[1:])
    points, sizes = data.reshape(len(data), N), torch.ones(len(data), dtype=torch.float64, device=data.device)
    if weights is not None:
        if weights.shape != (len(data),) or not bool((weights >= 0).all()) or not 0 < float(weights.double().sum()) < math.inf:
            raise ValueError(f"weights are {tuple(weights.shape)}; expected ({len(data)},) finite numbers of at least 0, not all 0")
        points, sizes = (points, weights.double()) if bool(weights.all()) else (points[weights > 0], weights[weights > 0].double())
    column = max(1, min(len(points), PIECE // N))
    row = max(1, min(PIECE // column, PIECE // N))
    rows, means = x.reshape(len(x), N), x.new_empty(len(x), N)
    for first in range(0, len(x), row):
        few = slice(first, first + row)
        means[few] = _means(rows[few].double(), sigma[few].double()[:, None], points, sizes.log(), column, D)
    return means.reshape(x.shape)


def _means(x: Tensor, sigma: Tensor, points: Tensor, log_sizes: Tensor, column: int, D: float) -> Float64[Tensor, "B N"]:
    """The means for a few rows, over the points piece by piece: shares are kept relative to the largest so far."""
    highest = torch.full_like(sigma, -math.inf)
    total, mean = torch.zeros_like(sigma), torch.zeros_like(x)
    centre = points[:column].double().mean(0)  # distances by a product of matrices lose digits far from the origin
    moved = x - centre
    of_x = moved.square().sum(1, keepdim=True)
    for part, log_size in zip(points.split(column), log_sizes.split(column), strict=True):
        y = part.double()
        centred = y - centre
        logits = torch.addmm(centred.square().sum(1)[None], moved, centred.T, alpha=-2).add_(of_x).clamp_(min=0)
        _log_kernel(logits, sigma, x.shape[1], D).add_(log_size)
        top = torch.maximum(highest, logits.amax(1, keepdim=True))
        shares, kept = logits.sub_(top).exp_(), (highest - top).exp()
        total, mean, highest = total * kept + shares.sum(1, keepdim=True), torch.addmm(mean * kept, shares, y), top
    return mean / total


def _log_kernel(squares: Tensor, sigma: Tensor, N: int, D: float) -> Tensor:
    """-(N + D) / 2 log(1 + R^2 / r^2) of squared distances, in their place; by log1p, as R / r is small where D is large."""
    if math.isinf(D):
        return squares.mul_(-0.5 / sigma**2)
    return squares.div_(D * sigma**2).log1p_().mul_(-(N + D) / 2)
