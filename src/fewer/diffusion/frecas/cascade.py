"""The method: guidance by bands, and sampling through stages of growing size."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fewer.diffusion._shared.prediction import at_least_single
from fewer.diffusion.frecas.maps import MapStore
from fewer.diffusion.frecas.schedules import as_process, next_times, stage_times
from fewer.diffusion.frecas.stages import FreCaSConfig, Size

Generators = torch.Generator | Sequence[torch.Generator] | None  # one, one an image, or torch's own
Denoise = Callable[[Tensor, float, int, MapStore | None], Tensor]  # (x, time, stage, maps) -> the guided output of the network
Lift = Callable[[Tensor, Size], Tensor]  # (predicted clean sample, size of the next stage) -> the same at that size


def enlarge(images: Float[Tensor, "B C h w"], size: Size, how: str = "bilinear") -> Float[Tensor, "B C H W"]:
    """Images at another size: "bilinear" (no antialias, corners not aligned) or "nearest", computed in float32 at least."""
    wide = images.to(at_least_single(images.dtype))
    return F.interpolate(wide, size=size, mode=how, align_corners=False if how == "bilinear" else None).to(images.dtype)


def split_bands(v: Float[Tensor, "B C H W"], size: Size) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C H W"]]:
    """(high, low): low is v resized to `size` and back, bilinear; high is the rest. Section FA-CFG of the paper.

    Args:
        size: (height, width) of the former stage, in v's own units (latents, not pixels).

    low is no projection: low(low(v)) differs from low(v).

    >>> high, low = split_bands(torch.ones(1, 1, 8, 8), (4, 4))
    >>> float(high.abs().max()), float(low.mean())
    (0.0, 1.0)
    """
    low = enlarge(enlarge(v, size), (v.shape[-2], v.shape[-1]))
    return v - low, low


def band_guidance(
    uncond: Float[Tensor, "B C H W"], cond: Float[Tensor, "B C H W"], low: float, high: float, size: Size
) -> Float[Tensor, "B C H W"]:
    """eps_u + w_l low(eps_c - eps_u) + w_h high(eps_c - eps_u), computed in float32 at least.

    Args:
        uncond, cond: what the network says without and with the condition.
        low, high: the weights w_l and w_h.
        size: as `split_bands` takes it.
    """
    wide = at_least_single(uncond.dtype)
    fine, coarse = split_bands(cond.to(wide) - uncond.to(wide), size)
    return (uncond.to(wide) + low * coarse + high * fine).to(uncond.dtype)


def guided(config: FreCaSConfig, stage: int, uncond: Tensor, cond: Tensor, size: Size) -> Tensor:
    """Plain guidance in the first stage, by bands in later ones; `size` as `split_bands` takes it."""
    if stage:
        return band_guidance(uncond, cond, config.low, config.high_guidance, size)
    wide = at_least_single(uncond.dtype)
    return (uncond.to(wide) + config.guidance * (cond.to(wide) - uncond.to(wide))).to(uncond.dtype)


class Call(NamedTuple):
    """A call of the network that the cascade asks for."""

    stage: int
    time: float
    x: Tensor


def cascade_calls(
    config: FreCaSConfig, schedule: Any, lift: Lift, generators: Sequence[Generators], initial: Tensor, maps: MapStore | None = None
) -> Generator[Call, tuple[Tensor, Tensor], Tensor]:
    """FreCaS as a generator, for those who call the network themselves.

    It yields each call that is due, is sent (the guided output, x as it was given to the network), and returns the sample.

    Args:
        generators: one a stage, of its fresh noise.
        initial: unit noise of the first stage's size.
        The others are `cascade`'s.
    """
    process, plan = as_process(schedule), stage_times(config, schedule)
    if config.stepping == "released" and (process.prediction == "flow" or not process.whole):
        raise ValueError("stepping='released' is DDIM's guess; expected 'exact' for flow matching and EDM's schedule")
    x, dtype, last = initial, initial.dtype, len(plan) - 1
    if not process.whole:  # on EDM's schedule noise has the deviation of the first time
        x = process.noisy(torch.zeros_like(x), x, process.first)
    for stage, times in enumerate(plan):
        for i, (t, to) in enumerate(zip(times, next_times(times, config.stepping), strict=True)):
            leaving = stage < last and i == len(times) - 1
            if maps:
                maps.turn((x.shape[-2], x.shape[-1]), collecting=leaving, mixing=stage > 0)
            output, x = yield Call(stage, t, x)
            output, x = output.to(at_least_single(dtype)), x.to(at_least_single(dtype))
            if not leaving:
                x = process.step(output, x, t, to).to(dtype)
                continue
            # the predicted clean sample goes on, not the DDIM state: noise of the small size has no place in the large image
            if maps:
                maps.settle()
            clean, _ = process.estimates(output, x, t)
            larger = lift(clean.to(dtype), config.stages[stage + 1].grid)
            check_lifted(config, stage, x, larger)
            noise = drawn(larger.shape, generators[stage + 1]).to(larger.device, at_least_single(dtype))
            x = process.noisy(larger.to(noise), noise, plan[stage + 1][0]).to(dtype)
    return x


def cascade(
    denoise: Denoise, config: FreCaSConfig, schedule: Any, lift: Lift, generator: Generators = None, initial: Tensor | None = None
) -> Float[Tensor, "B C H W"]:
    """Sample through all stages of a cascade: sum n_j calls, each at its own size.

    Args:
        denoise: (x, time, stage, maps) -> the guided output of the network (see `guided`, `band_guidance`): noise, or what the scheduler's
            prediction_type says; the clean sample on EDM's schedule. `maps` is a `MapStore` where map_weight > 0, whose `keep` and `mix` the
            network's cross-attention calls; else None.
        schedule: a scheduler of diffusers, alphas_cumprod [T], a `DiscreteSchedule` or an `EDMSchedule`.
        lift: (predicted clean sample, (height, width) of the next stage) -> the same at that size; for pixels
            `lambda z, size: enlarge(z.clamp(-1, 1), size)`.
        generator: seeds one generator a stage before the first call, so that a stage's noise depends on nothing that was done before it.
        initial: unit noise [B, C, h, w] of the first stage, in the dtype to sample in.

    Source: arXiv 2410.18410.
    """
    if initial is None or initial.ndim != 4 or not initial.is_floating_point():
        given = None if initial is None else f"{tuple(initial.shape)} {initial.dtype}"
        raise ValueError(f"initial is {given}; expected unit noise [B, C, h, w] of the first stage's size, in floating point: torch.randn")
    if isinstance(generator, Sequence) and len(generator) != len(initial):
        raise ValueError(f"generator is a list of {len(generator)} for {len(initial)} images; expected one generator, or one an image")
    maps = MapStore(config.map_weight, config.map_resize) if config.map_weight and len(config.stages) > 1 else None
    calls = cascade_calls(config, schedule, lift, stage_generators(generator, len(config.stages)), initial, maps)
    return follow(calls, lambda call: denoise(call.x, call.time, call.stage, maps))


def check_lifted(config: FreCaSConfig, stage: int, x: Tensor, larger: Tensor) -> None:
    """ValueError where a lift left the plan's sizes: all later calls would be of another size than is told."""
    before, after = (each.grid for each in config.stages[stage : stage + 2])
    (h, w), (tall, wide) = x.shape[-2:], larger.shape[-2:]
    if tall * before[0] != h * after[0] or wide * before[1] != w * after[1]:
        raise ValueError(
            f"lift made {tall} x {wide} of {h} x {w}; expected as stages[{stage + 1}].size {after} stands to {before}: begin with noise of "
            "stages[0].size, and lift to the size that is given"
        )


def follow(calls: Any, answer: Callable[[Call], Tensor]) -> Tensor:
    """Answer all calls of `cascade_calls`; the sample."""
    call = next(calls)
    try:
        while True:
            call = calls.send((answer(call), call.x))
    except StopIteration as ended:
        return ended.value


def stage_generators(generator: Generators, count: int) -> list[Any]:
    """So many generators (or lists of them, one an image), seeded from the given one now; torch's own where none is given."""
    if isinstance(generator, Sequence):
        return [list(row) for row in zip(*(stage_generators(each, count) for each in generator), strict=True)]
    device = generator.device if generator is not None else torch.device("cpu")
    seeds = torch.randint(2**62, (count,), generator=generator, device=device).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def drawn(shape: Sequence[int], generator: Generators) -> Tensor:
    """Unit noise in float32 on the generator's device; with a list each image has its own."""
    if isinstance(generator, Sequence):
        return torch.cat([drawn((1, *shape[1:]), each) for each in generator])
    return torch.randn(*shape, generator=generator, device=generator.device if generator is not None else None)
