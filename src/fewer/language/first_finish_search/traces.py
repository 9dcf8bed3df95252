"""What a race leaves: the samples as far as they came, which of them answers, and what it cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

FINISHED = "stop"  # how a trace ends that ended by itself; the others: "length" (cut off), "stopped" (the race was over), "error: ..."
AnswerFn = Callable[[str], Any]


@dataclass(frozen=True)
class Trace:
    """One sample, whole or as far as it came.

    Attributes:
        text: what it says, without special tokens; "" where there is no tokenizer.
        token_ids: what was generated, the end token with it; empty where a server made them.
        tokens: how many were generated.
        mean_logprob: mean log-probability (nats) of its sampled tokens, before temperature and filters; NaN where it is not known.
        reason: "stop": it ended by itself; "length": it was cut off; "stopped": its race was over; "error: ...": its request failed.
    """

    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    tokens: int
    mean_logprob: float
    reason: str

    @property
    def finished(self) -> bool:
        """Whether it ended by itself: being cut off is no end."""
        return self.reason == FINISHED


@dataclass(frozen=True)
class FFSResult:
    """The answer to one prompt.

    Attributes:
        text, token_ids: the winner's.
        finished: whether the winner ended by itself.
        winner: its row.
        sequential_tokens: tokens that had to be produced one after the other, which is what one waits for.
        total_tokens: tokens that were generated over all rows until the stop.
        prefill_tokens: tokens of prompt and prefixes that were passed through the model; with a server, of the prompt once a request.
        wall_s: seconds from the start of the race to its end.
        rows: all samples.
        answer: the winner's parsed answer; None without an `answer_fn`.
    """

    text: str
    token_ids: tuple[int, ...] = field(repr=False)
    finished: bool
    winner: int
    sequential_tokens: int
    total_tokens: int
    prefill_tokens: int
    wall_s: float
    rows: tuple[Trace, ...] = field(repr=False)
    answer: Any = None


def majority(answers: Sequence[Hashable | None]) -> int | None:
    """Where the most frequent answer stands first; None among them is no answer, and a tie goes to the one that stands first.

    >>> majority([None, "7", "8", "8", "7"]), majority([None])
    (1, None)
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return answers.index(max(votes, key=lambda answer: (votes[answer], -answers.index(answer)))) if votes else None


def likeliest(traces: Sequence[Trace]) -> int:
    """The row of the largest mean log-probability (unknown ones last), the lower row at equal ones."""
    return max(range(len(traces)), key=lambda row: (-math.inf if math.isnan(p := traces[row].mean_logprob) else p, -row))


def choose(traces: Sequence[Trace], order: Sequence[int], k: int, answer_fn: AnswerFn | None, longest: bool) -> tuple[int, Any]:
    """(winner's row, its answer): the vote among the first k that finished (or the last k), the likeliest row where none did.

    Args:
        order: the rows that finished, first to last.
    """
    voters = list(order[-k:] if longest else order[:k]) or [likeliest(traces)]
    answers = [answer_fn(traces[row].text) if answer_fn else None for row in voters]
    at = majority(answers) if len(voters) > 1 else 0
    at = (len(voters) - 1 if longest else 0) if at is None else at  # nobody's answer could be read
    return voters[at], answers[at]
