"""Estimating the empirical model statistics of a network (section 3.2, appendix on their computation) from Jacobian-vector products.

f and its total derivative along the ODE are linear in four values of a point:

    u = (sigma eps - x) / alpha,   y = x / alpha,   u' = e^-lambda eps^(1),   y' = -e^-lambda eps = -(u + y),
    f = u + (1 - l) y,             f^(1) = u' + (1 - l) y' - l' y.

So the sums of u, y, u' and their products over the samples are all that s and b need, whatever l turns out to be: one pass over the
samples does, with two Jacobian-vector products a point. Where l is near 1, f is near u, and nothing cancels.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewer.checks import check_choice, check_whole
from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion._shared.derivatives import Mode, directional
from fewer.diffusion._shared.prediction import Epsilon, NetworkEpsilon
from fewer.diffusion.dpm_solver_v3.ems import EMS, model_hash

FEWEST_SAMPLES = 64
NO_VARIANCE = 1e-10  # of E f^2: below it f is a constant and s is 0 (not in the paper)
SUM_ROUNDING = 1e-14  # of the float64 sums that the variance of f is a difference of
POINT_ROUNDING = 16  # roundings of x / alpha, in the computation's own type, that f may err by: variance below that is noise


@dataclass
class Moments:
    """Sums or means over the samples at one lambda, float64 [*shape]: of sigma (J v) v, and of u, y, p = u' and their products."""

    diagonal: Tensor
    of: dict[str, Tensor]

    def plus(self, other: Moments) -> Moments:
        return Moments(self.diagonal + other.diagonal, {name: value + other.of[name] for name, value in self.of.items()})

    def divided_by(self, count: int) -> Moments:
        return Moments(self.diagonal / count, {name: value / count for name, value in self.of.items()})


@dataclass(frozen=True)
class PointTerms:
    """Of samples at one lambda, float64 [B, *shape]: u, y, u', and sigma (J v) v."""

    u: Tensor
    y: Tensor
    p: Tensor
    diagonal: Tensor

    def moments(self) -> Moments:
        u, y, p = self.u, self.y, self.p
        products = {"u": u, "y": y, "p": p, "uu": u * u, "uy": u * y, "yy": y * y, "up": u * p, "yp": y * p}
        return Moments(self.diagonal.sum(0), {name: value.sum(0) for name, value in products.items()})


