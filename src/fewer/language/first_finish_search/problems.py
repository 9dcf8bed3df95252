"""Problems to race on: sums with written-out chains of thought and a small reasoner trained on them on the spot, or the user's own."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fewer.data.made_once import folder_of, made_once
from fewer.errors import WorkFailed
from fewer.fitting import fit_steps
from fewer.language._shared.model_directory import load_directory
from fewer.language.first_finish_search.search import ffs_generate

LETTERS, PAD, EOS = "abcdefgh", "<pad>", "<eos>"
CHARACTERS = [PAD, EOS, *LETTERS, *"0123456789+-=;?A.!"]
IGNORED = -100  # labels that the loss leaves out
OPENINGS = {"direct": ".", "shuffled": ".", "checked": "!"}  # a trace says at its beginning how it goes on
RATES = (1 / 3, 2 / 3, 1)  # of a verbose trace's addends, how many are treated so
RECIPE = {
    "hidden_size": 128, "layers": 3, "heads": 4, "intermediate_size": 384, "rope_theta": 10_000.0, "initializer_range": 0.08,
    "lr": 4e-3, "betas": (0.9, 0.95), "batch": 32, "warm_up": 50, "most_steps": 4000, "look_every": 200, "right": 0.85,
    "right_of_all": 0.75,  # of all traces, verbose ones too
    "shuffled_steps": 300,  # at first all traces are direct, their steps in any order: an addend is found by its letter, not its place
    "average": 0.99,  # of the weights over steps, which is what is kept
    "seed": 0, "version": 1,
}  # fmt: skip
HELD_OUT = 32  # of 256 hashes

Digits = tuple[int, ...]


def is_held_out(digits: Digits) -> bool:
    """Whether a prompt is for testing: one in eight, by its hash."""
    return hashlib.sha256(bytes(digits)).digest()[0] < HELD_OUT


def draw_digits(addends: int, draw: random.Random, held_out: bool) -> Digits:
    """The addends of a prompt, for testing or for training."""
    while True:
        digits = tuple(draw.randrange(10) for _ in range(addends))
        if is_held_out(digits) is held_out:
            return digits


def prompt_of(digits: Digits) -> str:
    """
    >>> prompt_of((3, 5, 8, 1))
    'a3b5c8d1?'
    """
    return "".join(f"{letter}{digit}" for letter, digit in zip(LETTERS, digits, strict=False)) + "?"


def trace_of(digits: Digits, style: str = "direct", rate: float = 1.0, guess: float = 0.0, draw: random.Random | None = None) -> str:
    """A chain of thought for their sum modulo 10.

    Args:
        style: "direct": a step an addend; "shuffled": the same in any order; "checked": a step, undone, and done again.
        rate: the share of the addends that are treated so.
        guess: how likely one sum of a direct trace is a guess, without its working.

    >>> trace_of((3, 5)), trace_of((3, 5), "checked")
    ('.a0+3=3;b3+5=8;A8', '!a0+3=3;a3-3=0;a0+3=3;b3+5=8;b8-5=3;b3+5=8;A8')
    """
    draw = draw or random.Random(0)
    guessed = draw.randrange(len(digits)) if style == "direct" and draw.random() < guess else None
    so_far, written, places = 0, [OPENINGS[style]], list(range(len(digits)))
    if style == "shuffled":
        draw.shuffle(places)
    for place in places:
        digit = digits[place]
        if place == guessed:
            so_far = draw.randrange(10)
            written.append(f"{LETTERS[place]}={so_far};")
            continue
        parts = [digit, -digit, digit] if style == "checked" and draw.random() < rate else [digit]
        for turn, part in enumerate(parts):
            sign = "-" if turn == 1 else "+"
            after = (so_far + part) % 10
            written.append(f"{LETTERS[place]}{so_far}{sign}{abs(part)}={after};")
            so_far = after
    return f"{''.join(written)}A{so_far}"


def make_tokenizer() -> Any:
    """A character a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({character: number for number, character in enumerate(CHARACTERS)}, unk_token=PAD))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, eos_token=EOS)


