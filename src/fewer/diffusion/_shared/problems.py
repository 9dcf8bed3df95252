"""What samplers are tried on: flows from noise to data whose end is known, exactly or from many steps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fewer.data import WEIGHTS, folder_of, made_once
from fewer.diffusion._shared.gaussian_mixture import GaussianMixture
from fewer.diffusion._shared.noise_schedule import EDMSchedule, NoiseSchedule
from fewer.tasks import DigitsDiffusion
from fewer.tasks.digit_sampling import SIGMA_MAX, SIGMA_MIN, Denoise

GUIDANCE = 4.0  # of the digits
NOISES = 100


@dataclass(frozen=True)
class Flow:
    """Something to sample: x = clean + sigma * noise, from the schedule's largest sigma to its smallest.

    Attributes:
        denoise: D(x, sigma), sigma a number or a scalar tensor.
        schedule: EDM's (alpha is 1, t is sigma).
        reference: where noises end on the exact or converged flow.
    """

    denoise: Denoise
    schedule: EDMSchedule
    reference: Callable[[Tensor], Tensor]

    @property
    def ends(self) -> tuple[float, float]:
        """The largest sigma and the smallest."""
        return self.schedule.t_max, self.schedule.t_min

    def noise(self, *shape: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Float[Tensor, "B *shape"]:
        """Where sampling begins."""
        return self.schedule.t_max * torch.randn(*shape, generator=generator, dtype=dtype)

    def epsilon(self, x: Float[Tensor, "B *shape"], t: Tensor) -> Float[Tensor, "B *shape"]:
        """The noise in x at t = sigma."""
        sigma = t.to(x)
        return (x - self.denoise(x, sigma)) / sigma


Draw = Callable[[torch.Generator], tuple[Flow, Tensor]]  # what is sampled, and noises to begin with


def random_mixture(dim: int, components: int) -> GaussianMixture:
    """Means 0.5 randn, variances (0.02 + 0.1 u_ci) u_i, weights softmax(randn)."""
    draw = torch.Generator().manual_seed(dim)
    means = 0.5 * torch.randn(components, dim, generator=draw, dtype=torch.float64)
    each, shared = (torch.rand(rows, dim, generator=draw, dtype=torch.float64) for rows in (components, 1))
    weights = torch.softmax(torch.randn(components, generator=draw, dtype=torch.float64), 0)
    return GaussianMixture(means, weights, (0.02 + 0.1 * each) * shared.clamp(min=0.01))


def mixture_flow(data: GaussianMixture, sigma_max: float = 20.0, sigma_min: float = 0.02) -> Flow:
    """A mixture, whose exact ends are made once on a machine."""
    return Flow(data.denoiser, NoiseSchedule.edm(sigma_min, sigma_max), lambda x: exact_ends(data, x, sigma_max, sigma_min))


def exact_ends(data: GaussianMixture, x: Float64[Tensor, "B D"], sigma_max: float, sigma_min: float) -> Float64[Tensor, "B D"]:
    """Where the exact flow takes noises x, made once on a machine."""
    given = b"".join(each.numpy().tobytes() for each in (data.means, data.weights, data.variances, x.contiguous()))
    what = {"of": hashlib.sha256(given).hexdigest(), "ends": [sigma_max, sigma_min]}
    return kept("flows", "mixture", what, lambda: data.transport(x, sigma_max, sigma_min))


def digits_flow(digits: DigitsDiffusion, label: Tensor | None = None) -> Flow:
    """The digits, without labels or guided to them."""
    schedule = NoiseSchedule.edm(SIGMA_MIN, SIGMA_MAX)
    if label is None:
        return Flow(digits.denoiser, schedule, digits.reference)
    return Flow(digits.guided(GUIDANCE, label), schedule, lambda x: digits.reference(x, GUIDANCE, label))


def digits_draws(digits: DigitsDiffusion) -> dict[str, Draw]:
    """ "images" are digits without labels, "guided" those guided to drawn labels from the same noises."""
    plain = digits_flow(digits)

    def images(draw: torch.Generator) -> tuple[Flow, Tensor]:
        return plain, plain.noise(NOISES, *digits.shape, generator=draw)

    def guided(draw: torch.Generator) -> tuple[Flow, Tensor]:
        _, noise = images(draw)
        return digits_flow(digits, torch.randint(10, (NOISES,), generator=draw)), noise

    return {"images": images, "guided": guided}


def kept(kind: str, name: str, what: dict[str, object], make: Callable[[], Tensor]) -> Tensor:
    """A tensor that is made once on a machine, under a hash of what it is."""
    from safetensors.torch import load_file, save_file

    return load_file(made_once(folder_of(kind, name, what), lambda folder: save_file({"x": make()}, folder / WEIGHTS)) / WEIGHTS)["x"]
