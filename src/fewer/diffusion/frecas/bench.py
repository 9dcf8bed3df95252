"""Races: the cascade beside the same pipeline at the full size, and what bands and maps add to a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from fewer.diffusion.frecas.pipeline import FreCaSPipeline
from fewer.diffusion.frecas.stages import FreCaSConfig, Stage, cost
from fewer.study import Bench

bench = Bench("frecas")
SIDE, TOKENS, WIDTH = 64, 77, 64  # pixels of the first stage, of a text
STEPS = (8, 2)
PLAN = FreCaSConfig((Stage(SIDE, STEPS[0], 200), Stage(2 * SIDE, STEPS[1], 0)), gamma=1.5)


def pipeline() -> tuple[Any, dict[str, Any]]:
    """A small Stable Diffusion of random weights, and the arguments of a call."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 96), cross_attention_dim=WIDTH,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    halves: Any = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (4, 4),
    }
    vae = AutoencoderKL(norm_num_groups=4, latent_channels=4, sample_size=SIDE, mid_block_add_attention=False, **halves)
    scheduler: Any = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False)
    parts: Any = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    pipe = StableDiffusionPipeline(vae=vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    text, none = torch.randn(2, 1, TOKENS, WIDTH)
    return pipe, {"prompt_embeds": text, "negative_prompt_embeds": none, "output_type": "np"}


def called(pipe: Any, words: dict[str, Any], **more: Any) -> Callable[[], Any]:
    return lambda: pipe(generator=torch.Generator().manual_seed(0), **words, **more).images


@bench.race(
    f"{sum(STEPS)} steps to {2 * SIDE} pixels", peer="the same pipeline at that size", reach=round(1.1 * cost(PLAN) / sum(STEPS), 3)
)
def cascade() -> tuple[Callable[[], Any], Callable[[], Any]]:
    pipe, words = pipeline()
    direct = called(pipe, words, height=2 * SIDE, width=2 * SIDE, num_inference_steps=sum(STEPS))
    return called(FreCaSPipeline.from_pipe(pipe, PLAN), words), direct


@bench.race("the same with bands and maps", peer="one without both", reach=1.03)
def bands_and_maps() -> tuple[Callable[[], Any], Callable[[], Any]]:
    pipe, words = pipeline()
    plain = FreCaSConfig(PLAN.stages, gamma=PLAN.gamma, high_guidance=PLAN.guidance, map_weight=0)
    return called(FreCaSPipeline.from_pipe(pipe, PLAN), words), called(FreCaSPipeline.from_pipe(pipe, plain), words)


@bench.quantity("calls of the full size, SDXL to 2048", peer="50 calls at 2048", unit="calls", reach=0.4)
def calls() -> tuple[float, float]:
    return cost(FreCaSConfig.preset("sdxl-2048")), 50.0
