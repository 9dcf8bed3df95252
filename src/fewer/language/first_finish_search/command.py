"""The verb `fewer ffs`: a prompt in a file and a model (a directory, or a server's address) in, the first answer to finish out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fewer.devices import Device, choose_device

MANY = 10**9


def ffs(
    model: Annotated[str, typer.Argument(help="A model directory, or an OpenAI-compatible server's address up to /v1.", metavar="MODEL")],
    prompt_file: Annotated[Path, typer.Option("--prompt-file", help="A UTF-8 text file: the prompt.")],
    n: Annotated[int, typer.Option("--samples", "-n", min=1, max=4096, help="Samples that race.")] = 4,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, max=MANY, help="Where a sample is cut off; by default 32,768 or what the model's positions leave.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=10, help="0 takes the likeliest token (one sample only).")] = 0.6,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="The share of probability that tokens are drawn from.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Row i draws from a generator of its own.")] = 0,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text that ends a sample too (repeat for more).")] = None,
    chat: Annotated[bool, typer.Option("--chat/--text", help="Put the prompt into the model's chat template, where it has one.")] = True,
    served_model: Annotated[str, typer.Option(help="The model's name at the server.")] = "model",
    timeout: Annotated[float, typer.Option(min=0.1, max=MANY, help="Seconds for the whole race at a server.")] = 600.0,
    device: Annotated[Device, typer.Option(help="Where to compute; auto takes a GPU where there is one.")] = Device.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Sample a prompt n times side by side, stop all as soon as one has ended, and print that one.

    Example: fewer ffs model --prompt-file question.txt -n 4
    """
    from fewer.inputs import read_text
    from fewer.language._shared.model_directory import load_directory
    from fewer.language.first_finish_search import RaceConfig, ffs_generate, ffs_request

    stops = tuple(stop or ())
    config = RaceConfig(n, 1, max_new_tokens, 0, temperature, top_p, stop_strings=stops, seed=seed, max_rows=max(n, 64))
    prompt: Any = read_text(prompt_file).strip()
    if not prompt:
        raise ValueError(f"{prompt_file} is empty; expected a prompt")
    if model.startswith(("http://", "https://")):
        wishes = {"temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens, "stop": list(stops) or None}
        sampling = {name: value for name, value in wishes.items() if value is not None}
        result = ffs_request(prompt, model, served_model, seed=seed, n=n, timeout=timeout, chat=chat, sampling=sampling)
    else:
        loaded, tokenizer = load_directory(model)
        if chat and tokenizer.chat_template:
            prompt = [{"role": "user", "content": prompt}]
        (result,) = ffs_generate(loaded.to(choose_device(device)), prompt, tokenizer, config)
    if as_json:
        lengths = [row.tokens for row in result.rows]
        about = {
            name: getattr(result, name) for name in ("finished", "winner", "sequential_tokens", "total_tokens", "prefill_tokens", "wall_s")
        }
        print(json.dumps({"text": result.text, **about, "rows": lengths}))
        return
    print(result.text)
    ended = "the first to end" if result.finished else "none ended by itself; this is the likeliest"
    typer.echo(
        f"row {result.winner} of {n}, {ended}: {result.sequential_tokens} tokens one after the other, {result.total_tokens} in all, "
        f"{result.wall_s:.2f} s",
        err=True,
    )


COMMANDS = {"ffs": ffs}
