"""The verb `fewer moe-stats`: how many feed-forward experts each token of a text uses in a MoE++ model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fewer.language._shared.command import MANY


def moe_stats(
    model_dir: Annotated[Path, typer.Argument(help="A directory that MoEPlusPlusForCausalLM.save_pretrained wrote, with its tokenizer.")],
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text to read (repeat for more).")],
    window: Annotated[int, typer.Option(min=2, max=MANY, help="Tokens that are read at a time.")] = 256,
    most: Annotated[int, typer.Option(min=1, max=MANY, help="How many tokens of the table's two ends are shown.")] = 12,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell how many feed-forward experts a token uses, mean over layers, by token: those that need least and most.

    Example: fewer moe-stats model --text notes.txt
    """
    import torch

    from fewer.language._shared.model_directory import load_directory
    from fewer.language.moe_plus_plus.model import MoEPlusPlusForCausalLM
    from fewer.language.moe_plus_plus.router import select
    from fewer.tasks.language_corpus import read_texts, token_stream
    from fewer.tasks.lm_training import check_window

    documents = read_texts(text)
    model, tokenizer = load_directory(model_dir)
    if not isinstance(model, MoEPlusPlusForCausalLM):
        raise ValueError(f"{model_dir} holds a {type(model).__name__}; expected a MoE++ model, which has experts to count")
    tokens = token_stream(tokenizer, documents)
    check_window(tokens, window)
    rows = tokens[: len(tokens) // window * window].reshape(-1, window)
    used = torch.zeros(len(tokenizer)), torch.zeros(len(tokenizer))
    for part in rows.split(8):
        with torch.no_grad():
            logits = model(input_ids=part, output_router_logits=True, use_cache=False).router_logits
        networks = torch.stack([(select(each, model.config.top_k) < model.config.num_ffn_experts).sum(-1) for each in logits])
        used[0].index_add_(0, part.flatten(), networks.float().mean(0))
        used[1].index_add_(0, part.flatten(), torch.ones(part.numel()))
    mean = {tokenizer.decode([number]): (used[0][number] / used[1][number]).item() for number in used[1].nonzero().flatten().tolist()}
    total = used[0].sum().item() / rows.numel()
    if as_json:
        print(json.dumps({"tokens": rows.numel(), "ffn_experts_per_token": total, "by_token": mean}))
        return
    ordered = sorted(mean.items(), key=lambda each: each[1])
    print(f"{rows.numel()} tokens use {total:.3f} feed-forward experts each, of {model.config.top_k} experts; by token:")
    for name, value in ordered[:most] + ordered[max(most, len(ordered) - most) :]:
        print(f"{value:6.3f}  {name!r}")


COMMANDS = {"moe-stats": moe_stats}
