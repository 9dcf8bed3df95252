"""The verbs `fewer int-vs-fp`, what each format does to a language model, and `fewer formats`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Literal

import typer

from fewer.lowbit.int_vs_fp.format_command import app as formats

MANY = 10**6


def int_vs_fp(
    model_dir: Annotated[Path, typer.Argument(help="A transformers model directory with its tokenizer.")],
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text to compare on (repeat for more).")],
    chosen: Annotated[str, typer.Option("--formats", help="Names of formats, with commas between them; by default all of the pairs.")] = "",
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Turn operands by random signs and a Hadamard matrix of the block's size.")
    ] = False,
    windows: Annotated[int, typer.Option(min=1, max=MANY, help="Windows of text.")] = 1,
    window: Annotated[int, typer.Option(min=2, max=MANY, help="Tokens of a window.")] = 256,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Draws windows and signs.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A new directory for packed weights, each layer in its better format of --pair.")] = None,
    pair: Annotated[Literal["mx8", "mx6", "mx4", "nv4"], typer.Option(help="The pair whose better formats --out takes.")] = "mx8",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what fewer wrote into --out before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """How far each block format moves a model's next token, what it loses of inputs and weights, and which suits which layer.

    KL is over the model's own 25 most likely tokens, renormalised, in nats a token; (x 10^6 / 25) is how the paper's tables have it.

    Example: fewer int-vs-fp ./model --text notes.txt --rotate
    """
    from fewer.checks import check_choice
    from fewer.files import check_new
    from fewer.lowbit.int_vs_fp import Reference, analyse_model, convert, divergence, revert, save_packed
    from fewer.lowbit.int_vs_fp.problems import model_and_text
    from fewer.lowbit.int_vs_fp.tensors import bits_of
    from fewer.lowbit.int_vs_fp.theory import ALL, PAIRS

    names = [name.strip() for name in chosen.split(",") if name.strip()] or list(ALL)
    for name in names:
        check_choice(list(ALL), **{"--formats": name})
    inputs = [model_dir, *text]
    if out:
        check_new(out, overwrite, inputs=inputs)
    given = model_and_text(str(model_dir), [str(file) for file in text], window=window)
    model, turn = given.model(), "block" if rotate else None
    batches = given.windows(seed, windows)
    reference = Reference.of(model, [batch["input_ids"] for batch in batches])
    found = {}
    for name in names:
        convert(model, name, turn, seed=seed)
        found[name] = divergence(reference, model)
        revert(model)
        if not as_json:
            if name == names[0]:
                print(
                    f"perplexity as it is: {reference.perplexity:.3f}\n{'format':12}{'bits':>6}{'KL':>10}{'x 10^6/25':>11}{'perplexity':>12}"
                )
            each = found[name]
            print(f"{name:12}{bits_of(name):6.2f}{each.kl:10.5f}{each.kl_released:11.1f}{each.perplexity:12.3f}", flush=True)
    report = analyse_model(model, batches[:1], rotate=turn, backward=False)
    best = {layer: own[pair] for layer, own in report.recommended.items()}
    if out:
        save_packed(convert(model, best, turn, seed=seed), out, overwrite=overwrite, inputs=inputs)
    if as_json:
        words = {name: {"bits": bits_of(name), "kl": each.kl, "perplexity": each.perplexity} for name, each in found.items()}
        crest = {layer: report.of_layer(layer).mean_kappa("mxint8") for layer in report.layers}
        told = {"perplexity": reference.perplexity, "formats": words, "recommended": report.recommended, "out": str(out) if out else None}
        print(json.dumps(told | {"crest": {name: value if math.isfinite(value) else None for name, value in crest.items()}}))
        return
    print(f"\n{'layer':40}{'crest':>6}  " + "".join(f"{each:12}" for each in PAIRS))
    for layer, own in report.recommended.items():
        crest = report.of_layer(layer).mean_kappa("mxint8")
        print(f"{layer:40}{crest:6.2f}  " + "".join(f"{own[each]:12}" for each in PAIRS))
    if out:
        print(f"weights in the better format of {pair}, layer by layer, written to {out}")


COMMANDS = {"int-vs-fp": int_vs_fp, "formats": formats}
