"""The verb `fewer spt train`: a model directory in, an adapter out, trained with routed networks and sparse attention."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fewer.language._shared.command import MANY

app = typer.Typer(help="Fine-tune a language model with routed feed-forward networks and sparse attention: train.", no_args_is_help=True)


@app.callback()
def spt() -> None:
    """Fine-tune a language model with routed feed-forward networks and sparse attention."""


@app.command("train")
def train(
    model_dir: Annotated[Path, typer.Argument(help="A Llama, Mistral, Qwen2 or OPT model directory with its tokenizer.")],
    out: Annotated[Path, typer.Argument(help="A new directory for the adapter.")],
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text to learn (repeat for more).")],
    steps: Annotated[int, typer.Option(min=1, max=MANY, help="Steps.")] = 200,
    lr: Annotated[float, typer.Option(min=1e-12, max=10, help="The learning rate.")] = 1e-4,
    batch: Annotated[int, typer.Option(min=1, max=MANY, help="Windows of text a step.")] = 4,
    window: Annotated[int, typer.Option(min=2, max=MANY, help="Tokens of a window.")] = 512,
    rank: Annotated[int, typer.Option(min=1, max=MANY, help="LoRA's rank.")] = 16,
    keep: Annotated[int, typer.Option(min=1, max=MANY, help="One key in so many is kept.")] = 8,
    active: Annotated[int, typer.Option(min=1, max=4, help="Blocks, of 4, that a token passes.")] = 2,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Draws windows, adapters and code books.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what fewer wrote into OUT before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train an adapter on text: LoRA, routers and code books; the model itself is read and not changed.

    Example: fewer spt train model adapter --text notes.txt --steps 200
    """
    import torch

    from fewer.files import check_new
    from fewer.language._shared.model_directory import load_directory
    from fewer.language.spt.attention import SPTConfig
    from fewer.language.spt.model import get_spt_model
    from fewer.tasks.language_corpus import read_texts, token_stream
    from fewer.tasks.lm_training import check_window, draw_windows

    check_new(out, overwrite, inputs=[model_dir, *text], option="OUT")
    documents = read_texts(text)
    model, tokenizer = load_directory(model_dir, "float32", dense=True)
    tokens = token_stream(tokenizer, documents)
    check_window(tokens, window)
    torch.manual_seed(seed)
    made = get_spt_model(model, SPTConfig(lora_r=rank, attention_keep=keep, ffn_active=active))
    windows = (draw_windows(tokens, batch, window, torch.Generator().manual_seed(seed * 1_000_003 + step)) for step in range(steps))
    made.train_code_books(draw_windows(tokens, 2, window, torch.Generator().manual_seed(seed)))

    def tell(step: int, loss: float) -> None:
        if not as_json and step % max(1, steps // 20) == 0:
            print(f"step {step} of {steps}: loss {loss:.3f}", file=sys.stderr)

    losses = made.fine_tune(windows, steps, lr, tell)
    made.save_pretrained(out, overwrite=overwrite)
    if as_json:
        print(json.dumps({"out": str(out), "losses": losses}))
        return
    print(f"{steps} steps; loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; adapter written to {out}")


COMMANDS = {"spt": app}
