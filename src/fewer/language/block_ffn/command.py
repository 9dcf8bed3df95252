"""The verb `fewer sparsity`: how many experts of a BlockFFN model a text leaves unused, layer by layer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from fewer.language._shared.command import MANY


def sparsity(
    model_dir: Annotated[Path, typer.Argument(help="A directory that BlockFFNForCausalLM.save_pretrained wrote, with its tokenizer.")],
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text to read (repeat for more).")],
    window: Annotated[int, typer.Option(min=2, max=MANY, help="Tokens that are read at a time.")] = 256,
    most: Annotated[int, typer.Option(min=1, max=MANY, help="How many tokens are read at most.")] = 65_536,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell how sparse a model's experts are on a text: for a token (TLS), for windows of tokens (CLS), and how many the next token uses too.

    Example: fewer sparsity model --text notes.txt
    """
    from fewer.language._shared.model_directory import load_directory
    from fewer.language.block_ffn.model import BlockFFNForCausalLM
    from fewer.language.block_ffn.sparsity import mean_stats, model_sparsity
    from fewer.tasks.language_corpus import read_texts, token_stream
    from fewer.tasks.lm_training import check_window

    documents = read_texts(text)
    model, tokenizer = load_directory(model_dir)
    if not isinstance(model, BlockFFNForCausalLM):
        raise ValueError(f"{model_dir} holds a {type(model).__name__}; expected a BlockFFN model, which has experts to count")
    tokens = token_stream(tokenizer, documents)[:most]
    check_window(tokens, window)
    layers = model_sparsity(model, tokens[: len(tokens) // window * window].reshape(-1, window), tokenizer.eos_token_id)
    whole = mean_stats(layers)
    if as_json:
        print(json.dumps({"mean": dataclasses.asdict(whole), "layers": [dataclasses.asdict(layer) for layer in layers]}))
        return
    print(f"{whole.tokens} tokens, {model.config.num_experts} experts a layer; shares of the experts that stay unused, and reuse")
    print(f"{'layer':>5}  {'token':>7}  " + "  ".join(f"{f'{length} tokens':>9}" for length in whole.cls) + f"  {'reuse':>7}")
    for name, stats in [*enumerate(layers), ("mean", whole)]:
        shares = "  ".join(f"{share:9.1%}" for share in stats.cls.values())
        print(f"{name:>5}  {stats.tls:7.1%}  {shares}  {stats.reuse:7.1%}")


COMMANDS = {"sparsity": sparsity}
