"""The verb `fewer ems`: a model's directory and images in, empirical model statistics out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fewer.diffusion._shared import NoiseSchedule

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


def ems(
    model_dir: Annotated[Path, typer.Argument(help="A diffusers pipeline with a `unet` and a `scheduler`, pixels in and out.")],
    images_dir: Annotated[Path, typer.Argument(help="Images as the model saw them in training, of its own size.")],
    out: Annotated[Path, typer.Option(help="The directory to write the statistics into.")],
    timesteps: Annotated[int, typer.Option(help="N; the grid has one point more.")] = 120,
    samples: Annotated[int, typer.Option(help="K, images with noise at each grid point.")] = 1024,
    batch: Annotated[int, typer.Option(help="Images in one call.")] = 64,
    mode: Annotated[
        str, typer.Option(help="double-backward, or forward: quicker, but torch has no forward derivative of some U-Nets.")
    ] = "double-backward",
    seed: Annotated[int, typer.Option(help="Draws images, noises and probes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the statistics that stand in the directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the empirical model statistics of a diffusion model, which DPM-Solver-v3 samples with. Once a checkpoint.

    Example: fewer ems ddpm-cifar10 images --out ems --timesteps 120 --samples 1024
    """
    import torch

    from fewer.diffusion import estimate_ems
    from fewer.diffusion._shared import as_epsilon

    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; expected a new directory: choose another, or --overwrite")
    model, schedule, prediction_type = load_model(model_dir)
    config: Any = model.config
    images = read_images(images_dir, int(config["in_channels"]), int(config["sample_size"]))
    made = estimate_ems(
        as_epsilon(model.to(device), schedule, prediction_type),
        schedule,
        images.to(device),
        timesteps,
        samples,
        batch,
        generator=torch.Generator().manual_seed(seed),
        mode=mode,  # pyright: ignore[reportArgumentType] - checked by estimate_ems
        model=model,
    )
    made.save_pretrained(out)
    told = {"out": str(out), "timesteps": timesteps, "samples": samples, "shape": list(made.sample_shape), "model": made.meta["model"]}
    print(json.dumps(told) if as_json else f"statistics of {samples} samples at {timesteps + 1} noise levels written to {out}")


def load_model(directory: Path) -> tuple[nn.Module, NoiseSchedule, str]:
    """The network, its noise schedule, and what it predicts; ValueError where the directory has none."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    from fewer.diffusion._shared import NoiseSchedule

    weights, scheduler = directory / "unet", directory / "scheduler" / "scheduler_config.json"
    for file in (weights / "config.json", scheduler):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is no file; expected a diffusers pipeline as save_pretrained writes it: unet/ and scheduler/")
    config = json.loads(scheduler.read_text())
    model = UNet2DModel.from_pretrained(weights, use_safetensors=True, local_files_only=True)
    return model.eval().requires_grad_(False), NoiseSchedule.from_diffusers(config), config.get("prediction_type", "epsilon")


def read_images(directory: Path, channels: int, side: int) -> Tensor:
    """Images [M, channels, side, side] in [-1, 1]; ValueError on none, or one of another size."""
    import numpy as np
    import torch
    from PIL import Image

    files = sorted(file for file in directory.glob("*") if file.suffix.lower() in IMAGES)
    if not files:
        raise FileNotFoundError(f"{directory} has no .png, .jpg or .webp files; expected images of {side} x {side} pixels")
    rows = []
    for file in files:
        with Image.open(file) as image:
            if image.size != (side, side):
                raise ValueError(f"{file} is {image.width} x {image.height}; expected {side} x {side}, the model's size: resize the images")
            pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32)
        rows.append(torch.from_numpy(pixels).reshape(side, side, channels).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(rows)


COMMANDS = {"ems": ems}
