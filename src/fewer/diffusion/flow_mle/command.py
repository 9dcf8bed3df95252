"""The verb `fewer finetune-flow`: a flow model and data in, an adapter (or the whole field) tuned for a number of steps out."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fewer.devices import Device, choose_device


class Mode(StrEnum):
    full = "full"
    residual = "residual"
    contracting = "contracting"


class Pairing(StrEnum):
    invert = "invert"
    random = "random"
    mixed = "mixed"


def finetune_flow(
    model_dir: Annotated[Path, typer.Argument(help="A field as VelocityMLP.save_pretrained writes it.")],
    data: Annotated[
        Path, typer.Argument(help="FILE.npz with x [N, dim] scaled to about [-1, 1], and cond [N, cond_dim] where it takes one.")
    ],
    out: Annotated[Path, typer.Option(help="The directory to write the adapter (or the field) into.")],
    steps: Annotated[int, typer.Option(min=1, max=1000, help="K, the steps that it will be sampled in.")] = 4,
    mode: Annotated[Mode, typer.Option(help="What is trained.")] = Mode.residual,
    pairing: Annotated[Pairing, typer.Option(help="Where each sample's noise comes from.")] = Pairing.invert,
    force: Annotated[bool, typer.Option("--force", help="Take random pairs of unconditional data.")] = False,
    updates: Annotated[int, typer.Option(min=1, max=10_000_000, help="5 to 20 % of the pre-training's.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Pairs of an update.")] = 128,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Of batches, noises and a residual's weights.")] = 0,
    device: Annotated[Device, typer.Option(help="Where it is trained.")] = Device.cpu,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what fewer wrote into the directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Fine-tune a flow-matching model on the reconstructions of its own few-step sampler.

    Example: fewer finetune-flow policy demonstrations.npz --steps 4 --mode residual --out adapter
    """
    from fewer.files import check_new

    check_new(out, overwrite, inputs=[model_dir, data])  # before any work
    import torch

    from fewer.diffusion.flow_mle import FineTuneConfig, VelocityMLP, finetune
    from fewer.inputs import read_arrays

    where = choose_device(device)
    field, arrays = VelocityMLP.from_pretrained(model_dir).to(where), read_arrays(data, ["x"], ["cond"])
    rows: Any = []
    for name, dim in (("x", field.config["dim"]), ("cond", field.config["cond_dim"])):
        each = arrays.get(name)
        if (each is None) != (not dim) or (each is not None and (each.dtype.kind not in "fiu" or each[:1].size != dim)):
            given = "missing" if each is None else f"{each.shape} {each.dtype}"
            raise ValueError(
                f"{data}: {name} is {given}; expected {f'numbers [N, {dim}]' if dim else 'none'}, as {model_dir} was trained on"
            )
        rows += [] if each is None else [torch.from_numpy(each).flatten(1).to(next(field.parameters()))]
    config = FineTuneConfig(updates=updates, batch=batch, seed=seed)
    words: dict[str, Any] = {"mode": mode.value, "pairing": pairing.value}
    made = finetune(field, rows[0] if len(rows) == 1 else tuple(rows), steps=steps, force=force, config=config, **words)
    made.save(out, overwrite)
    if as_json:
        print(json.dumps({"out": str(out), **made.report}))
        return
    print(
        f"{made.report['parameters']:,} parameters tuned for {steps} steps (loss {made.report['first_loss']:.4g} to "
        f"{made.report['last_loss']:.4g}), written to {out}"
    )


COMMANDS = {"finetune-flow": finetune_flow}
