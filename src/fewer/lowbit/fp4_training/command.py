"""The verb `fewer fp4-plan`: a model directory and a text in; what each recipe loses, wins back and costs out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fewer.devices import Device, choose_device

MANY = 10**9
TRIED = ("nvfp4-nearest", "nvfp4", "nvfp4-te", "mxfp4", "mxfp4-sr-rht", "ue5m3", "paper", "follow-up")


def fp4_plan(
    model_dir: Annotated[Path, typer.Argument(help="A language model's directory, as transformers writes it; it is read, never changed.")],
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text to train on, its end held out (repeat for more).")],
    recipes: Annotated[
        list[str] | None, typer.Option("--recipe", help=f"One of {', '.join(TRIED)} (repeat for more; by default all).")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=MANY, help="Steps of training a recipe.")] = 20,
    batch: Annotated[int, typer.Option(min=1, max=MANY, help="Windows a step.")] = 4,
    window: Annotated[int, typer.Option(min=2, max=MANY, help="Tokens of a window.")] = 128,
    lr: Annotated[float, typer.Option(min=1e-9, max=10, help="AdamW's learning rate.")] = 1e-4,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Draws the windows and the recipes' random numbers.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU where there is one.")] = Device.cpu,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a copy of the model by each recipe, the same windows in the same order, and print loss, gap, gain and overhead.

    gap: held-out loss above training in full precision. gain: the share of the gap of NVFP4 with nearest rounding that is closed.
    overhead: operations of the casts over the products'.

    Example: fewer fp4-plan model --text notes.txt --steps 20
    """
    from fewer.checks import check_choice, check_positive, check_whole
    from fewer.lowbit.fp4_training import FP4Recipe

    numbers: dict[str, Any] = {"--steps": steps, "--batch": batch}
    check_whole(**numbers)
    check_positive(**{"--lr": lr})
    for each in recipes or ():
        check_choice(TRIED, **{"--recipe": each})
    naive = FP4Recipe.preset("nvfp4").replace(stochastic=frozenset(), seed=seed)
    chosen: dict[str, Any] = {"fp32": None, "nvfp4-nearest": naive}
    for name in recipes or TRIED:
        chosen.setdefault(name, naive if name == "nvfp4-nearest" else FP4Recipe.preset(name).replace(seed=seed))
    found = _tried(model_dir, text, chosen, steps, batch, window, lr, seed, choose_device(device), quiet=as_json)
    if as_json:
        print(json.dumps(found))
        return
    print(f"{'recipe':<14} {'loss':>8} {'gap':>8} {'gain':>7} {'overhead':>9}")
    for name, row in found.items():
        share = "" if row["gain"] is None else f"{row['gain']:.0%}"
        print(f"{name:<14} {row['loss']:8.4f} {row['gap']:8.4f} {share:>7} {row['overhead']:9.1%}")
    print(_advice(found))


def _tried(
    model_dir: Path, text: list[Path], chosen: dict[str, Any], steps: int, batch: int, window: int, lr: float, seed: int, device: str, quiet: bool
) -> dict[str, dict[str, Any]]:  # fmt: skip
    from fewer.language._shared.from_scratch import pretrain
    from fewer.language._shared.model_directory import load_directory
    from fewer.lowbit._shared.conversion import linear_maps
    from fewer.lowbit.fp4_training import convert
    from fewer.lowbit.fp4_training.problems import model_overhead
    from fewer.tasks import text_corpus, token_loss
    from fewer.tasks.language_corpus import token_stream
    from fewer.tasks.lm_training import Recipe, check_window

    corpus = text_corpus([str(each) for each in text])
    plain, tokenizer = load_directory(model_dir, "float32", dense=True)
    train, held_out = (token_stream(tokenizer, part) for part in (corpus.train, corpus.validation))
    for part in (train, held_out):
        check_window(part, window)
    if next(linear_maps(plain), None) is None:
        raise ValueError(f"{model_dir} has no linear layer to convert; expected a model of nn.Linear layers, such as a Llama: take another")
    recipe = Recipe(steps, batch, window, lr, warm_up=max(1, steps // 10), seed=seed)
    losses: dict[str, dict[str, Any]] = {}
    for name, fmt in chosen.items():
        model = copy.deepcopy(plain).to(device)
        if fmt is not None:
            convert(model, fmt)
        if not quiet:
            typer.echo(f"{name}: {steps} steps", err=True)
        pretrain(model, train.to(device), recipe)
        loss = token_loss(model, held_out[: 16 * batch * window].to(device), window=window)
        losses[name] = {"loss": loss, "overhead": model_overhead(model, batch * window)}
    high = losses["fp32"]["loss"]
    naive = losses["nvfp4-nearest"]["loss"] - high
    for row in losses.values():
        row["gap"] = row["loss"] - high
        row["gain"] = 1 - row["gap"] / naive if naive > 0 else None
    return losses


def _advice(found: dict[str, dict[str, Any]]) -> str:
    """One sentence: the recipe to take, or that there is nothing to win back."""
    tried = {name: row for name, row in found.items() if name not in ("fp32", "nvfp4-nearest")}
    if found["nvfp4-nearest"]["gain"] is None:
        return "NVFP4 with nearest rounding already ends no higher than full precision here: nothing is there to win back."
    best = min(tried, key=lambda name: tried[name]["loss"], default="")
    if not best or tried[best]["gain"] <= 0:
        return "no recipe closes any of the gap of NVFP4 with nearest rounding in these steps."
    return f"{best} closes most of the gap ({tried[best]['gain']:.0%}): FP4Recipe.preset({best!r})."


COMMANDS = {"fp4-plan": fp4_plan}
