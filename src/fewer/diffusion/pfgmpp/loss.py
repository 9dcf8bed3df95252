"""Training with PFGM++: EDM's loss and preconditioning with the heavy-tailed kernel in place of the Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.checks import check_choice, check_positive, is_number
from fewer.diffusion._shared.prediction import at_least_single
from fewer.diffusion.pfgmpp.perturbation import check_dimensions, check_images, check_sigma, per_sample, perturb, posterior_mean

SCHEDULES = ("edm", "ve")
SIGMA_DATA = 0.5  # of images in [-1, 1]
Denoiser = Callable[..., Tensor]  # (x [B, ...], sigma [B], **cond) -> E[y | x]


class PFGMPPLoss(nn.Module):
    """lambda(sigma) ||D(x; sigma) - y||^2, x from the kernel of D extra dimensions; all of EDM's settings stay as they are (section 4).

    Args:
        D: extra dimensions, any number above 0; math.inf is EDM's own loss. Of the paper: 128 (FFHQ) and 2048 (CIFAR-10).
        P_mean, P_std: ln sigma ~ N(P_mean, P_std^2) under the schedule "edm". For larger images add ln(380 / 80) to the mean.
        sigma_data: standard deviation of the data; 0.5 for images in [-1, 1].
        schedule: "edm" with the weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, or "ve": sigma log-uniform, weight 1 / sigma^2,
            which is the paper's regression to (x - y) / (r / sqrt(D)) (eq. 6).
        sigma_range: of the schedule "ve".

    Raises:
        ValueError: a setting out of range.

    Examples:
        >>> loss = PFGMPPLoss(D=128)
        >>> loss(lambda x, sigma: 0 * x, torch.ones(4, 1, 8, 8)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        D: float,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        sigma_data: float = SIGMA_DATA,
        schedule: str = "edm",
        sigma_range: tuple[float, float] = (0.02, 100.0),
    ) -> None:
        super().__init__()
        check_dimensions(D)
        check_positive(P_std=P_std, sigma_data=sigma_data)
        check_choice(SCHEDULES, schedule=schedule)
        check_range(*sigma_range)
        if not is_number(P_mean):
            raise ValueError(f"P_mean is {P_mean!r}; expected a finite number")
        self.D, self.P_mean, self.P_std, self.sigma_data = D, P_mean, P_std, sigma_data
        self.schedule, self.sigma_range = schedule, tuple(sigma_range)

    def draw_sigma(self, count: int, generator: torch.Generator | None = None, device: Any = None) -> Float[Tensor, "count"]:
        """Noise levels of a batch, float32."""
        if self.schedule == "edm":
            return (self.P_mean + self.P_std * torch.randn(count, generator=generator, device=device)).exp()
        low, high = self.sigma_range
        return low * (high / low) ** torch.rand(count, generator=generator, device=device)

    def weight(self, sigma: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """lambda(sigma)."""
        if self.schedule == "edm":
            return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return sigma**-2

    def forward(
        self,
        denoiser: Denoiser,
        y: Float[Tensor, "B *shape"],
        *,
        generator: torch.Generator | None = None,
        reference: Float[Tensor, "M *shape"] | None = None,
        **cond: Any,
    ) -> Float[Tensor, "B"]:
        """The loss of each sample, its mean over elements; one that is not finite is given as it is.

        Args:
            denoiser: called as `denoiser(x, sigma, **cond)` with x of y's dtype and sigma [B], float32 at least.
            y: data.
            generator: of noise levels and noises; on y's device. Each rank needs one of its own.
            reference: further data; where given, the target is the posterior mean over them and the batch itself, which has less variance
                (appendix; not for a denoiser that is told labels). The paper's best results do without.

        Raises:
            ValueError: data that are not floating-point, or a denoiser's answer or further data of another shape than y's.
        """
        check_images(y=y)
        dtype = at_least_single(y.dtype)
        sigma = self.draw_sigma(len(y), generator, y.device).to(dtype)
        x, target = perturb(y, sigma, self.D, generator), y
        if reference is not None:
            check_images(reference=reference)
            if reference.shape[1:] != y.shape[1:]:
                raise ValueError(f"reference is {tuple(reference.shape)}; expected [M, ...] with rows as y's {tuple(y.shape)}")
            target = posterior_mean(x.to(dtype), sigma, torch.cat([y, reference.to(y)]), self.D)
        error = answer(denoiser(x, sigma, **cond), x).to(dtype) - target.to(dtype)
        return self.weight(sigma) * error.square().reshape(len(y), math.prod(y.shape[1:])).mean(1)


class EDMPrecond(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise), EDM's preconditioning; the network is told sigma, not r (section 4).

    Args:
        net: F, called as `net(x, c_noise, **cond)`, c_noise = ln(sigma) / 4 [B]; a tensor or an object with `.sample`, as diffusers' models.
        sigma_data: standard deviation of the data.

    Shapes: x [B, ...], sigma [B] or a number above 0. What is not inside the network is computed in float32 at least, the network in the
    dtype of its parameters; the answer has x's.

    Raises:
        ValueError: an x that is not floating-point, a sigma that is not [B] or not above 0, or an answer of another shape than x.

    Examples:
        >>> denoiser = EDMPrecond(lambda x, c_noise: 0 * x)
        >>> denoiser(torch.ones(1, 2), 0.5)
        tensor([[0.5000, 0.5000]])
    """

    def __init__(self, net: Callable[..., Any], sigma_data: float = SIGMA_DATA) -> None:
        super().__init__()
        check_positive(sigma_data=sigma_data)
        self.net, self.sigma_data = net, sigma_data

    def forward(self, x: Float[Tensor, "B *shape"], sigma: Tensor | float, **cond: Any) -> Float[Tensor, "B *shape"]:
        check_images(x=x)
        dtype = at_least_single(x.dtype)
        level = torch.as_tensor(sigma, device=x.device).to(dtype)
        level = level if level.ndim else level.repeat(len(x))
        check_sigma(level, len(x))
        first = next(self.net.parameters(), None) if isinstance(self.net, nn.Module) else None
        inner = first.dtype if first is not None else dtype
        scaled = precondition_input(x.to(dtype), per_sample(level, x), self.sigma_data)
        output = self.net(scaled.to(inner), noise_condition(level).to(inner), **cond)
        output = answer(getattr(output, "sample", output), x)
        return precondition_output(x.to(dtype), output.to(dtype), per_sample(level, x), self.sigma_data).to(x.dtype)


def precondition_input(x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """c_in x, c_in = 1 / sqrt(sigma_data^2 + sigma^2)."""
    return x * (sigma**2 + sigma_data**2).rsqrt()


def precondition_output(x: Tensor, output: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """c_skip x + c_out F."""
    total = sigma**2 + sigma_data**2
    return sigma_data**2 / total * x + sigma * sigma_data * total.rsqrt() * output


def noise_condition(sigma: Tensor) -> Tensor:
    """c_noise = ln(sigma) / 4, in float32 wherever it is made, so that a scheduler's times are the denoiser's."""
    return sigma.float().log() / 4


def answer(denoised: Any, x: Tensor) -> Tensor:
    """What a denoiser says of x; ValueError where it has another shape."""
    shape = tuple(getattr(denoised, "shape", ())) or type(denoised).__name__
    if shape != tuple(x.shape):
        raise ValueError(f"the denoiser answers {shape}; expected a tensor {tuple(x.shape)}, the clean data behind x")
    return denoised


def check_range(sigma_min: float, sigma_max: float) -> None:
    """ValueError where the noise levels are not finite, above 0 and in order."""
    check_positive(sigma_min=sigma_min, sigma_max=sigma_max)
    if not sigma_min < sigma_max:
        raise ValueError(f"sigma_min is {sigma_min}, sigma_max {sigma_max}; expected sigma_min below sigma_max")
