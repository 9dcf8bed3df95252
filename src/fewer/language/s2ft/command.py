"""The verbs `fewer s2ft train | merge | to-lora`: a model directory in; an adapter, a merged model, or a LoRA adapter out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from fewer.devices import Device, choose_device

MANY = 10**9
app = typer.Typer(
    help="Fine-tune a language model by training a few of its heads and channels: train, merge, to-lora.", no_args_is_help=True
)

MODEL = Annotated[Path, typer.Argument(help="A Llama, Mistral, Qwen2, Gemma, OPT or GPT-2 model directory.")]
ADAPTER = Annotated[Path, typer.Argument(help="An adapter, as `fewer s2ft train` writes it.")]
OUT = Annotated[Path, typer.Argument(help="A new directory.")]
OVERWRITE = Annotated[bool, typer.Option("--overwrite", help="Replace what fewer wrote into OUT before.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("train")
def train(
    model_dir: MODEL,
    out: OUT,
    text: Annotated[list[Path] | None, typer.Option("--text", help="UTF-8 text to learn (repeat for more).")] = None,
    jsonl: Annotated[Path | None, typer.Option("--jsonl", help="Examples: an object with `prompt` and `completion` a line.")] = None,
    d_ratio: Annotated[float, typer.Option(min=0, max=1, help="The share of feed-forward channels to train.")] = 0.03,
    o_ratio: Annotated[float, typer.Option(min=0, max=1, help="The share of attention heads to train.")] = 0.0,
    lr: Annotated[float, typer.Option(min=1e-9, max=10, help="The highest learning rate, about three times what LoRA would take.")] = 1e-3,
    steps: Annotated[int, typer.Option(min=1, max=MANY, help="Optimizer steps.")] = 200,
    batch: Annotated[int, typer.Option(min=1, max=MANY, help="Windows of text, or examples, a step.")] = 8,
    window: Annotated[int, typer.Option(min=2, max=MANY, help="Tokens of a window, and most tokens of an example.")] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Draws the selection and the order of the data.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU where there is one.")] = Device.cpu,
    overwrite: OVERWRITE = False,
    as_json: JSON = False,
) -> None:
    """Train an adapter on text, or on examples (the loss is on completions only).

    Example: fewer s2ft train model adapter --text notes.txt --steps 200
    """
    from fewer.checks import check_positive, check_whole
    from fewer.files import check_new, made_whole
    from fewer.language._shared.fine_tuning import fine_tune
    from fewer.language._shared.model_directory import load_directory
    from fewer.language._shared.questions import answer_loss
    from fewer.language.s2ft import S2FTConfig, get_s2ft_model

    if bool(text) == bool(jsonl):
        raise ValueError("expected either --text (repeat for more) or --jsonl: give one of them")
    numbers: dict[str, Any] = {"--steps": steps, "--batch": batch}
    check_whole(**numbers)
    check_positive(**{"--lr": lr})
    inputs, place = [model_dir, *(text or []), *([jsonl] if jsonl else [])], choose_device(device)
    check_new(out, overwrite, inputs=inputs, option="OUT")
    config = S2FTConfig(d_ratio=d_ratio, o_ratio=o_ratio, seed=seed)
    plain, tokenizer = load_directory(model_dir)
    batches = windows_of(tokenizer, text, batch, window, seed) if text else examples_of(tokenizer, jsonl, batch, window, seed)
    first = next(batches)  # trouble with the data is told before the model is changed
    model = get_s2ft_model(plain.to(place), config)
    trained, every = model.get_nb_trainable_parameters()
    _, losses = fine_tune(
        model, (moved(each, place) for each in chained(first, batches)), answer_loss, lr=lr, steps=steps, tell=told(steps, as_json)
    )
    with made_whole(out, overwrite, inputs=inputs, option="OUT") as folder:
        model.save_pretrained(folder)
    if as_json:
        print(json.dumps({"out": str(out), "trained": trained, "parameters": every, "losses": losses}))
    else:
        print(f"{trained:,} of {every:,} parameters trained; loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
        print(f"written to {out}")


@app.command("merge")
def merge(model_dir: MODEL, adapter: ADAPTER, out: OUT, overwrite: OVERWRITE = False) -> None:
    """Write the model with an adapter in its weights, as a plain directory that transformers loads.

    Example: fewer s2ft merge model adapter merged
    """
    from fewer.files import check_new, made_whole
    from fewer.language._shared.model_directory import load_directory
    from fewer.language.s2ft import S2FTModel
    from fewer.language.s2ft.adapters.adapter import Adapter

    check_new(out, overwrite, inputs=[model_dir, adapter], option="OUT")
    Adapter.load(adapter)  # trouble with it is told before the model is read
    plain, tokenizer = load_directory(model_dir)
    model = S2FTModel.from_pretrained(plain, adapter)
    with made_whole(out, overwrite, inputs=[model_dir, adapter], option="OUT") as folder:
        model.merge_and_unload().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"written to {out}")


@app.command("to-lora")
def to_lora(adapter: ADAPTER, out: OUT, overwrite: OVERWRITE = False) -> None:
    """Write an adapter as a LoRA adapter that does exactly the same, for peft or any server of LoRA adapters.

    Example: fewer s2ft to-lora adapter lora
    """
    from fewer.language.s2ft import to_peft_lora

    print(f"written to {to_peft_lora(adapter, out, overwrite=overwrite)}")


def windows_of(tokenizer: Any, files: list[Path], batch: int, window: int, seed: int) -> Iterator[Any]:
    """Windows of the files' tokens, drawn anew for each step; ValueError where the text does not fill one."""
    import torch

    from fewer.language._shared.questions import IGNORED, Problems
    from fewer.tasks.language_corpus import read_texts, token_stream
    from fewer.tasks.lm_training import check_window, draw_windows

    tokens = token_stream(tokenizer, read_texts(files))
    check_window(tokens, window)
    draw = torch.Generator().manual_seed(seed)
    while True:
        ids = draw_windows(tokens, batch, window, draw)
        labels = ids.clone()
        labels[:, 0] = IGNORED  # nothing comes before it
        yield Problems(ids, labels)


