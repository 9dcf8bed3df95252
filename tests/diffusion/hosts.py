"""Tiny pipelines of diffusers, made from configs with random weights, and what a scheduler that drops into them must stand."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

U_NET = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
BLOCKS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
CROSS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCALE = 2  # pixels of a latent's side
TEXT = {"vocab_size": 54, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def text_config(**words: Any) -> CLIPTextConfig:
    return CLIPTextConfig(**TEXT, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, **words)


def dit(labels: int = 6) -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8, num_embeds_ada_norm=labels
    )


def text_unet(**words: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        in_channels=4, out_channels=4, **{"cross_attention_dim": 8, "attention_head_dim": 8} | U_NET | CROSS | words
    )


def write_pipelines(root: Path) -> None:
    """Directories "plain", "labels", "dit" and "text", as `save_pretrained` writes their parts."""
    torch.manual_seed(0)
    parts = {
        "plain/unet": UNet2DModel(in_channels=1, out_channels=1, **U_NET, **BLOCKS),
        "plain/scheduler": DDPMScheduler(num_train_timesteps=200, beta_end=0.1),
        "labels/unet": UNet2DModel(in_channels=1, out_channels=1, num_class_embeds=5, **U_NET, **BLOCKS),
        "labels/scheduler": DDPMScheduler(prediction_type="v_prediction"),
        "dit/transformer": dit(),
        "dit/scheduler": DDIMScheduler(),
        "dit/vae": autoencoder(),
        "text/unet": text_unet(),
        "text/scheduler": DDIMScheduler(**SCALED),
        "text/text_encoder": CLIPTextModel(text_config()),
    }
    for folder, part in parts.items():
        part.save_pretrained(root / folder)
    write_tokenizer(root / "text" / "tokenizer")


def write_tokenizer(folder: Path) -> None:
    """CLIP's, of letters."""
    letters = [chr(97 + i) for i in range(26)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 16, "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def stable_diffusion(tokenizer: Path, scheduler: Any = None, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Stable Diffusion, 16 x 16 pixels. `tokenizer` is a folder of `write_tokenizer`'s."""
    torch.manual_seed(0)
    pipe = StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(text_config()), tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        unet=text_unet(), scheduler=scheduler or DDIMScheduler(**SCALED, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(dtype)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_xl(tokenizer: Path, scheduler: Any = None, dtype: torch.dtype = torch.float32) -> StableDiffusionXLPipeline:
    """SDXL, 16 x 16 pixels."""
    torch.manual_seed(0)
    words = CLIPTokenizer.from_pretrained(tokenizer)
    unet = text_unet(
        cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=4, transformer_layers_per_block=1,
        projection_class_embeddings_input_dim=8 + 6 * 4, use_linear_projection=True,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(text_config()), text_encoder_2=CLIPTextModelWithProjection(text_config(projection_dim=8)),
        tokenizer=words, tokenizer_2=words, unet=unet, scheduler=scheduler or DDIMScheduler(**SCALED, clip_sample=False, set_alpha_to_one=False),
    ).to(dtype)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def class_conditional(scheduler: Any, dtype: torch.dtype = torch.float32) -> DiTPipeline:
    """DiT, whose pipeline takes 1000 for "no label"."""
    torch.manual_seed(0)
    pipe = DiTPipeline(transformer=dit(1000), vae=autoencoder(), scheduler=scheduler).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drops_into_pipelines(pipelines: Path, of_config: Callable[[Any], Any], steps: int = 6) -> None:
    """Stand in for Stable Diffusion's, SDXL's and DiT's scheduler.

    With guidance, several images a prompt, a callback, half precision; and from one config into two pipelines, whose images are not
    mixed up. `of_config(config)` makes the scheduler that is tried.
    """
    tokenizer, asked = pipelines / "text" / "tokenizer", {"output_type": "np", "num_inference_steps": steps}
    for make in (stable_diffusion, stable_diffusion_xl):
        pipe, seen = make(tokenizer), []
        pipe.scheduler = of_config(pipe.scheduler.config)

        def images(pipe: Any, prompt: str = "a cat", **words: Any) -> Any:
            draw = torch.Generator().manual_seed(0)
            return pipe(prompt, guidance_scale=5.0, generator=draw, height=16, width=16, **asked | words).images

        def noted(_: Any, step: int, t: Any, values: dict[str, Any], seen: list[int] = seen) -> dict[str, Any]:
            seen.append(step)
            return values

        first = images(pipe, num_images_per_prompt=2, callback_on_step_end=noted)
        assert first.shape == (2, 16, 16, 3)
        assert seen == list(range(len(seen)))
        assert len(seen) >= steps - 1
        assert (images(pipe, num_images_per_prompt=2) == first).all(), "the same seed, the same images"
        assert (first[0] != first[1]).any()
        twin = make(tokenizer)
        twin.scheduler = of_config(pipe.scheduler.config)  # two pipelines, one config
        assert (images(twin, "a dog") == images(twin, "a dog")).all()
        assert (images(pipe, num_images_per_prompt=2) == first).all()
        half = make(tokenizer, dtype=torch.bfloat16)
        half.scheduler = of_config(pipe.scheduler.config)
        latents = images(half, output_type="latent")
        assert latents.dtype == torch.bfloat16
        assert latents.isfinite().all()
        single = torch.as_tensor(images(pipe, output_type="latent"))
        assert (latents.float() - single).norm() < 0.2 * single.norm()
        with tempfile.TemporaryDirectory() as folder:  # saved with its pipeline, and opened again
            pipe.save_pretrained(folder)
            again = type(pipe).from_pretrained(folder)
        again.set_progress_bar_config(disable=True)
        assert type(again.scheduler) is type(pipe.scheduler)
        assert abs(images(again, num_images_per_prompt=2) - first).max() < 1e-5  # weights come back elsewhere in memory
    labelled = class_conditional(of_config(DDIMScheduler().config))
    found = labelled([1, 5], guidance_scale=4.0, generator=torch.Generator().manual_seed(0), **asked)
    assert found.images.shape == (2, 16, 16, 3)
