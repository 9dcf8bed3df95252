"""The verb `fewer prune`: a model directory in, a smaller one out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from fewer.language._shared.command import MANY


def prune(
    model_dir: Annotated[Path, typer.Argument(help="A Llama, Mistral, Qwen, Gemma, OLMo or Granite model directory with its tokenizer.")],
    out_dir: Annotated[Path, typer.Argument(help="The directory to write the smaller model into.")],
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text to calibrate (and recover) on (repeat for more).")],
    ratio: Annotated[float, typer.Option(min=0, max=0.999, help="The share of feed-forward channels to remove.")] = 0.3,
    multiple_of: Annotated[int, typer.Option(min=1, max=MANY, help="Widths are multiples of it.")] = 128,
    windows: Annotated[int, typer.Option(min=1, max=MANY, help="How many windows of text are passed through the model.")] = 128,
    window: Annotated[int, typer.Option(min=2, max=MANY, help="Tokens of a window.")] = 1024,
    metric: Annotated[
        Literal["relative", "activation", "wanda", "magnitude", "random"], typer.Option(help="Which channels of a layer are kept.")
    ] = "relative",
    export: Annotated[
        Literal["list", "padded", "uniform"],
        typer.Option(help="list: each layer its width. padded: all filled up with zeros. uniform: all layers alike."),
    ] = "list",
    recover_steps: Annotated[int, typer.Option(min=0, max=MANY, help="Steps of training with adapters afterwards.")] = 0,
    recover_batch: Annotated[int, typer.Option(min=1, max=MANY, help="Windows a step of that training takes.")] = 8,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Draws the windows.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what fewer wrote into OUT_DIR before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a language model smaller and faster: whole feed-forward channels go, after one forward pass over a little text.

    The smaller model has the dtype of the dense one.

    Example: fewer prune model smaller --ratio 0.3 --text notes.txt --recover-steps 200
    """
    import torch

    from fewer.files import check_new
    from fewer.language._shared.model_directory import load_directory
    from fewer.language.cfsp import calibrate, recover, save_pruned
    from fewer.language.cfsp import prune as prune_model
    from fewer.language.cfsp.pruning import check_prunable
    from fewer.tasks.language_corpus import read_texts, token_stream
    from fewer.tasks.lm_training import check_window, draw_windows

    inputs, coarse = [model_dir, *text], "none" if export == "uniform" else "angular"
    check_new(out_dir, overwrite, inputs=inputs, option="OUT_DIR")
    documents = read_texts(text)
    model, tokenizer = load_directory(model_dir, dense=True)
    check_prunable(model, ratio, coarse, metric, multiple_of=multiple_of)
    tokens = token_stream(tokenizer, documents)
    check_window(tokens, window)
    stored = model.dtype
    if stored == torch.float16:
        model.float()  # activations of many models leave the range of float16
    draw = torch.Generator().manual_seed(seed)
    stats = calibrate(model, draw_windows(tokens, windows, window, draw).split(max(1, 2048 // window)))
    report = prune_model(model, stats, ratio, coarse, metric, multiple_of=multiple_of, generator=draw)
    losses = []
    if recover_steps:
        losses = recover(model, tokens, recover_steps, scores=report.scores, batch=recover_batch, window=min(window, 256), seed=seed)
    saved = "padded" if export == "padded" else "list"
    save_pruned(model.to(stored), out_dir, tokenizer, export=saved, overwrite=overwrite, inputs=inputs)
    if as_json:
        print(json.dumps({"out": str(out_dir), "widths": report.widths, "parameters": report.parameters, "losses": losses}))
        return
    layers, dense = len(report.widths), round(sum(report.widths) / (1 - report.achieved_ratio))
    print(f"{sum(report.widths)} of {dense} channels kept in {layers} layers: {', '.join(map(str, report.widths))}")
    print(f"{report.parameters:,} parameters, {report.parameters / report.dense_parameters:.1%} of {report.dense_parameters:,}")
    if losses:
        print(f"recovery: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    print(f"written to {out_dir}")


COMMANDS = {"prune": prune}