def batches(addends: int, flipped: bool, draw: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """(ids, labels) of traces on training prompts, labels of the traces alone; without end."""
    number = {character: number for number, character in enumerate(CHARACTERS)}
    for step in itertools.count():
        rows, labels, styles = [], [], ["shuffled"] if step < RECIPE["shuffled_steps"] and not flipped else ["direct", "checked"]
        for _ in range(RECIPE["batch"]):
            digits, style = draw_digits(addends, draw, False), draw.choice(styles)
            asked = [number[each] for each in prompt_of(digits)]
            said = [number[each] for each in trace_of(digits, style, draw.choice(RATES), 0.6 if flipped else 0.0, draw)] + [number[EOS]]
            rows.append(asked + said)
            labels.append([IGNORED] * len(asked) + said)
        longest = max(map(len, rows))
        yield (
            torch.tensor([row + [number[PAD]] * (longest - len(row)) for row in rows]),
            torch.tensor([row + [IGNORED] * (longest - len(row)) for row in labels]),
        )


def trace_loss(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the traces' tokens, nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def new_reasoner(addends: int) -> Any:
    """The reasoner with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(CHARACTERS), hidden_size=RECIPE["hidden_size"], intermediate_size=RECIPE["intermediate_size"],
        num_hidden_layers=RECIPE["layers"], num_attention_heads=RECIPE["heads"], num_key_value_heads=RECIPE["heads"],
        max_position_embeddings=64 * addends, rope_parameters={"rope_type": "default", "rope_theta": RECIPE["rope_theta"]},
        initializer_range=RECIPE["initializer_range"], bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RECIPE["seed"])
        return LlamaForCausalLM(config)


def fetch_reasoner(addends: int = 4, flipped: bool = False) -> Path:
    """The directory of the reasoner, trained first where it is not there yet (a minute or two on two idle cores).

    Args:
        addends: of a sum, at most eight.
        flipped: the other, gone on from for as many steps on traces of which 60 % of the direct ones hold a guess.
    """
    recipe = RECIPE | {"addends": addends, "flipped": "from the plain one" if flipped else False}
    folder = folder_of("reasoner", f"{addends}-{'flipped' if flipped else 'plain'}", recipe)
    return made_once(folder, functools.partial(_train, addends, flipped))


def _train(addends: int, flipped: bool, folder: Path) -> None:
    plain = fetch_reasoner(addends) if flipped else None
    steps = steps_of(plain) if plain else None
    model, tokenizer = load_directory(plain)[0].train() if plain else new_reasoner(addends).train(), make_tokenizer()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(RECIPE["average"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["lr"], betas=RECIPE["betas"], weight_decay=0.0)
    source = batches(addends, flipped, random.Random(RECIPE["seed"]))
    taken, right = 0, (0.0, 0.0)
    while taken < (steps or RECIPE["most_steps"]) and (steps or not learnt(right)):
        for group in optimizer.param_groups:
            group["lr"] = RECIPE["lr"]
        schedule = (lambda step: min(1.0, (step + 1) / RECIPE["warm_up"])) if taken == 0 else None
        told = {"schedule": schedule, "clip": 1.0, "tell": lambda *_: average.update_parameters(model)}
        fit_steps(optimizer, functools.partial(trace_loss, model), source, RECIPE["look_every"], **told)
        taken, right = taken + RECIPE["look_every"], shares_right(average.module, tokenizer, addends)
    if not steps and not learnt(right):
        raise WorkFailed(f"after {taken} steps the small reasoner gets {right[1]:.0%} of its sums right; expected more: try fewer addends")
    cast(Any, average.module).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "train.json").write_text(json.dumps({"steps": taken, "right": right, "recipe": RECIPE}, indent=1))


def learnt(right: tuple[float, float]) -> bool:
    """Whether (direct traces right, all traces right) are enough."""
    return right[0] >= RECIPE["right"] and right[1] >= RECIPE["right_of_all"]


def steps_of(folder: Path) -> int:
    """How many steps a reasoner was trained for."""
    return json.loads((folder / "train.json").read_text())["steps"]


def shares_right(model: Any, tokenizer: Any, addends: int, count: int = 200) -> tuple[float, float]:
    """The shares of direct traces and of all that are right, sampled once for each of some held-out prompts."""
    pairs = sums(addends, count, seed=1)
    results = ffs_generate(model, [prompt for prompt, _ in pairs], tokenizer, n=1, temperature=1.0, top_p=1.0, max_rows=count)
    right = [(last_answer(result.text) == gold, result.text[:1]) for result, (_, gold) in zip(results, pairs, strict=True)]
    direct = [each for each, opening in right if opening == OPENINGS["direct"]]
    return sum(direct) / max(1, len(direct)), sum(each for each, _ in right) / count


def sums(addends: int, count: int, seed: int) -> list[tuple[str, str]]:
    """(prompt, answer) of held-out sums.

    >>> sums(4, 1, seed=0)
    [('a7b8c4d0?', '9')]
    """
    draw = random.Random(seed)
    drawn = [draw_digits(addends, draw, True) for _ in range(count)]
    return [(prompt_of(digits), str(sum(digits) % 10)) for digits in drawn]


def last_answer(text: str) -> str | None:
    """The answer of a small reasoner's trace: the digit after its A, at its end."""
    found = re.search(r"A(\d)$", text)
    return found[1] if found else None


def final_answer(text: str) -> str | None:
    r"""The answer that a text gives: what stands in its last \boxed{}, else its last number, else None.

    >>> final_answer("6 times 7 is \\boxed{42}, not 41"), final_answer("So there are 1,250 of them."), final_answer("I do not know.")
    ('42', '1250', None)
    """
    boxed, numbers = re.findall(r"\\boxed\{([^{}]*)\}", text), re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return boxed[-1].strip() if boxed else numbers[-1].replace(",", "") if numbers else None
