"""The verbs `fewer prune` (a model directory in, a smaller one out) and `fewer lm` (the small language model of the studies)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor

TEXT = Annotated[list[Path] | None, typer.Option("--text", help="UTF-8 text files (repeat for more).")]


def prune(
    model_dir: Annotated[Path, typer.Argument(help="A Llama, Mistral or Qwen2 model directory with its tokenizer.")],
    out_dir: Annotated[Path, typer.Argument(help="The directory to write the smaller model into.")],
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text to calibrate (and recover) on (repeat for more).")],
    ratio: Annotated[float, typer.Option(help="The share of feed-forward channels to remove.")] = 0.3,
    multiple_of: Annotated[int, typer.Option(help="Widths are multiples of it.")] = 128,
    windows: Annotated[int, typer.Option(help="How many windows of text are passed through the model.")] = 128,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    metric: Annotated[str, typer.Option(help="relative, activation, wanda, magnitude or random.")] = "relative",
    export: Annotated[str, typer.Option(help="list (each layer its width), padded, or uniform (all layers alike).")] = "list",
    recover_steps: Annotated[int, typer.Option(help="Steps of training with adapters afterwards.")] = 0,
    recover_batch: Annotated[int, typer.Option(help="Windows a step of that training takes.")] = 8,
    seed: Annotated[int, typer.Option(help="Draws the windows.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands in OUT_DIR.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a language model smaller and faster: whole feed-forward channels go, after one forward pass over a little text.

    Example: fewer prune model smaller --ratio 0.3 --text notes.txt --recover-steps 200
    """
    import torch

    from fewer.data.made_whole import check_new
    from fewer.language.cfsp import calibrate, recover, save_pruned
    from fewer.language.cfsp import prune as prune_model

    if export not in ("list", "padded", "uniform"):
        raise ValueError(f"--export {export}; expected list, padded or uniform")
    check_new(out_dir, overwrite)
    model, tokenizer = load_directory(model_dir)
    tokens = read_tokens(tokenizer, text, window)
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - window + 1, (windows, 1), generator=draw)
    rows = tokens[starts + torch.arange(window)]
    stats = calibrate(model, rows.split(max(1, 2048 // window)))
    coarse = "none" if export == "uniform" else "angular"
    report = prune_model(model, stats, ratio, coarse, metric, multiple_of=multiple_of, generator=draw)  # pyright: ignore[reportArgumentType]
    losses = []
    if recover_steps:
        losses = recover(model, tokens, recover_steps, scores=report.scores, batch=recover_batch, window=min(window, 256))
    save_pruned(model, out_dir, tokenizer, export="padded" if export == "padded" else "list", overwrite=overwrite)
    if as_json:
        print(json.dumps({"out": str(out_dir), "widths": report.widths, "parameters": report.parameters, "losses": losses}))
        return
    layers, dense = len(report.widths), round(sum(report.widths) / (1 - report.achieved_ratio))
    print(f"{sum(report.widths)} of {dense} channels kept in {layers} layers: {', '.join(map(str, report.widths))}")
    print(f"{report.parameters:,} parameters, {report.parameters / report.dense_parameters:.1%} of {report.dense_parameters:,}")
    if losses:
        print(f"recovery: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    print(f"written to {out_dir}")


def load_directory(model_dir: Path) -> tuple[Any, Any]:
    """(model in float32, tokenizer); ValueError where the directory is none of a model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"{model_dir} is no model directory (there is no config.json); expected one that transformers wrote")
    if json.loads((model_dir / "config.json").read_text()).get("model_type", "").startswith("fewer_"):
        raise ValueError(f"{model_dir} holds a model that is pruned already; expected the dense one")
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32").eval(), AutoTokenizer.from_pretrained(model_dir)


def read_tokens(tokenizer: Any, text: list[Path], window: int) -> Tensor:
    """The tokens of text files one after the other; ValueError where they do not fill a window."""
    from fewer.tasks.language_corpus import read_texts, token_stream

    tokens = token_stream(tokenizer, read_texts(text))
    if len(tokens) < window:
        raise ValueError(
            f"the text has {len(tokens)} tokens; expected at least {window}, one window: give more --text, or a smaller --window"
        )
    return tokens


lm = typer.Typer(help="The small language model that the studies of language models share.", no_args_is_help=True)
PRESET = Annotated[str, typer.Option(help="family-s, or family-micro (random weights, for trying out).")]
STEPS = Annotated[int | None, typer.Option(help="Training steps in place of the recipe's 1,200.")]


def _fetch(preset: str, steps: int | None, text: list[Path] | None) -> Path:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from fewer.tasks import fetch_small_lm

    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as bars:
        bar = bars.add_task("the small language model")
        return fetch_small_lm(
            preset,
            steps=steps,
            text=text or [],
            tell=lambda done, total, words: bars.update(bar, completed=done, total=total, description=words),
        )


@lm.command("train")
def train_lm(preset: PRESET = "family-s", steps: STEPS = None, text: TEXT = None) -> None:
    """Train the model, or go on where training was broken off.

    Example: fewer lm train --preset family-s
    """
    print(_fetch(preset, steps, text))


@lm.command("path")
def lm_path(preset: PRESET = "family-s", steps: STEPS = None, text: TEXT = None) -> None:
    """The directory of the model, which is trained first where it is not there.

    Example: fewer lm path
    """
    print(_fetch(preset, steps, text))


@lm.command("info")
def lm_info(
    preset: PRESET = "family-s",
    steps: STEPS = None,
    text: TEXT = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Whether the model is trained, where it lies, and how well it predicts.

    Example: fewer lm info
    """
    from fewer.data.made_once import is_whole
    from fewer.tasks.small_lm import corpus_of, lm_folder, preset_of

    chosen = preset_of(preset)
    folder = lm_folder(chosen, corpus_of(text or []), chosen.recipe.of_length(steps) if chosen.recipe else None)
    about = json.loads((folder / "train.json").read_text()) if is_whole(folder) else {}
    if as_json:
        print(
            json.dumps(
                {"folder": str(folder), "trained": bool(about)} | {name: value for name, value in about.items() if name != "loss_curve"}
            )
        )
    elif not about:
        print(f"{folder.name} is not trained yet: fewer lm train --preset {preset}")
    else:
        print(
            f"{folder}\nvalidation loss {about['validation_loss']:.3f} nats a token, {about.get('seconds', 0):.0f} s of training on {about['corpus']}"
        )


@lm.command("clear")
def clear_lm() -> None:
    """Remove every small language model from the cache.

    Example: fewer lm clear
    """
    import shutil

    from fewer.data.fetching import cache_folder

    folder = cache_folder() / "lm"
    shutil.rmtree(folder, ignore_errors=True)
    print(f"removed {folder}")


COMMANDS = {"prune": prune, "lm": lm}
