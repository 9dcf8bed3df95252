"""Fields to train on, made here: vorticity on a torus and Burgers' equation, pseudo-spectral, Crank-Nicolson and Adams-Bashforth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fewer.checks import check_not_negative, check_positive, check_whole
from fewer.signals.transform_once.transforms import at_least_single

Rate = Callable[[Tensor], Tensor]


def navier_stokes(
    n_samples: int, resolution: int, viscosity: float = 1e-3, T: float = 10.0, dt: float = 0.02, seed: int = 0, *,
    forcing: float = 0.1, w0: Float[Tensor, "N n n"] | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "N n n"], Float[Tensor, "N n n"]]:  # fmt: skip
    """Vorticity on the unit torus now and at time T: dw/dt + u . grad w = viscosity Laplace w + f.

    Args:
        n_samples: fields; initial ones are Gaussian with covariance 7^3 (-Laplace + 49)^(-2.5).
        resolution: points of each axis.
        viscosity: of the fluid; 0 or more.
        T, dt: the time to go, and a step of it.
        seed: of the initial fields.
        forcing: a in f = a (sin 2 pi (x + y) + cos 2 pi (x + y)).
        w0: initial fields in place of drawn ones.

    Returns:
        (w0, wT), each [N, n, n].

    Examples:
        >>> w0, w = navier_stokes(2, 16, T=0.1)
        >>> w.shape, (w.mean((1, 2)).abs() < 1e-5).all().item()
        (torch.Size([2, 16, 16]), True)
    """
    check_whole(n_samples=n_samples, resolution=resolution)
    check_not_negative(viscosity=viscosity, forcing=forcing)
    check_positive(T=T, dt=dt)
    n = resolution
    k = 2 * math.pi * torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
    kx, ky = (each.to(dtype) for each in torch.meshgrid(k, 2 * math.pi * torch.arange(n // 2 + 1, dtype=torch.float64), indexing="ij"))
    laplace = kx**2 + ky**2
    if w0 is None:
        noise = torch.randn(n_samples, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
        root = (7**1.5 * (laplace + 49) ** -1.25).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(0.0, dtype=dtype))
        w0 = torch.fft.irfft2(torch.fft.rfft2(noise) * root, s=(n, n)) * n
    w0 = _started(w0, (n, n), dtype, "w0")
    x = torch.arange(n, dtype=dtype) / n
    phase = 2 * math.pi * (x[:, None] + x)
    forced = torch.fft.rfft2(forcing * (torch.sin(phase) + torch.cos(phase)))
    inside = ((kx.abs() < 2 * math.pi * n / 3) & (ky < 2 * math.pi * n / 3)).to(dtype)  # the two-thirds rule
    inverse = torch.where(laplace > 0, 1 / laplace.clamp(min=1e-12), torch.zeros(()))

    def rate(w: Tensor) -> Tensor:
        """f - u . grad w with u = (psi_y, -psi_x), -Laplace psi = w."""
        psi = w * inverse
        fields = torch.fft.irfft2(torch.stack([1j * ky * psi, -1j * kx * psi, 1j * kx * w, 1j * ky * w]), s=(n, n))
        return forced - inside * torch.fft.rfft2(fields[0] * fields[2] + fields[1] * fields[3])

    w = _march(torch.fft.rfft2(w0), rate, viscosity * laplace, T, dt)
    return w0, torch.fft.irfft2(w, s=(n, n))


def burgers(
    n_samples: int, resolution: int, viscosity: float = 1e-2, T: float = 1.0, dt: float = 1e-3, seed: int = 0, *,
    u0: Float[Tensor, "N n"] | None = None, dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "N n"], Float[Tensor, "N n"]]:  # fmt: skip
    """du/dt + u du/dx = viscosity d2u/dx2 on the unit circle: (u at 0, u at T), each [N, n]; smooth Gaussian initial states.

    Examples:
        >>> u0, u = burgers(2, 32, T=0.1)
        >>> u.shape
        torch.Size([2, 32])
    """
    check_whole(n_samples=n_samples, resolution=resolution)
    check_not_negative(viscosity=viscosity)
    check_positive(T=T, dt=dt)
    n = resolution
    k = 2 * math.pi * torch.arange(n // 2 + 1, dtype=dtype)
    if u0 is None:
        noise = torch.randn(n_samples, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
        u0 = torch.fft.irfft(torch.fft.rfft(noise) * 25 / (k**2 + 25), n=n) * math.sqrt(n)
    u0 = _started(u0, (n,), dtype, "u0")
    inside = (k < 2 * math.pi * n / 3).to(dtype)

    def rate(u: Tensor) -> Tensor:
        return -0.5j * k * inside * torch.fft.rfft(torch.fft.irfft(u, n=n) ** 2)

    return u0, torch.fft.irfft(_march(torch.fft.rfft(u0), rate, viscosity * k**2, T, dt), n=n)


def _started(fields: Any, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    """Initial fields, ValueError unless they are of this resolution."""
    fields = torch.as_tensor(fields, dtype=dtype)
    if fields.ndim != len(shape) + 1 or tuple(fields.shape[1:]) != shape:
        raise ValueError(f"{name} has shape {tuple(fields.shape)}; expected [N, {', '.join(map(str, shape))}]: give its own resolution")
    return fields


def _march(state: Tensor, rate: Rate, decay: Tensor, T: float, dt: float) -> Tensor:
    """d state / dt = rate(state) - decay state: the second by Crank-Nicolson, the first by Adams-Bashforth of order 2."""
    steps = max(1, round(T / dt))
    dt = T / steps
    before: Tensor | None = None
    for _ in range(steps):
        now = rate(state)
        push = now if before is None else 1.5 * now - 0.5 * before
        state = ((1 - dt / 2 * decay) * state + dt * push) / (1 + dt / 2 * decay)
        before = now
    return state


def spectral_resize(x: Float[Tensor, "... n"], n: int | Sequence[int]) -> Float[Tensor, "... N"]:
    """Periodic fields at another resolution of their last axes, by zero-padding or cutting their spectra.

    Examples:
        >>> x = torch.cos(2 * torch.pi * torch.arange(4) / 4)
        >>> torch.allclose(spectral_resize(x, 8), torch.cos(2 * torch.pi * torch.arange(8) / 8), atol=1e-6)
        True
    """
    if not x.dtype.is_floating_point:
        raise ValueError(f"x is {x.dtype}; expected real floating-point fields: resize real and imaginary parts apart")
    given, sizes = x.dtype, (n,) if isinstance(n, int) else tuple(n)
    for axis, size in zip(range(-len(sizes), 0), sizes, strict=True):
        check_whole(n=size)
        old = x.shape[axis]
        if size == old:
            continue
        spectrum = torch.fft.rfft(at_least_single(x).movedim(axis, -1))
        small = min(old, size)
        spectrum = spectrum[..., : small // 2 + 1].clone()
        if small % 2 == 0:  # the fastest wave of an even length stands for two
            spectrum[..., -1] *= 0.5 if size > old else 2
        x = (torch.fft.irfft(spectrum, n=size) * (size / old)).movedim(-1, axis)
    return x.to(given)
