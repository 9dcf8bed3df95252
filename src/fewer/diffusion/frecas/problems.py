"""What is sampled above its training size: digits by a model of 16 x 16 pixels, a Gaussian field whose truth is known, a user's own pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fewer.diffusion._shared.peers import by_diffusers
from fewer.diffusion.frecas.cascade import enlarge, guided, stage_generators
from fewer.diffusion.frecas.maps import MapStore
from fewer.diffusion.frecas.pipeline import NETWORKS, FreCaSPipeline
from fewer.diffusion.frecas.schedules import karras_levels, matched_sigma
from fewer.diffusion.frecas.stages import FreCaSConfig, Stage
from fewer.files import read_json
from fewer.tasks import DigitsDiffusion, load_digits_diffusion
from fewer.tasks.digit_sampling import SIGMA_MAX, SIGMA_MIN, Denoise

STEPS, LATE_STEPS, GUIDANCE, BANDS = 20, 8, 3.0, 4
SMALL, LARGE = 16, 32
PROMPTS = ("a photograph of a cat", "a red house by a lake")
DenoiserOf = Callable[[int, MapStore | None], Denoise]  # (stage, maps) -> the guided denoiser there
LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")  # that a pipeline's parts may be of


def plan(end_sigma: float = 1.0, **words: Any) -> FreCaSConfig:
    """16 -> 32 pixels: the grid's levels above the end sigma and the call at it, then eight more."""
    above = int((levels(SIGMA_MAX, STEPS) > end_sigma).sum())
    stages = (Stage(SMALL, above + 1, end_sigma), Stage(LARGE, LATE_STEPS, 0))
    usual: dict[str, Any] = {"guidance": GUIDANCE, "high_guidance": GUIDANCE, "map_weight": 0.0}
    return FreCaSConfig(stages, **usual | words)


def levels(start: float, steps: int) -> Float64[Tensor, "steps_plus_1"]:
    """Karras' grid to the smallest sigma."""
    return torch.tensor(karras_levels(start, SIGMA_MIN, steps + 1), dtype=torch.float64)


def direct(denoise: Denoise, noise: Tensor) -> Tensor:
    """DPM-Solver++ 2M on Karras' grid at one size."""
    return by_diffusers("dpm++2m", denoise, SIGMA_MAX * noise, levels(SIGMA_MAX, STEPS))


@torch.no_grad()
def two_stages(denoiser: DenoiserOf, config: FreCaSConfig, noise: Tensor, generator: torch.Generator, clip: bool = True) -> Tensor:
    """FreCaS with DPM-Solver++ 2M on Karras' grid inside each stage, in place of DDIM."""
    first, last = config.stages
    maps = MapStore(config.map_weight, config.map_resize) if config.map_weight else None
    fresh = stage_generators(generator, 2)[1]
    denoise, grid = denoiser(0, maps), levels(SIGMA_MAX, STEPS)
    above = torch.cat([grid[grid > first.end_time], torch.tensor([first.end_time], dtype=torch.float64)])
    x = by_diffusers("dpm++2m", denoise, SIGMA_MAX * noise, above)
    if maps:
        maps.turn(first.grid, collecting=True, mixing=False)
    clean = denoise(x, first.end_time)
    larger = enlarge(clean.clamp(-1, 1) if clip else clean, last.grid, config.upsample)
    start = matched_sigma(first.end_time, config.ratio(1), config.gamma)
    x = larger + start * torch.randn(larger.shape, generator=fresh, dtype=larger.dtype)
    if maps:
        maps.settle()
        maps.turn(last.grid, collecting=False, mixing=True)
    return by_diffusers("dpm++2m", denoiser(1, maps), x, levels(start, last.steps))


@dataclass(frozen=True)
class Digits:
    """Digits of 32 x 32 pixels by a model that has seen 16 x 16 only, and what judges them."""

    model: DigitsDiffusion
    images: Tensor  # held out
    count: int

    def guided(self, config: FreCaSConfig, count: int, flags: tuple[int, int] = (0, 1)) -> DenoiserOf:
        """Guided to labels in turn; in the first stage plainly, in the second by bands. Two calls in one."""
        label = torch.arange(count) % 10
        both, network = torch.cat([torch.full_like(label, -1), label]), self.model.denoiser

        def denoiser(stage: int, maps: MapStore | None) -> Denoise:
            def denoise(x: Tensor, sigma: Any) -> Tensor:
                words: dict[str, Any] = {"mix": maps.mix, "keep": maps.keep} if maps else {}
                uncond, cond = network(x.repeat(2, 1, 1, 1), sigma, both, flags[stage], **words).chunk(2)
                return guided(config, stage, uncond, cond, (SMALL, SMALL))

            return denoise

        return denoiser

    def accuracy(self, images: Tensor) -> float:
        """Share of images whose label the classifier reads; labels in turn."""
        with torch.no_grad():
            return float((self.model._features(images).argmax(1) == torch.arange(len(images)) % 10).float().mean())


