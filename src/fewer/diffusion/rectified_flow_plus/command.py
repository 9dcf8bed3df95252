"""The verb `fewer reflow`: a diffusers directory in, a diffusers directory that samples in 1 to 4 calls out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fewer.devices import Device, choose_device
from fewer.files import made_whole


def reflow(
    teacher_dir: Annotated[Path, typer.Argument(help="A diffusers pipeline of pixels: unet/ and scheduler/, with labels or without.")],
    out_dir: Annotated[Path, typer.Argument(help="The directory to write the new pipeline into.")],
    pairs: Annotated[int, typer.Option(min=1, help="Noises that the teacher's flow is followed from; 1 million for CIFAR-10.")] = 100_000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 20_000,
    batch: Annotated[int, typer.Option(min=1, help="Pairs in a step.")] = 256,
    lr: Annotated[float, typer.Option(min=0, help="The rate of Adam.")] = 2e-4,
    sampler_steps: Annotated[int, typer.Option(min=2, help="Steps of the teacher's sampler, two calls each.")] = 18,
    pairs_dir: Annotated[Path | None, typer.Option(help="Keep the pairs there; a run that breaks off goes on with them.")] = None,
    update: Annotated[str, typer.Option(help="How the new scheduler moves: default, or new for 2 to 4 steps.")] = "default",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Draws noises, pairs and times.")] = 0,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.cpu,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a pipeline that a former run wrote there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a diffusion model into a flow that samples in 1 to 4 calls (2-rectified flow++). Features are the teacher's own.

    The scheduler of the new pipeline is fewer's: import fewer.diffusion.rectified_flow_plus.sampler before DDPMPipeline.from_pretrained.

    Example: fewer reflow ddpm-cifar10 reflowed --pairs 100000 --steps 20000
    """
    with made_whole(out_dir, overwrite, inputs=[teacher_dir], option="OUT_DIR") as folder:
        import copy
        import tempfile
        from dataclasses import asdict

        from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

        from fewer.diffusion._shared.pipelines import open_pipeline
        from fewer.diffusion.rectified_flow_plus.pairs import EDMSampler, generate_pairs
        from fewer.diffusion.rectified_flow_plus.premetric import FeatureDistance, LPIPSHuber, TeacherFeatures
        from fewer.diffusion.rectified_flow_plus.reflow import ReflowConfig, train_reflow
        from fewer.diffusion.rectified_flow_plus.sampler import ReflowScheduler
        from fewer.diffusion.rectified_flow_plus.velocity import VelocityFromVP
        from fewer.files import read_json

        opened: Any = open_pipeline(teacher_dir, choose_device(device))
        if opened.encode is not None or opened.autoencoder is not None or type(opened.network).__name__ != "UNet2DModel":
            raise ValueError(f"{teacher_dir} takes text or latents; expected a UNet2DModel of pixels: name another pipeline")
        config = {**read_json(teacher_dir / "scheduler" / "scheduler_config.json"), "prediction_type": opened.prediction_type}
        scheduler = ReflowScheduler.from_config(config, update=update)
        first, last = opened.ends
        sampler = EDMSampler(sampler_steps, sigma_min=last, sigma_max=min(first, 80.0))
        teacher = VelocityFromVP(opened.network, (2 * opened.schedule.log_alphas).exp(), opened.prediction_type)
        given = {"classes": opened.classes, "batch_size": batch, "seed": seed, "device": opened.device}
        settings = ReflowConfig(steps, batch, lr, warm_up=steps // 20, decay=True, ema=min(0.9999, 1 - 1 / (1 + steps / 10)), seed=seed)
        with tempfile.TemporaryDirectory() as scratch:
            made = generate_pairs(teacher, pairs, sampler, pairs_dir or scratch, opened.shape, **given)
        layers = [f"velocity.eps_model.down_blocks.{place}" for place in range(len(opened.network.down_blocks))]
        seen = TeacherFeatures(copy.deepcopy(teacher).eval(), label=0 if opened.classes else None)
        features = FeatureDistance(seen, layers, name="the teacher's encoder")
        premetric = LPIPSHuber(features, time_weight="1/t")
        losses: list[float] = []
        student: Any = train_reflow(teacher, made, settings, premetric, tell=lambda _, loss: losses.append(loss))
        DDPMPipeline(student.eps_model, scheduler).save_pretrained(folder)
        told = {"pairs": pairs, "calls": pairs * sampler.calls + steps * batch, "premetric": premetric.name, "loss": losses[-1]}
        (folder / "reflow.json").write_text(json.dumps(told | asdict(settings), indent=1) + "\n", encoding="utf8")
    words = f"a flow of {pairs} pairs and {steps} steps ({told['calls']} forward passes; {premetric.name}) written to {out_dir}"
    print(json.dumps({"out": str(out_dir)} | told) if as_json else words)


COMMANDS = {"reflow": reflow}
