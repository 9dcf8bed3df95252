"""A diffusion model as the velocity of a flow (Proposition 1): noise levels and states mapped exactly, so that training begins at a flow.

x_t = (1 - t) x + t z with data x at t = 0, noise z at t = 1, and v = E[z - x | x_t]. The same point in other words:

    EDM:  sigma = t / (1 - t),                       x_sigma = x_t / (1 - t)
    VP:   alpha : sigma = 1 - t : t, alpha^2 + sigma^2 = 1,   x_vp = x_t (alpha + sigma) = x_t / sqrt((1 - t)^2 + t^2)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.checks import check_positive, check_whole
from fewer.diffusion._shared.noise_schedule import DiscreteSchedule
from fewer.diffusion._shared.prediction import at_least_single, check_prediction, to_epsilon

Velocity = Callable[..., Tensor]  # (x_t [B, *shape], t [] or [B], *condition) -> [B, *shape]
EPS = 1e-5  # how near to 0 and 1 times come


def check_times(t: Tensor) -> None:
    """ValueError unless all times are strictly between 0 and 1; on a GPU, where looking would wait for it, they are taken on trust."""
    if t.device.type != "cpu" or not t.numel() or torch.compiler.is_compiling():
        return
    low, high = t.aminmax()
    if not 0 < low.item() <= high.item() < 1:
        raise ValueError(f"t is {t.flatten()[:4].tolist()}; expected times strictly between 0 (data) and 1 (noise): draw them by sample_t")


def check_images(**images: Tensor) -> None:
    """ValueError naming the first that are no floats [B, *shape], such as bytes that were not scaled."""
    for name, x in images.items():
        if not x.is_floating_point() or x.ndim < 2:
            raise ValueError(f"{name} is {tuple(x.shape)} {x.dtype}; expected floats [B, *shape]: scale bytes by x / 127.5 - 1")


def check_answer(answer: Tensor, x: Tensor) -> None:
    """ValueError where a model's answer has another shape than its states, and would be stretched to theirs."""
    if answer.shape != x.shape:
        raise ValueError(f"the model answers {tuple(answer.shape)}; expected {tuple(x.shape)}, as the states that it is given")


def spread(t: Tensor, x: Tensor) -> Tensor:
    """Times [] or [B] in the type of x (float32 at least), shaped to multiply it."""
    t = t.to(x.device, at_least_single(x.dtype))
    return t.reshape(-1, *[1] * (x.ndim - 1)) if t.ndim else t


class VelocityFromEDM(nn.Module):
    """v(x_t, t) = (x_t - D(x_t / (1 - t); t / (1 - t))) / t of a denoiser, a 1-rectified flow before any training.

    Args:
        denoiser: D(x, sigma, *condition), x = data + sigma * noise, sigma [] or [B]; all of its preconditioning is inside it. It is called
            in float32, or float64 where x is.
        sigma_max: the largest sigma that it knows; at times that stand for more it is asked at that of sigma_max, and its answer is divided
            by the true t (not in the paper). Without it, the default, sigma reaches 1e5, where a short training hardly ever comes.
        augment_dim: width of the `augment_labels` that the released networks take; they are zeros.

    Shapes: x_t [B, *shape] of any float type, t [] or [B] strictly between 0 and 1, velocity like x_t.

    Raises:
        ValueError: times outside (0, 1), an answer of another shape than x_t; a raw network of diffusers, without `sigma_data` (`fewer.diffusion.EDMPrecond` makes a denoiser
            of it); half-precision weights in a denoiser without `sigma_data`.

    Examples:
        >>> class Shrink(nn.Module):  # the denoiser of data N(0, 1)
        ...     def forward(self, x, sigma): return x / (1 + sigma**2)
        >>> VelocityFromEDM(Shrink())(torch.ones(1, 2), torch.tensor(0.5))
        tensor([[0., 0.]])
    """

    def __init__(self, denoiser: nn.Module, sigma_max: float | None = None, augment_dim: int = 0) -> None:
        super().__init__()
        if hasattr(denoiser, "config") and getattr(denoiser, "sigma_data", None) is None:
            raise ValueError(
                f"the teacher {type(denoiser).__name__} has no sigma_data; expected a denoiser D(x, sigma): wrap it as "
                "EDMPrecond(network, sigma_data=0.5), or take VelocityFromVP where it was trained with betas"
            )
        check_whole(least=0, augment_dim=augment_dim)
        if sigma_max is not None:
            check_positive(sigma_max=sigma_max)
        self.denoiser, self.sigma_max, self.augment_dim = denoiser, sigma_max, augment_dim

    def forward(self, x: Float[Tensor, "B *shape"], t: Tensor, *condition: Any) -> Float[Tensor, "B *shape"]:
        check_images(x=x)
        check_times(t)
        dtype = next((weight.dtype for weight in self.denoiser.parameters()), torch.float32)
        if at_least_single(dtype) != dtype and not hasattr(self.denoiser, "sigma_data"):
            raise ValueError(f"the denoiser's weights are {dtype}; expected float32 or float64: use torch.autocast, or an EDMPrecond")
        wide = x.to(at_least_single(x.dtype))  # x / (1 - t) overflows float16
        times = t.to(wide)
        asked = times if self.sigma_max is None else times.clamp(max=self.sigma_max / (1 + self.sigma_max))
        stretch = 1 / (1 - asked)  # products with a number a sample are quicker than quotients
        words = {"augment_labels": wide.new_zeros(len(x), self.augment_dim)} if self.augment_dim else {}
        clean = self.denoiser(wide * spread(stretch, wide), asked * stretch, *condition, **words)
        check_answer(clean, wide)
        return (wide - clean).mul_(spread(1 / times, wide)).to(x.dtype)


