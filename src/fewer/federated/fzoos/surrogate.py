"""A Gaussian process over a client's past queries: its mean's gradient is the gradient estimate, its gradient's uncertainty says where to ask.
Below it, the random Fourier features that all clients share, so that a mean of weights is the mean of their surrogates' gradients.

One matrix product each; no loop over points. Everything is float64.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from fewer.checks import check_choice, check_positive, check_whole

Kernel = Literal["matern52", "rbf"]
SCALES = torch.from_numpy(np.geomspace(0.1, 100, 13))  # length scales to choose from
FLOOR = 1e-20  # of the range of values
MOST_NOISE = 1e-3


class GradientSurrogate:
    """The Gaussian process of n queries, with a prior mean of their mean and a scale of their range.

    Args:
        x: points [n, d].
        y: their values [n].
        kernel: "matern52" or "rbf".
        length_scale: l; None: the most likely of 13 from 0.1 to 100.
        noise: s2, added to the kernel matrix's diagonal; raised by tens up to 1e-3, with a warning, where the matrix is not positive definite.

    Attributes:
        length_scale: l.
        noise: the s2 that was enough.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, no point, an unknown kernel, noise or length scale not positive.
        RuntimeError: no noise up to 1e-3 was enough.

    Examples:
        >>> x = torch.rand(60, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> surrogate = GradientSurrogate(x, 3 * x[:, 0], "rbf", length_scale=10.0)
        >>> surrogate.gradient(torch.full((10,), 0.5, dtype=torch.float64))[0].round(decimals=1)
        tensor(3., dtype=torch.float64)
    """

    def __init__(self, x: Any, y: Any, kernel: Kernel = "matern52", length_scale: float | None = None, noise: float = 1e-6) -> None:
        check_choice(get_args(Kernel), kernel=kernel)
        check_positive(noise=noise, **({} if length_scale is None else {"length_scale": length_scale}))
        self.kernel: Kernel = kernel
        self.x, y = as_queries(x, y)
        self.y_scaled, self.mean_y, self.range_y = scaled(y)
        self.centre = self.x.mean(dim=0)  # distances from near the points lose fewer digits
        self.centred = self.x - self.centre
        distances = self._distances(self.centred)
        distances.fill_diagonal_(0.0)
        self.length_scale = float(length_scale if length_scale is not None else self._most_likely(distances, noise))
        self.factor, self.noise = factor_of(value(distances, self.length_scale, kernel), noise)
        self.weights = torch.cholesky_solve(self.y_scaled[:, None], self.factor)[:, 0]

    def mean(self, z: Any) -> Float64[Tensor, "*m"]:
        """mu(z) = mean + range k(z)' a at a point [d], or at points [m, d]."""
        return self.mean_y + self.range_y * (value(self._distances(self._at(z)), self.length_scale, self.kernel) @ self.weights)

    def gradient(self, z: Any) -> Float64[Tensor, "*m d"]:
        """grad mu(z) = - range sum_n h(|z - x_n|) a_n (z - x_n) at a point [d], or at points [m, d]."""
        at = self._at(z)
        weighted = slope(self._distances(at), self.length_scale, self.kernel) * self.weights
        return -self.range_y * (weighted.sum(dim=-1, keepdim=True) * at - weighted @ self.centred)

    def uncertainty(self, c: Any) -> Float64[Tensor, "m"]:
        """The trace of the gradient's covariance at candidates [m, d], for a signal of variance 1.

        u = d h(0) - [|c|^2 rowsum(HA * H) - 2 rowsum(HA * H * P) + rowsum((H (A * S)) * H)], H = h(C, X), S = X X', P = C X', A the inverse.
        """
        c = self._at(c)
        h = slope(self._distances(c), self.length_scale, self.kernel)
        inverse = torch.cholesky_inverse(self.factor)
        ha_h = (h @ inverse).mul_(h)
        known = c.square().sum(dim=-1) * ha_h.sum(dim=-1)
        known -= 2 * (ha_h * (c @ self.centred.T)).sum(dim=-1)
        known += ((h @ (inverse * (self.centred @ self.centred.T))) * h).sum(dim=-1)
        return c.shape[-1] * slope_at_zero(self.length_scale, self.kernel) - known

    def _at(self, z: Any) -> Tensor:
        z = torch.as_tensor(z, dtype=torch.float64, device=self.x.device)
        if z.shape[-1:] != self.x.shape[1:]:
            raise ValueError(f"z has the shape {tuple(z.shape)}; expected points of {self.x.shape[1]} numbers")
        return z - self.centre

    def _distances(self, c: Tensor) -> Float64[Tensor, "*m n"]:
        """|c - x_n|, of points that lie around the centre."""
        squares = c.square().sum(dim=-1, keepdim=True) + self.centred.square().sum(dim=-1)
        return (squares - 2 * (c @ self.centred.T)).clamp_(min=0.0).sqrt_()  # rounding makes some squares slightly negative

    def _most_likely(self, distances: Tensor, noise: float) -> Tensor:
        """The length scale with the largest profile likelihood -n/2 ln(y~' a / n) - sum ln diag(L)."""
        n = len(distances)
        scales = SCALES.to(distances.device)
        matrices = value(distances, scales[:, None, None], self.kernel) + noise * torch.eye(n, device=distances.device, dtype=torch.float64)
        factors, faults = torch.linalg.cholesky_ex(matrices)
        good = faults == 0
        if not good.any() or not self.y_scaled.any():  # a constant has no scale
            return scales[len(scales) // 2]
        weights = torch.cholesky_solve(self.y_scaled[:, None].expand(len(scales), n, 1), factors)[..., 0]
        likelihood = -n / 2 * (weights @ self.y_scaled / n).clamp(min=FLOOR).log() - factors.diagonal(dim1=1, dim2=2).log().sum(dim=-1)
        return scales[likelihood.where(good, -math.inf).argmax()]


def factor_of(matrix: Tensor, noise: float) -> tuple[Float64[Tensor, "n n"], float]:
    """The Cholesky factor of a kernel matrix with noise on its diagonal, which is written into, and the noise that was enough.

    Raises:
        RuntimeError: no noise up to 1e-3 was.
    """
    diagonal, added = matrix.diagonal(), noise
    before = diagonal.clone()
    while True:
        diagonal.copy_(before + added)
        factor, fault = torch.linalg.cholesky_ex(matrix)
        if not fault:
            break
        if added * 10 > max(MOST_NOISE, noise) * (1 + 1e-9):
            raise RuntimeError(
                f"the kernel matrix of {len(matrix)} points is not positive definite with noise {added:g}; expected points apart"
            )
        added *= 10
    if added != noise:
        warnings.warn(f"the kernel matrix is not positive definite with noise {noise:g}; {added:g} is taken", stacklevel=4)
    return factor, added


def as_queries(x: Any, y: Any) -> tuple[Float64[Tensor, "n d"], Float64[Tensor, "n"]]:
    x = as_points(x)
    y = torch.as_tensor(y, dtype=torch.float64, device=x.device)
    if y.shape != (len(x),) or not len(y):
        raise ValueError(f"x has the shape {tuple(x.shape)} and y {tuple(y.shape)}; expected points [n, d] and values [n], n >= 1")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x or y holds NaN or infinite numbers; expected finite ones")
    return x, y


def as_points(x: Any) -> Float64[Tensor, "n d"]:
    x = torch.as_tensor(x, dtype=torch.float64)
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"x has the shape {tuple(x.shape)}; expected points [n, d]")
    return x


def scaled(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y - mean)/(max - min), the mean, the range: a constant's is 0, and with it its gradient."""
    mean, range_ = y.mean(), y.max() - y.min()
    return (y - mean) / (range_ + FLOOR), mean, range_


def value(distances: Tensor, length_scale: Any, kernel: Kernel) -> Tensor:
    """k: (1 + r + r^2/3) exp(-r) with r = sqrt(5) D / l for Matern 5/2, exp(-D^2 / (2 l^2)) for RBF."""
    if kernel == "rbf":
        return torch.exp(-0.5 * (distances / length_scale).square())
    r = math.sqrt(5) * distances / length_scale
    return (1 + r + r.square() / 3) * torch.exp(-r)


def slope(distances: Tensor, length_scale: float, kernel: Kernel) -> Tensor:
    """h, where grad_z k(z, x) = -h (z - x): 5/(3 l^2) (1 + r) exp(-r), or k/l^2."""
    if kernel == "rbf":
        return value(distances, length_scale, kernel) / length_scale**2
    r = math.sqrt(5) * distances / length_scale
    return slope_at_zero(length_scale, kernel) * (1 + r) * torch.exp(-r)


def slope_at_zero(length_scale: float, kernel: Kernel) -> float:
    return (1.0 if kernel == "rbf" else 5 / 3) / length_scale**2


@dataclass(frozen=True, eq=False, repr=False)
class RandomFeatures:
    """phi(x) = sqrt(2/M) cos(x W + b), whose products are near to the RBF kernel's.

    Args:
        w: W [d, M].
        b: b [M].

    Raises:
        ValueError: the shapes do not fit.

    Examples:
        >>> features = RandomFeatures.draw(3, 500, scale=1.0, seed=0)
        >>> features.fit(torch.rand(20, 3), torch.arange(20.0)).shape
        torch.Size([500])
    """

    w: Float64[Tensor, "d M"]
    b: Float64[Tensor, "M"]

    def __post_init__(self) -> None:
        for name in ("w", "b"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float64))
        if self.w.ndim != 2 or self.b.shape != self.w.shape[1:]:
            raise ValueError(f"w has the shape {tuple(self.w.shape)} and b {tuple(self.b.shape)}; expected [d, M] and [M]")

    @classmethod
    def draw(cls, d: int, features: int, scale: float = 1.0, seed: int = 0) -> RandomFeatures:
        """W ~ N(0, 1)/l and b ~ U(0, 2 pi) from a seed, the same wherever they are drawn.

        Args:
            d: numbers of a point.
            features: M.
            scale: l, the kernel's length scale.
            seed: of the draw.
        """
        check_whole(d=d, features=features)
        check_positive(scale=scale)
        rng = np.random.default_rng(seed)
        return cls(torch.from_numpy(rng.standard_normal((d, features)) / scale), torch.from_numpy(rng.uniform(0, 2 * np.pi, features)))

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.w.cpu().numpy().tobytes() + self.b.cpu().numpy().tobytes()).hexdigest()[:12]
        return f"RandomFeatures({self.w.shape[0]} x {self.w.shape[1]}, {digest})"

    def __call__(self, x: Any) -> Float64[Tensor, "n M"]:
        """phi of points [n, d].

        Raises:
            ValueError: points of another length.
        """
        if (x := as_points(x)).shape[1] != len(self.w):
            raise ValueError(f"x has the shape {tuple(x.shape)}; expected points of {len(self.w)} numbers")
        return math.sqrt(2 / len(self.b)) * torch.cos(torch.addmm(self.b, x, self.w))

    def fit(self, x: Any, y: Any, noise: float = 1e-6) -> Float64[Tensor, "M"]:
        """w = range Phi' (Phi Phi' + s2' I)^-1 y~ for points [n, d] and their values [n]: the dual form, a system of n equations.

        Raises:
            ValueError: shapes that do not fit, numbers that are not finite, no point, noise not positive.
            RuntimeError: no noise up to 1e-3 was enough; a warning tells where it was raised.
        """
        check_positive(noise=noise)
        x, y = as_queries(x, y)
        phi = self(x)
        y_scaled, _, range_y = scaled(y)
        factor, _ = factor_of(phi @ phi.T, noise)
        return range_y * (phi.T @ torch.cholesky_solve(y_scaled[:, None], factor)[:, 0])

    def gradient(self, z: Any, weights: Float64[Tensor, "M"]) -> Float64[Tensor, "d"]:
        """grad_z phi(z)' w = - sqrt(2/M) W (sin(z W + b) * w), linear in w.

        Raises:
            ValueError: weights of another length.
        """
        if weights.shape != self.b.shape:
            raise ValueError(
                f"the weights have the shape {tuple(weights.shape)}; expected ({len(self.b)},): the same features on every client"
            )
        z = torch.as_tensor(z, dtype=torch.float64, device=self.w.device)
        return -math.sqrt(2 / len(self.b)) * (self.w @ (torch.sin(z @ self.w + self.b) * weights))
