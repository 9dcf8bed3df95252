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
    from torch import Tensor

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
    used, seen = torch.zeros(2, len(tokenizer), dtype=torch.float64)
    for part in rows.split(8):
        with torch.no_grad():
            logits = model(input_ids=part, output_router_logits=True, use_cache=False).router_logits
        networks = torch.stack([(select(each, model.config.top_k) < model.config.num_ffn_experts).sum(-1) for each in logits])
        used.index_add_(0, part.flatten(), networks.double().mean(0))
        seen.index_add_(0, part.flatten(), torch.ones(part.numel(), dtype=torch.float64))
    by_text: dict[str, Tensor] = {}  # several tokens may print alike
    for number in seen.nonzero().flatten().tolist():
        text_of = tokenizer.decode([number])
        by_text[text_of] = by_text.get(text_of, 0) + torch.stack([used[number], seen[number]])
    mean = {name: (total / times).item() for name, (total, times) in by_text.items()}
    total = (used.sum() / rows.numel()).item()
    if as_json:
        print(json.dumps({"tokens": rows.numel(), "ffn_experts_per_token": total, "by_token": mean}))
        return
    ordered = sorted(mean.items(), key=lambda each: each[1])
    print(f"{rows.numel()} tokens use {total:.3f} feed-forward experts each, of {model.config.top_k} experts; by token:")
    for name, value in ordered[:most] + ordered[max(most, len(ordered) - most) :]:
        print(f"{value:6.3f}  {name!r}")


COMMANDS = {"moe-stats": moe_stats}