class VelocityFromVP(nn.Module):
    """The velocity of a network that was trained with betas, such as diffusers' `UNet2DModel`.

    The network is asked at x_t / sqrt((1 - t)^2 + t^2), which is its own state, at the fractional step whose sigma / alpha is t / (1 - t);
    at times beyond its first and last steps it is asked at these. Its weights may be half precision; all around it is float32 at least.

    Args:
        eps_model: `eps_model(x, timestep [B], *condition)`; gives a tensor or an object with `.sample`.
        alphas_cumprod: [T] of its scheduler, falling, strictly between 0 and 1.
        prediction_type: "epsilon", "sample" or "v_prediction", as its scheduler says.

    Shapes: as `VelocityFromEDM`.

    Examples:
        >>> from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
        >>> class Noise(nn.Module):  # of data N(0, 1): eps = sigma x, which is 0.707 x at t = 0.5
        ...     def forward(self, x, timestep): return 0.5**0.5 * x
        >>> v = VelocityFromVP(Noise(), DDPMScheduler().alphas_cumprod)(torch.ones(1, 2), torch.tensor(0.5))
        >>> bool(v.abs().max() < 1e-6)
        True
    """

    def __init__(self, eps_model: nn.Module, alphas_cumprod: Float[Tensor, "T"], prediction_type: str = "epsilon") -> None:
        super().__init__()
        check_prediction(prediction_type)
        levels = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        if levels.ndim != 1 or len(levels) < 2 or not bool(((levels > 0) & (levels < 1)).all() and (levels.diff() < 0).all()):
            raise ValueError(
                f"alphas_cumprod is {tuple(levels.shape)}; expected at least two falling numbers between 0 and 1: scheduler.alphas_cumprod"
            )
        self.eps_model, self.prediction_type = eps_model, prediction_type
        self.schedule = DiscreteSchedule(levels.log() / 2)

    def forward(self, x: Float[Tensor, "B *shape"], t: Tensor, *condition: Any) -> Float[Tensor, "B *shape"]:
        check_images(x=x)
        check_times(t)
        dtype = next((weight.dtype for weight in self.eps_model.parameters()), x.dtype)
        wide = x.to(at_least_single(x.dtype))
        state = wide / vp_scale(spread(t, wide))
        timestep = vp_timestep(self.schedule, t).to(x.device, at_least_single(dtype)).expand(len(x))
        output = self.eps_model(state.to(dtype), timestep, *condition)
        output = output if isinstance(output, Tensor) else output.sample
        return vp_velocity(self.schedule, output.to(wide.dtype), wide, t, self.prediction_type).to(x.dtype)


def vp_scale(t: Any) -> Any:
    """x_t / x_vp = 1 / (alpha + sigma) = sqrt((1 - t)^2 + t^2), of times or of a number."""
    return ((1 - t) ** 2 + t**2) ** 0.5


def vp_timestep(schedule: DiscreteSchedule, t: Tensor) -> Tensor:
    """The network's own, fractional time at t, float64 on the CPU: from 0 to T - 1."""
    t = t.detach().to("cpu", torch.float64)
    return schedule.timestep(schedule.inverse(torch.log1p(-t) - t.log()).clamp(schedule.t_min, schedule.t_max))


def vp_velocity(
    schedule: DiscreteSchedule, output: Float[Tensor, "B *shape"], x: Float[Tensor, "B *shape"], t: Tensor, prediction_type: str
) -> Float[Tensor, "B *shape"]:
    """v at x = x_t from the network's output there.

    v = (eps - x_t) / (1 - t) is exact at every t; but where the network knows no noise level as high (t above t_c), it would multiply the
    error of eps by up to 1e5. There the clean image is read off at the network's last level, and v = (x_t - x_0) / t.
    """
    at = schedule.time(vp_timestep(schedule, t))
    alpha, sigma = (spread(value, x) for value in (schedule.alpha(at), schedule.sigma(at)))
    column = spread(t, x)
    state = x / vp_scale(column)
    eps = to_epsilon(output, state, alpha, sigma, prediction_type)
    beyond = spread(at >= schedule.t_max, x).bool()
    return torch.where(beyond, (x - (state - sigma * eps) / alpha) / column, (eps - x) / (1 - column))