def digits(count: int) -> Digits:
    model = load_digits_diffusion("mnist_tiles")
    return Digits(model, model.data("test")[0], count)


def high_energy(images: Float[Tensor, "B C H W"]) -> float:
    """Mean power of the frequencies that the half size cannot hold, over both axes."""
    power = torch.fft.fft2(images.double()).abs().square().mean((0, 1))
    rows, columns = ((torch.fft.fftfreq(n) * n).abs() > n / 4 for n in images.shape[-2:])
    return float(power[rows[:, None] | columns].mean())


@dataclass(frozen=True)
class GaussianField:
    """A periodic field of 32 x 32 with a falling spectrum; at 16 x 16 its means of 2 x 2, whose spectrum is folded over."""

    powers: tuple[Tensor, Tensor]

    def denoiser(self, stage: int, maps: MapStore | None = None) -> Denoise:
        """E[clean | x] by Wiener's filter."""
        power = self.powers[stage]
        return lambda x, sigma: torch.fft.ifft2(torch.fft.fft2(x) * (power / (power + float(sigma) ** 2))).real

    def bands(self, x: Tensor) -> list[float]:
        """Power over the truth in four bands, by the larger frequency of both axes."""
        k = (torch.fft.fftfreq(LARGE) * LARGE).abs()
        band = (torch.maximum(k[:, None], k) / (LARGE / 2 / BANDS)).ceil().clamp(1, BANDS)
        found = torch.fft.fft2(x).abs().square().mean((0, 1)) / LARGE**2
        return [float(found[band == each].mean() / self.powers[1][band == each].mean()) for each in range(1, BANDS + 1)]


def gaussian_field() -> GaussianField:
    k = torch.fft.fftfreq(LARGE, dtype=torch.float64) * LARGE
    power = 4 * (1 + (k[:, None] ** 2 + k**2) / 9) ** -1.5
    mean = (1 + torch.cos(torch.pi * k / SMALL)) / 2  # |response|^2 of a mean of two
    small = (power * mean[:, None] * mean).reshape(2, SMALL, 2, SMALL).sum((0, 2)) / 4
    return GaussianField((small, power))


def open_diffusers(directory: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A text-to-image pipeline of diffusers from a directory; its classes must be known, and nothing that it brings along is run."""
    import diffusers

    index = read_json(Path(directory) / "model_index.json")
    name = index.get("_class_name")
    foreign = {value[0] for value in index.values() if isinstance(value, list)} - set(LIBRARIES)
    if name not in NETWORKS or foreign:
        raise ValueError(f"{directory} is a {name}{f' with parts of {foreign}' if foreign else ''}; expected one of {', '.join(NETWORKS)}")
    try:
        pipe: Any = getattr(diffusers, name).from_pretrained(directory, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    except (OSError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{directory} cannot be opened ({' '.join(str(error).split())}); expected what save_pretrained writes") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def doubled(pipe: Any, steps: int = STEPS) -> FreCaSConfig:
    """A pipeline's own size and twice that, as many steps in all as `steps`: four fifths of them at its own size."""
    config = getattr(pipe, NETWORKS[type(pipe).__name__]).config
    side = int(config.sample_size) * pipe.vae_scale_factor
    base = FreCaSConfig.preset("sd3-2048" if "3" in type(pipe).__name__ else "sdxl-2048")
    early = max(2, steps * 4 // 5)
    first, last = base.stages
    return replace(base, stages=(replace(first, size=side, steps=early), replace(last, size=2 * side, steps=max(2, steps - early))))


@dataclass(frozen=True)
class Own:
    """A user's pipeline, and the cascade to twice its size."""

    pipe: Any
    plan: FreCaSConfig

    def pictures(self, config: FreCaSConfig, seed: int, device: str) -> Float[Tensor, "B 3 H W"]:
        """In [0, 1], of `PROMPTS`."""
        draws = [torch.Generator(device).manual_seed(seed + i) for i in range(len(PROMPTS))]
        found = FreCaSPipeline(self.pipe.to(device), config)(list(PROMPTS), generator=draws, output_type="pt").images
        return torch.as_tensor(found).float().cpu()


def own(directory: str | Path, steps: int) -> Own:
    pipe = open_diffusers(directory)
    return Own(pipe, doubled(pipe, steps))
