"""The verb `fewer frecas`: a pipeline and a prompt in; pictures above the model's training size out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fewer.devices import Device, choose_device
from fewer.files import made_whole


def frecas(
    model_dir: Annotated[Path, typer.Argument(help="A directory of Stable Diffusion, SDXL or SD3, as save_pretrained writes it.")],
    prompt: Annotated[str, typer.Option(help="What is to be seen.")],
    out: Annotated[Path, typer.Option(help="The directory to write image-0.png, ..., and frecas.json into.")],
    preset: Annotated[str, typer.Option(help="sd21-1024, sd21-2048, sdxl-2048, sdxl-4096 or sd3-2048.")] = "sdxl-2048",
    config: Annotated[Path | None, typer.Option(help="A frecas.json, in place of a preset.")] = None,
    images: Annotated[int, typer.Option(min=1, max=1000, help="How many pictures.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Draws the noise.")] = 0,
    device: Annotated[Device, typer.Option(help="Where the model runs; half precision on a GPU.")] = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what a former call wrote into the directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Sample pictures above a model's training size, through stages of growing size.

    Example: fewer frecas sdxl --prompt "a red house by a lake" --preset sdxl-2048 --out pictures
    """
    with made_whole(out, overwrite, inputs=[model_dir, *([config] if config else [])]) as folder:
        import time

        import torch

        from fewer.diffusion import FreCaSConfig, FreCaSPipeline
        from fewer.diffusion.frecas.problems import open_diffusers
        from fewer.diffusion.frecas.stages import cost
        from fewer.inputs import read_text

        plan = FreCaSConfig.from_json(read_text(config)) if config else FreCaSConfig.preset(preset)
        where = choose_device(device)
        pipe = open_diffusers(model_dir, torch.float16 if where == "cuda" else torch.float32).to(where)
        large, started = FreCaSPipeline.from_pipe(pipe, plan), time.perf_counter()
        for i in range(images):
            large(prompt, generator=torch.Generator(where).manual_seed(seed + i)).images[0].save(folder / f"image-{i}.png")
        seconds = time.perf_counter() - started
        (folder / "frecas.json").write_text(plan.to_json() + "\n", encoding="utf8")
    share = large.lift_seconds * images / seconds
    told = {"out": str(out), "images": images, "seconds": seconds, "lift_share": share, "full_size_calls": cost(plan)}
    if as_json:
        print(json.dumps(told))
        return
    print(
        f"{images} pictures written to {out} in {seconds:.1f} s, {share:.0%} of it between the stages; {cost(plan):g} calls of the full size each"
    )


COMMANDS = {"frecas": frecas}