def examples_of(tokenizer: Any, file: Path | None, batch: int, longest: int, seed: int) -> Iterator[Any]:
    """Batches of a JSONL file's examples, in a new order each time round; those whose prompts leave no room are left out, and told."""
    import torch

    from fewer.inputs import read_pairs
    from fewer.language._shared.questions import encode, with_room

    assert file is not None
    given = read_pairs(file)
    pairs = with_room(tokenizer, given, longest)
    if not pairs:
        raise ValueError(f"{file}: the prompts alone fill --window {longest}; expected room for completions: give a larger --window")
    if len(pairs) < len(given):
        print(
            f"{len(given) - len(pairs)} of {len(given)} examples are left out: their prompts alone fill --window {longest}", file=sys.stderr
        )
    draw, waiting = torch.Generator().manual_seed(seed), []
    while True:
        while len(waiting) < batch:
            waiting += torch.randperm(len(pairs), generator=draw).tolist()
        chosen, waiting = waiting[:batch], waiting[batch:]
        yield encode(tokenizer, [pairs[each] for each in chosen], longest)


def chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def moved(problems: Any, device: str) -> Any:
    return type(problems)(problems.ids.to(device), problems.labels.to(device))


def told(steps: int, quiet: bool) -> Any:
    """What tells how far training is: plain lines, ten in all."""

    def tell(step: int, loss: float) -> None:
        if not quiet and (step == steps or step % max(1, steps // 10) == 0):
            print(f"step {step} of {steps}: loss {loss:.3f}", flush=True)

    return tell


COMMANDS = {"s2ft": app}
