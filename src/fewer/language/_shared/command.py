"""The verb `fewer lm`: the small language model that studies of language models work on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

MANY = 10**9
lm = typer.Typer(help="The small language model that the studies of language models share.", no_args_is_help=True)
PRESET = Annotated[Literal["family-s", "family-micro"], typer.Option(help="family-micro has random weights, for trying out.")]
STEPS = Annotated[int | None, typer.Option(min=1, max=MANY, help="Training steps in place of the recipe's 1,200.")]
TEXT = Annotated[list[Path] | None, typer.Option("--text", help="UTF-8 text files (repeat for more).")]

DRAFT = Annotated[
    str | None, typer.Option(help="Verify drafts, several tokens a pass: ngram (what followed before), or a smaller model's directory.")
]


def check_alone(why: str, **options: object) -> None:
    """ValueError where more than one of these options is given."""
    given = [f"--{name}" for name, value in options.items() if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are given together; expected one of them: {why}")


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
    from fewer.data.fetching import cache_folder
    from fewer.files import discard

    folder = cache_folder() / "lm"
    discard(folder)
    print(f"removed {folder}")


COMMANDS = {"lm": lm}
