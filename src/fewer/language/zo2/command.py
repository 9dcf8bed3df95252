"""The verbs `fewer zo2 train | replay`: a model directory in, a fine-tuned one out, by forward passes alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fewer.devices import Device, choose_device

MANY = 10**9
app = typer.Typer(help="Fine-tune a language model larger than memory, by forward passes alone: train, replay.", no_args_is_help=True)

MODEL = Annotated[Path, typer.Argument(help="A Llama, Mistral, Qwen2, Qwen3, Gemma, OPT or GPT-2 model directory.")]
OUT = Annotated[Path, typer.Argument(help="A new directory.")]
STORE = Annotated[
    Path | None, typer.Option("--store-dir", help="A new directory for the blocks; by default OUT.blocks, removed at the end.")
]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace what fewer wrote into OUT before.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("train")
def train(
    model_dir: MODEL,
    out: OUT,
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text to learn (repeat for more).")],
    steps: Annotated[int, typer.Option(min=1, max=MANY, help="Steps, of two forward passes each.")] = 1000,
    lr: Annotated[float, typer.Option(min=0, max=10, help="The learning rate; 1e-7 to 1e-5 for real models.")] = 1e-6,
    eps: Annotated[float, typer.Option(min=1e-9, max=10, help="How far the weights are moved for each pass.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(min=0, max=10, help="Weight decay.")] = 0.0,
    batch: Annotated[int, typer.Option(min=1, max=MANY, help="Windows of text a step.")] = 8,
    window: Annotated[int, typer.Option(min=2, max=MANY, help="Tokens of a window.")] = 256,
    store: Annotated[Literal["disk", "cpu", "none"], typer.Option(help="Where the blocks live.")] = "disk",
    store_dir: STORE = None,
    store_dtype: Annotated[
        Literal["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"] | None, typer.Option(help="Keep blocks in a shorter type.")
    ] = None,
    store_rounding: Annotated[Literal["nearest", "stochastic"], typer.Option(help="How they are made shorter.")] = "nearest",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Draws the windows and the directions.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU where there is one.")] = Device.cpu,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole step in the store's directory.")] = False,
    overwrite: OVERWRITE = False,
    as_json: JSON = False,
) -> None:
    """Fine-tune a model on text; beside the weights it writes journal.json, from which `replay` makes them again.

    Example: fewer zo2 train model tuned --text notes.txt --steps 1000 --lr 1e-6
    """
    import torch

    from fewer.files import check_new, discard
    from fewer.language._shared.model_directory import load_tokenizer
    from fewer.language.zo2.checkpoints import Weights
    from fewer.language.zo2.mezo import ZO2Config
    from fewer.language.zo2.streaming import ZO2
    from fewer.tasks.language_corpus import read_texts, token_stream
    from fewer.tasks.lm_training import check_window, draw_windows

    place, inputs = choose_device(device), [model_dir, *text]
    check_new(out, overwrite, inputs=inputs, option="OUT")
    documents = read_texts(text)
    Weights(model_dir)
    tokenizer = load_tokenizer(model_dir)
    tokens = token_stream(tokenizer, documents)
    check_window(tokens, window)
    blocks = store_dir or out.with_name(f"{out.name}.blocks")
    config = ZO2Config(
        lr, eps, weight_decay, store=store, store_dir=str(blocks) if store == "disk" else None, store_dtype=store_dtype,
        store_rounding=store_rounding, working_device=place, seed=seed,
    )  # fmt: skip
    zo2 = ZO2.from_pretrained(model_dir, config, resume=resume)
    losses = []
    for step in range(zo2.steps, steps):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        losses.append(zo2.step(draw_windows(tokens, batch, window, draw)).loss)
        if not as_json and (step + 1) % max(1, steps // 20) == 0:
            print(f"step {step + 1} of {steps}: loss {losses[-1]:.3f}", file=sys.stderr)
    zo2.save_pretrained(out, tokenizer, overwrite=overwrite)
    if store == "disk" and store_dir is None:
        discard(blocks)
    moved = zo2.store.bytes_read + zo2.store.bytes_written
    if as_json:
        print(json.dumps({"out": str(out), "steps": zo2.steps, "losses": losses, "bytes": moved, "lost_updates": zo2.lost_updates}))
        return
    first, last = (f"{each:.3f}" for each in (losses[0], losses[-1])) if losses else ("none", "none")
    print(f"{zo2.steps} steps; loss {first} at first, {last} at last; {moved / 1e9:.3g} GB of blocks moved")
    print(f"written to {out}")


@app.command("replay")
def replay_journal(
    model_dir: MODEL,
    journal: Annotated[Path, typer.Argument(help="journal.json of the fine-tuned model.")],
    out: OUT,
    store_dir: STORE = None,
    overwrite: OVERWRITE = False,
) -> None:
    """Make a fine-tuned model again from its base and its journal, bit for bit and without data.

    Example: fewer zo2 replay model tuned/journal.json again
    """
    from fewer.language.zo2.runs import replay

    print(f"written to {replay(model_dir, journal, out, store_dir=store_dir, overwrite=overwrite)}")


COMMANDS = {"zo2": app}