def f_and_derivative(terms: PointTerms, l: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:  # noqa: E741
    """f and f^(1) of each sample, [B, *shape], for l and its slope l' over lambda."""
    u, y = terms.u, terms.y
    return u + (1 - l) * y, terms.p - (1 - l) * (u + y) - slope * y


def regression(
    moments: Moments,
    l: Tensor,  # noqa: E741
    slope: Tensor,
    dtype: torch.dtype = torch.float64,
) -> tuple[Float64[Tensor, "*shape"], Float64[Tensor, "*shape"]]:
    """(s, b): per element the line f^(1) = s f + b through the samples; s = 0 where f varies by no more than `dtype` rounds."""
    m, c, d = moments.of, 1 - l, -slope
    # of y' = -(u + y)
    q, uq, yq = -(m["u"] + m["y"]), -(m["uu"] + m["uy"]), -(m["uy"] + m["yy"])
    mean_f = m["u"] + c * m["y"]
    mean_derivative = m["p"] + c * q + d * m["y"]
    square = m["uu"] + 2 * c * m["uy"] + c**2 * m["yy"]
    product = m["up"] + c * uq + d * m["uy"] + c * (m["yp"] + c * yq + d * m["yy"])
    variance = square - mean_f**2
    rounding = SUM_ROUNDING + (POINT_ROUNDING * torch.finfo(dtype).eps) ** 2
    varies = variance > NO_VARIANCE * square + rounding * (m["uu"] + (1 + c**2) * m["yy"])
    s = torch.where(varies, (product - mean_f * mean_derivative) / torch.where(varies, variance, 1.0), 0.0)
    return s, mean_derivative - s * mean_f


def point_terms(
    eps: Epsilon, schedule: NoiseSchedule, clean: Tensor, noise: Tensor, probe: Tensor, lambda_: Tensor, mode: Mode = "forward"
) -> PointTerms:
    """Two Jacobian-vector products at x = alpha clean + sigma noise.

    Args:
        probe: v of +1 and -1, shaped like x.
        lambda_: float64 scalar.
    """
    one = (torch.ones_like(lambda_),)
    t, t_slope = directional(schedule.inverse, (lambda_,), one, "forward")  # dt / dlambda
    _, log_alpha_slope = directional(lambda value: schedule.log_alpha(schedule.inverse(value)), (lambda_,), one, "forward")
    alpha, sigma = (each.to(clean.device) for each in (schedule.alpha(t), schedule.sigma(t)))
    x = (alpha * clean.double() + sigma * noise.double()).to(clean.dtype)
    noise_seen, along_probe = directional(lambda state: eps(state, t), (x,), (probe,), mode)
    if noise_seen.shape != x.shape:
        raise ValueError(
            f"eps gives {tuple(noise_seen.shape)} for x {tuple(x.shape)}; expected the shape of x: a network of one noise each"
        )
    double, seen = x.double(), noise_seen.double()  # u is a difference of two large numbers at noisy times
    x_slope = log_alpha_slope.to(double) * double - sigma * seen  # dx / dlambda
    _, along_flow = directional(eps, (x, t), (x_slope.to(x.dtype), t_slope), mode)  # eps^(1)
    return PointTerms(
        (sigma * seen - double) / alpha, double / alpha, sigma / alpha * along_flow.double(), sigma * (along_probe * probe).double()
    )


def estimate_ems(
    eps: Epsilon,
    schedule: NoiseSchedule,
    data: Float[Tensor, "M *shape"],
    num_timesteps: int = 120,
    num_samples: int = 1024,
    batch_size: int = 256,
    common_noise: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = True,
    mode: Mode | None = None,
    model: nn.Module | None = None,
) -> EMS:
    """l, s and b of a noise predictor, on a grid of equal steps of lambda over the schedule's whole range.

    Costs two Jacobian-vector products a sample and grid point. The paper takes N = 120 to 1200 and K = 1024 to 4096.

    Args:
        eps: eps(x, t) at a float64 scalar t of the schedule (`as_epsilon` makes one of a network); without guidance, also where the
            sampler is guided at moderate scales. Its `class_labels` and the like have a row for each of the M samples.
        data: clean samples as the network saw them in training, or (guided latent models) samples of the model: not the noises that are
            sampled from later. Their device and type are those of the computation (sums are float64); float32 or float64.
        num_timesteps: N; the grid has one point more.
        num_samples: K.
        batch_size: samples in one call.
        common_noise: the same samples, noises and probes at every lambda (not in the paper): else l is a noisy curve, and the error of
            many steps stops falling.
        generator: on the CPU; draws samples, noises and probes.
        progress: show a bar on a terminal.
        mode: "forward", or "double-backward" for a network that torch has no forward derivative of, as of most of diffusers' U-Nets
            (about a third dearer); by default forward where it works.
        model: where given, its hash is kept with the EMS.

    Raises:
        ValueError: data of a shape that the network does not take, or a network that cannot be differentiated.

    Examples:
        >>> schedule = NoiseSchedule.edm(0.02, 20.0)
        >>> data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> ems = estimate_ems(lambda x, t: x * t / (1 + t**2), schedule, data, num_timesteps=8, num_samples=64, progress=False)
        >>> torch.allclose(ems.l[:, 0].double(), 1 / (1 + (2 * ems.lambdas).exp()), atol=1e-6)
        True
    """
    check_whole(least=2, num_timesteps=num_timesteps)
    check_whole(num_samples=num_samples, batch_size=batch_size)
    check_choice((None, "forward", "double-backward"), mode=mode)
    if data.dtype not in (torch.float32, torch.float64) or data.ndim < 2 or not len(data):
        raise ValueError(
            f"data is {tuple(data.shape)} {data.dtype}; expected float32 or float64 samples [M, *shape], M >= 1: convert them and the "
            "network with .float(), as derivatives in half precision are noise"
        )
    if num_samples < FEWEST_SAMPLES:
        warnings.warn(f"{num_samples} samples give noisy statistics; {FEWEST_SAMPLES} or more are better", stacklevel=2)
    first, last = (float(schedule.lambda_(torch.tensor(t, dtype=torch.float64))) for t in (schedule.t_max, schedule.t_min))
    lambdas = torch.linspace(first, last, num_timesteps + 1, dtype=torch.float64)
    draws = _Draws(data, num_samples, batch_size, common_noise, generator)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward derivative
        chosen = _mode_that_works(eps, schedule, draws, lambdas[num_timesteps // 2], mode)

    def moments_at(i: int) -> Moments:
        parts = (
            point_terms(_of_rows(eps, rows, len(data)), schedule, clean, noise, probe, lambdas[i], chosen).moments()
            for rows, clean, noise, probe in draws.at(i)
        )
        return functools.reduce(Moments.plus, parts).divided_by(num_samples)

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        console = Console(stderr=True)
        steps = track(
            range(num_timesteps + 1), "empirical model statistics", console=console, disable=not (progress and console.is_terminal)
        )
        curves = _finish((moments_at(i) for i in steps), float(lambdas[1] - lambdas[0]), data.dtype)
    meta = {
        "model": model_hash(model) if model is not None else None,
        "num_samples": num_samples,
        "common_noise": common_noise,
        "schedule": type(schedule).__name__,
    }
    return EMS(lambdas, *(torch.stack(curve).float().cpu() for curve in curves), meta=meta)


def _finish(moments: Iterator[Moments], spacing: float, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """l, s and b of each lambda; of the moments only those of three neighbours are held at once."""
    l, s, b = [], [], []  # noqa: E741
    waiting: Moments | None = None
    for here in moments:
        l.append(here.diagonal)
        if waiting is not None:
            behind = l[-3] if len(l) > 2 else l[-2]
            slope = (l[-1] - behind) / (spacing * (2 if len(l) > 2 else 1))  # central inside, one-sided at the first
            for curve, value in zip((s, b), regression(waiting, l[-2], slope, dtype), strict=True):
                curve.append(value)
        waiting = here
    assert waiting is not None
    for curve, value in zip((s, b), regression(waiting, l[-1], (l[-1] - l[-2]) / spacing, dtype), strict=True):
        curve.append(value)
    return l, s, b


class _Draws:
    """Clean samples, noises and probes, drawn again from their seeds at every lambda: nothing but the seeds is kept."""

    def __init__(self, data: Tensor, count: int, batch: int, common: bool, generator: torch.Generator | None) -> None:
        self.data, self.common = data, common
        self.sizes = [min(batch, count - start) for start in range(0, count, batch)]
        self.seed = int(torch.randint(2**40, (1,), generator=generator))
        self.rows = self._rows(torch.Generator().manual_seed(self.seed), count)

    def _rows(self, generator: torch.Generator, count: int) -> Tensor:
        every = [torch.randperm(len(self.data), generator=generator) for _ in range(-(-count // len(self.data)))]
        return torch.cat(every)[:count]

    def at(self, i: int) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(rows of the data, clean samples, noises, probes), batch by batch."""
        draw = torch.Generator().manual_seed(self.seed + 1 + (0 if self.common else i))
        rows = self.rows if self.common else self._rows(draw, len(self.rows))
        for part in rows.split(self.sizes):
            clean = self.data[part.to(self.data.device)]
            noise = torch.randn(clean.shape, generator=draw, dtype=clean.dtype)
            probe = torch.randint(2, clean.shape, generator=draw).to(clean.dtype) * 2 - 1
            yield part, clean, noise.to(clean.device), probe.to(clean.device)


def _of_rows(eps: Epsilon, rows: Tensor, count: int) -> Epsilon:
    """The network with the labels and the like of these rows of the data, where it has such."""
    return eps.of_rows(rows, count) if isinstance(eps, NetworkEpsilon) else eps


def _mode_that_works(eps: Epsilon, schedule: NoiseSchedule, draws: _Draws, lambda_: Tensor, wanted: Mode | None) -> Mode:
    """Call the network once, and once for its derivative, so that trouble with either is told apart; how it is differentiated."""
    rows, clean, noise, probe = (each[:2] for each in next(draws.at(0)))  # one sample alone hides what torch refuses of strides
    eps = _of_rows(eps, rows, len(draws.data))
    with torch.no_grad():
        try:
            eps(clean + noise, schedule.inverse(lambda_))
        except Exception as error:
            raise ValueError(
                f"the network does not take samples {tuple(clean.shape[1:])} ({type(error).__name__}: {error}); "
                "give data of its own shape and type, and a label for each of them where it takes labels"
            ) from error
        tried: Mode = wanted or "forward"
        try:
            point_terms(eps, schedule, clean, noise, probe, lambda_, tried)
        except (NotImplementedError, RuntimeError) as error:
            if wanted is None:
                return _mode_that_works(eps, schedule, draws, lambda_, "double-backward")
            remedy = 'give mode="double-backward"' if wanted == "forward" else "a differentiable network is needed"
            raise ValueError(f"the network cannot be differentiated in {wanted} mode ({error}); {remedy}") from error
    return tried
