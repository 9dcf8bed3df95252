"""The verb `fewer ems`: a model's directory and images in, empirical model statistics out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fewer.devices import Device, choose_device
from fewer.files import made_whole


def ems(
    model_dir: Annotated[Path, typer.Argument(help="A diffusers pipeline: unet/ or transformer/, scheduler/, and what belongs to them.")],
    images_dir: Annotated[Path, typer.Argument(help="Images as the model saw them in training, of its own size.")],
    out: Annotated[Path, typer.Option(help="The directory to write the statistics into.")],
    timesteps: Annotated[int, typer.Option(min=2, help="N; the grid has one point more.")] = 120,
    samples: Annotated[int, typer.Option(min=1, help="K, images with noise at each grid point.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Images in one call.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Draws images, noises and probes.")] = 0,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.cpu,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the statistics that stand in the directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure the empirical model statistics of a diffusion model, which DPM-Solver-v3 samples with. Once a checkpoint.

    A model that takes labels or text is measured without them.

    Example: fewer ems ddpm-cifar10 images --out ems --timesteps 120 --samples 1024
    """
    with made_whole(out, overwrite, inputs=[model_dir, images_dir]) as folder:
        import torch

        from fewer.diffusion import estimate_ems
        from fewer.diffusion._shared import as_epsilon
        from fewer.diffusion._shared.pipelines import open_pipeline

        pipeline = open_pipeline(model_dir, choose_device(device))
        images = pipeline.read(images_dir)
        made = estimate_ems(
            as_epsilon(pipeline.call, pipeline.schedule, pipeline.prediction_type, **pipeline.plain(len(images))),
            pipeline.schedule,
            images,
            timesteps,
            samples,
            batch,
            generator=torch.Generator().manual_seed(seed),
            model=pipeline.network,
        )
        made.save_pretrained(folder)
    told = {"out": str(out), "timesteps": timesteps, "samples": samples, "shape": list(made.sample_shape), "model": made.meta["model"]}
    print(json.dumps(told) if as_json else f"statistics of {samples} samples at {timesteps + 1} noise levels written to {out}")


COMMANDS = {"ems": ems}
