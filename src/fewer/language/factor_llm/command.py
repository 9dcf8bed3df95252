"""The verb `fewer factorize`: a model directory in, one whose tokens see a part of its feed-forward networks out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from fewer.language._shared.command import MANY


def factorize(
    model_dir: Annotated[Path, typer.Argument(help="A Llama, Mistral or Qwen2 model directory with its tokenizer.")],
    out_dir: Annotated[Path, typer.Argument(help="The directory to write the factorised model into.")],
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text to adapt to (repeat for more).")],
    experts: Annotated[int, typer.Option(min=2, max=MANY, help="Experts a feed-forward network is cut into.")] = 4,
    top_k: Annotated[int, typer.Option(min=1, max=MANY, help="Experts a token sees.")] = 2,
    partition: Annotated[Literal["contiguous", "random", "cluster"], typer.Option(help="How neurons come into experts.")] = "contiguous",
    steps: Annotated[int, typer.Option(min=1, max=MANY, help="Steps of tuning; the first third trains the routers alone.")] = 1000,
    lr: Annotated[float, typer.Option(min=1e-12, max=10, help="The learning rate of the experts.")] = 4e-5,
    batch: Annotated[int, typer.Option(min=1, max=MANY, help="Windows of text a step.")] = 1,
    window: Annotated[int, typer.Option(min=2, max=MANY, help="Tokens of a window.")] = 1024,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Draws routers and windows.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what fewer wrote into OUT_DIR before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Cut a trained model's feed-forward networks into experts, of which each token sees some, and adapt it to a text.

    Example: fewer factorize model smaller --experts 4 --top-k 2 --text notes.txt --steps 200
    """
    from fewer.files import check_new, made_whole
    from fewer.language._shared.model_directory import load_directory
    from fewer.language.factor_llm.adaptation import AdaptConfig, adapt, check_length
    from fewer.language.factor_llm.factorization import check_factorizable
    from fewer.language.factor_llm.factorization import factorize as cut
    from fewer.tasks import token_loss
    from fewer.tasks.language_corpus import read_texts, token_stream

    inputs = [model_dir, *text]
    check_new(out_dir, overwrite, inputs=inputs, option="OUT_DIR")
    documents = read_texts(text)
    model, tokenizer = load_directory(model_dir, dense=True)
    check_factorizable(model, experts, top_k)
    tokens = token_stream(tokenizer, documents)
    config = AdaptConfig(lr=lr, batch=batch, window=window, seed=seed)
    check_length(tokens, config, model.config.max_position_embeddings)
    held = tokens[: 8 * window]
    before = token_loss(model, held, window=window)
    cut(model, experts, top_k, partition, seed=seed)
    untouched = token_loss(model, held, window=window)
    done = adapt(model, tokens, steps, config)
    after = token_loss(model, held, window=window)
    with made_whole(out_dir, overwrite, inputs=inputs, option="OUT_DIR") as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    if as_json:
        losses = {"dense": before, "untouched": untouched, "adapted": after}
        print(json.dumps({"out": str(out_dir), "loss": losses, "tokens": done.tokens, "experts": experts, "top_k": top_k}))
        return
    print(
        f"loss on the text (which it was adapted to): dense {before:.3f}, cut {untouched:.3f}, adapted {after:.3f}; {done.tokens} tokens used"
    )
    print(f"each token sees {top_k} of {experts} experts; written to {out_dir}")


COMMANDS = {"factorize": factorize}
