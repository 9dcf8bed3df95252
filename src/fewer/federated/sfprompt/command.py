"""The verb `fewer federated split-cost`: what a split model sends a client and round, beside what it replaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fewer.errors import UserError


def split_cost(
    model: Annotated[Path, typer.Argument(help="A transformers directory of a vision transformer.", show_default=False)],
    examples: Annotated[int, typer.Option(min=1, help="How many examples a client has.")] = 1000,
    keep: Annotated[float, typer.Option(min=0, max=1, help="The share of them that is sent.")] = 0.5,
    head_blocks: Annotated[int, typer.Option(min=0, help="Blocks of the head.")] = 1,
    tail_blocks: Annotated[int, typer.Option(min=0, help="Blocks of the tail.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Tokens of the prompt.")] = 4,
    at: Annotated[str, typer.Option(help="Where the prompt goes in: input, or cut.")] = "input",
    batch: Annotated[int, typer.Option(min=1, help="Examples a batch.")] = 30,
    split_epochs: Annotated[int, typer.Option(min=1, help="Passes over the examples that are sent.")] = 1,
    local_epochs: Annotated[int, typer.Option(min=1, help="Epochs of split federated learning, which sends all examples.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Numbers that SFPrompt sends a client and round, by message, beside full fine-tuning, SplitFed and federated prompt tuning.

    Only the model's config.json is read. Above the break-even SFPrompt sends more than full fine-tuning.

    Example: fewer federated split-cost MODEL_DIR --examples 1000 --keep 0.2 --head-blocks 1
    """
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from fewer.federated.sfprompt.cost import wire_cost
    from fewer.federated.sfprompt.split_model import split_vit
    from fewer.files import read_json

    if not (model / "config.json").is_file():
        raise UserError(f"{model} has no config.json; expected a transformers directory of a vision transformer")
    if (kind := read_json(model / "config.json").get("model_type")) != "vit":
        raise UserError(f"{model} holds a model of type {kind!r}; expected 'vit', a vision transformer of transformers")
    with torch.device("meta"):  # shapes alone
        whole = ViTForImageClassification(ViTConfig.from_pretrained(model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        split = split_vit(whole, head_blocks, tail_blocks, prompt_tokens, at)  # pyright: ignore[reportArgumentType] - checked there
    cost = wire_cost(split, examples, keep, split_epochs=split_epochs, batch_size=batch, local_epochs=local_epochs)
    ways = {
        "SFPrompt": cost.total, "full fine-tuning": cost.full, f"SplitFed, {local_epochs} epochs": cost.split_federated,
        "prompt tuning, device holds all": cost.prompt_tuning,
    }  # fmt: skip
    if as_json:
        told = {"messages": cost.numbers, "ways": ways, "ratio": cost.ratio, "sent": cost.sent_examples, "break_even": cost.break_even}
        print(json.dumps(told, indent=2))
        return
    print(f"a client of {examples} examples, {cost.sent_examples} of them sent; numbers a round (4 bytes each):")
    for kind, count in cost.numbers.items():
        print(f"  {kind.replace('_', ' '):<32}{count:>16,}")
    print()
    for way, count in ways.items():
        print(f"  {way:<32}{count:>16,}  {count / cost.full:8.3f} of full fine-tuning")
    print(f"\nbreak-even: {cost.break_even} sent examples a client and round")
    if cost.sent_examples > cost.break_even:
        print(f"{cost.sent_examples} are sent: more than full fine-tuning moves; a smaller --keep, or another method")


ACTIONS = {"split-cost": split_cost}
