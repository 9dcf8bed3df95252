"""The verb `fewer dc-search`: a pipeline in; ratios, and where there are settings enough a polynomial that predicts them, out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fewer.devices import Device, choose_device
from fewer.files import made_whole

MOST = 1000


def numbers(words: str, option: str, whole: bool) -> list[float]:
    """Numbers with commas between; a mistake of the user's where they are none."""
    try:
        found = [(int if whole else float)(word) for word in words.split(",")]
        if not all(0 <= number <= MOST for number in found):
            raise ValueError
    except ValueError:
        kind = "whole numbers" if whole else "numbers"
        raise typer.BadParameter(
            f"{option} {words!r}; expected {kind} up to {MOST} with commas between, such as 5,6,8", param_hint=option
        ) from None
    return found


def dc_search(
    model_dir: Annotated[Path, typer.Argument(help="A diffusers pipeline: unet/ or transformer/, scheduler/, and what belongs to them.")],
    out: Annotated[Path, typer.Option(help="The directory to write ratios.json and, from three of each on, polynomial.npz into.")],
    steps: Annotated[str, typer.Option(help="Numbers of network calls, with commas between.")] = "5,6,8,10",
    scale: Annotated[str, typer.Option(help="Guidance scales, with commas between.")] = "1,4,7.5",
    noises: Annotated[int, typer.Option(min=1, max=10_000, help="Noises that ratios are searched on.")] = 10,
    fine_steps: Annotated[int, typer.Option(min=1, max=100_000, help="Steps of the reference.")] = 999,
    solver_order: Annotated[int, typer.Option(min=1, max=3, help="Of UniPC: 2 for guided, 3 for unconditional sampling.")] = 2,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Draws noises and conditions.")] = 0,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.cpu,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what a former search wrote into the directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search the ratios with which DC-Solver compensates a diffusion model's sampling. Once a checkpoint, without training.

    Example: fewer dc-search stable-diffusion --out ratios --steps 5,6,8,10 --scale 1,4,7.5
    """
    calls, scales = [int(number) for number in numbers(steps, "--steps", whole=True)], numbers(scale, "--scale", whole=False)
    with made_whole(out, overwrite, inputs=[model_dir]) as folder:
        from dataclasses import asdict

        from fewer.diffusion import CascadePolynomial, reference_trajectory, search_ratios
        from fewer.diffusion.dc_solver.problems import of_pipeline

        network = of_pipeline(model_dir, choose_device(device))
        if len(network.scales) == 1 and scales != [1.0]:
            raise ValueError(f"{model_dir} takes neither labels nor text; expected --scale 1: it cannot be guided")
        noise, condition = network.drawn(noises, seed)
        scheduler, found = network.scheduler(solver_order=solver_order), []
        for each in scales:
            model = network.model(each, condition)
            for count in calls:
                reference = reference_trajectory(model, noise, scheduler, count, fine_steps)
                found.append(search_ratios(model, noise, reference, scheduler, count, guidance_scale=each))
        (folder / "ratios.json").write_text(json.dumps({"ratios": [asdict(one) for one in found]}, indent=1) + "\n", encoding="utf8")
        fits = len(set(calls)) > 2 and len(set(scales)) > 2
        if fits:
            CascadePolynomial.fit(found).save(folder / "polynomial.npz")
    if as_json:
        print(json.dumps({"out": str(out), "settings": len(found), "calls": sum(one.calls for one in found), "polynomial": fits}))
        return
    for one in found:
        print(f"{one.steps} calls, scale {one.guidance_scale:g}: {' '.join(f'{value:.3f}' for value in one.values)}")
    print(f"ratios of {len(found)} settings written to {out}{', and a polynomial that predicts others' if fits else ''}")


COMMANDS = {"dc-search": dc_search}
