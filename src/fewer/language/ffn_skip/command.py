"""The verbs `fewer skip calibrate`, which finds when a model may skip, and `fewer generate`, which lets a model write."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fewer.devices import Device, choose_device
from fewer.language._shared.command import DRAFT, MANY, check_alone

app = typer.Typer(no_args_is_help=True)

MODEL = Annotated[Path, typer.Argument(help="A Llama, Mistral, Qwen or other pre-norm model directory with its tokenizer.")]
DEVICE = Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU where there is one.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def verbs() -> None:
    """Find out which feed-forward blocks a language model may leave out while it decodes."""


@app.command("calibrate")
def calibrate_skip(
    model_dir: MODEL,
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text of the kind that will be written (repeat for more).")],
    out: Annotated[Path, typer.Option(help="The JSON file to write, for `fewer generate --skip`.")],
    target: Annotated[float, typer.Option(min=0, max=0.999, help="The share of all feed-forward blocks to leave out.")] = 0.25,
    windows: Annotated[int, typer.Option(min=1, max=MANY, help="Windows of text to look at.")] = 16,
    window: Annotated[int, typer.Option(min=2, max=MANY, help="Tokens of a window; all but the last --tokens are its prompt.")] = 192,
    tokens: Annotated[int, typer.Option(min=1, max=MANY, help="Tokens of each window to calibrate on.")] = 128,
    warmup: Annotated[int, typer.Option(min=0, max=MANY, help="Decoding steps that run in full after a prompt.")] = 25,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Draws the windows.")] = 0,
    device: DEVICE = Device.cpu,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: JSON = False,
) -> None:
    """Find the layers and the threshold with which a model leaves out a share of its feed-forward blocks; nothing is trained.

    Example: fewer skip calibrate model --text notes.txt --target 0.25 --out skip.json
    """
    import torch

    from fewer.files import check_new_file
    from fewer.language._shared.model_directory import load_directory
    from fewer.language.ffn_skip import calibrate
    from fewer.tasks.language_corpus import read_texts, token_stream
    from fewer.tasks.lm_training import check_window, draw_windows

    inputs = [model_dir, *text]
    check_new_file(out, overwrite, inputs=inputs)
    place, documents = choose_device(device), read_texts(text)
    model, tokenizer = load_directory(model_dir)
    stream = token_stream(tokenizer, documents)
    check_window(stream, window)
    drawn = draw_windows(stream, windows, window, torch.Generator().manual_seed(seed))
    config, report = calibrate(model.to(place), drawn, target, tokens)
    if not report.reached:
        raise ValueError(f"--target {target} cannot be reached with this model; expected at most {report.achieved_ratio:.3g}: lower it")
    dataclasses.replace(config, warmup_tokens=warmup).save(out, overwrite, inputs=inputs)
    similarities = [round(each, 4) for each in report.similarity.tolist()]
    if as_json:
        print(json.dumps(config.to_dict() | {"out": str(out), "similarity": similarities, "achieved_ratio": report.achieved_ratio}))
        return
    print(f"similarity by layer: {', '.join(f'{each:.3f}' for each in similarities)}")
    added = f"{report.widened} of them added to reach the target"
    print(f"FFNs of layers {config.cold_start} to {config.cold_end - 1} ({added}) may be left out; threshold {config.threshold:.4f}")
    print(f"{report.achieved_ratio:.1%} of the blocks of {report.tokens:,} tokens are; written to {out}")


def generate(
    model_dir: MODEL,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, max=MANY, help="Most tokens to write.")] = 128,
    skip: Annotated[Path | None, typer.Option(help="Leave out feed-forward blocks, as `fewer skip calibrate` found.")] = None,
    draft: DRAFT = None,
    sample: Annotated[bool, typer.Option("--sample", help="Draw each token; without it the likeliest is taken.")] = False,
    temperature: Annotated[float, typer.Option(min=0.01, max=100, help="Of --sample.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of --sample.")] = 0,
    device: DEVICE = Device.cpu,
    as_json: JSON = False,
) -> None:
    """Let a language model write on after a prompt. The text goes to standard output, what was counted to standard error.

    Example: fewer generate model --prompt "def mean(" --skip skip.json
    """
    from fewer.language._shared.generation import write_text
    from fewer.language._shared.model_directory import load_directory
    from fewer.language.ffn_skip import FFNSkipConfig, ffn_skip

    check_alone("skipped blocks would change what drafts are verified by", skip=skip, draft=draft)
    config, place = FFNSkipConfig.load(skip) if skip else None, choose_device(device)
    model, tokenizer = load_directory(model_dir)
    with ffn_skip(model.to(place), config) if config else contextlib.nullcontext() as stats:
        written = write_text(model.to(place), tokenizer, prompt, tokens, draft=draft, sample=sample, temperature=temperature, seed=seed)
    if as_json:
        print(json.dumps(dataclasses.asdict(written) | ({"skipped": stats.ratio, "skipped_of_all": stats.ratio_all} if stats else {})))
        return
    print(written.prompt + written.completion)
    left_out = f"; {stats.ratio:.1%} of the feed-forward blocks left out after the warm-up, {stats.ratio_all:.1%} of all" if stats else ""
    print(f"{written.speed}{left_out}", file=sys.stderr)


COMMANDS = {"skip": app, "generate": generate}
