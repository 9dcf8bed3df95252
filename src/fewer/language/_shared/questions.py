"""What a study teaches a language model: questions with short answers, such as additions in words ("What is 417 plus 289?")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # labels that the loss leaves out
Pair = tuple[str, str]  # question, answer


@dataclass(frozen=True)
class Problems:
    """Questions with their answers, in tokens.

    Attributes:
        ids: question, answer, end of text, and more of it up to the longest [N, T].
        labels: the same, but only answers and one end of text are judged.
    """

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def kept(self) -> int:
        """How many last positions the output layer is needed at: from the one before the first answer on."""
        return self.ids.shape[1] - int((self.labels != IGNORED).any(0).nonzero()[0, 0]) + 1


def draw_sums(count: int, digits: int, seed: int, but: Sequence[Pair] = ()) -> list[Pair]:
    """Additions of two numbers of some digits, in words; none twice, and none of those in `but`.

    >>> draw_sums(1, 3, seed=0)
    [('What is 144 plus 739?', ' 883')]
    """
    draw, taken, drawn = torch.Generator().manual_seed(seed), set(but), []
    while len(drawn) < count:
        a, b = torch.randint(10 ** (digits - 1), 10**digits, (2,), generator=draw).tolist()
        pair = (f"What is {a} plus {b}?", f" {a + b}")
        if pair not in taken:
            taken.add(pair)
            drawn.append(pair)
    return drawn


def with_room(tokenizer: Any, pairs: Sequence[Pair], longest: int) -> list[Pair]:
    """The pairs whose questions leave room for a token of their answers."""
    return [pair for pair in pairs if len(tokenizer(pair[0], add_special_tokens=False).input_ids) < longest]


def encode(tokenizer: Any, pairs: Sequence[Pair], longest: int | None = None) -> Problems:
    """Tokens of pairs; the shorter are filled up at their end, where causal attention and labels leave it out.

    Args:
        longest: tokens kept of a pair that has more; all by default.
    """
    end, rows, labels = tokenizer.eos_token_id, [], []
    if end is None:
        raise ValueError("the tokenizer has no end-of-text token, which ends an answer; expected one: set its eos_token")
    for asked, answer in pairs:
        before, after = (tokenizer(text, add_special_tokens=False).input_ids for text in (asked, answer))
        rows.append([*before, *after, end][:longest])
        labels.append([*[IGNORED] * len(before), *after, end][:longest])
    length = max(map(len, rows))
    return Problems(
        torch.tensor([row + [end] * (length - len(row)) for row in rows]),
        torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels]),
    )


def answer_loss(model: Any, problems: Problems) -> Tensor:
    """Mean cross-entropy of the answers' tokens, nats."""
    logits = model(input_ids=problems.ids, use_cache=False, logits_to_keep=problems.kept).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), problems.labels[:, 1 - problems.kept :].flatten(), ignore_index=IGNORED)


@torch.no_grad()
def judge(model: Any, problems: Problems, batch: int = 48) -> tuple[float, float]:
    """(share of answers that greedy decoding gets exactly right, mean loss of their tokens in nats).

    Greedy decoding writes the answer if and only if each of its tokens is the likeliest after those before, which one pass tells.
    """
    right, loss, tokens = 0, 0.0, 0
    for start in range(0, len(problems), batch):
        part = Problems(problems.ids[start : start + batch], problems.labels[start : start + batch])
        logits = model(input_ids=part.ids, use_cache=False, logits_to_keep=part.kept).logits[:, :-1].float()
        wanted = part.labels[:, 1 - part.kept :]
        judged = wanted != IGNORED
        right += int(((logits.argmax(-1) == wanted) | ~judged).all(1).sum())
        loss += F.cross_entropy(logits[judged], wanted[judged], reduction="sum").item()
        tokens += int(judged.sum())
    return right / len(problems), loss / tokens
