"""How a row draws its next token: temperature, top-k, top-p, and a stream of random numbers of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fewer.checks import check_not_negative, check_whole, is_number

LONGEST = 32_768  # new tokens by default, as the paper gives R1-like models, where the positions allow it
DRAWN_AT_ONCE = 32  # random numbers


@dataclass(frozen=True)
class RaceConfig:
    """How a prompt is raced.

    Attributes:
        n: samples of a prompt. k: how many must finish; their parsed answers vote.
        max_new_tokens: where a sample is cut off, which is not finishing; None: 32,768 or what the model's positions leave.
        min_new_tokens: before that many, end tokens are masked and stop strings do not end: an empty sample would win every race.
        temperature: 0 takes the likeliest token (n = 1 only). top_p, top_k: as transformers has them; 1 and 0 filter nothing.
        stop_strings, stop_token_ids: what ends a sample beside the model's end tokens.
        prefixes: row i's turn opens with the i-th of these (in turn), which counts as prompt.
        seed: row i of prompt p draws from a generator of its own, seeded with (seed, p, i).
        max_rows: rows in the model at a time, over all prompts.
    """

    n: int = 4
    k: int = 1
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    prefixes: tuple[str, ...] = ()
    seed: int = 0
    max_rows: int = 64

    def __post_init__(self) -> None:
        check_whole(n=self.n, k=self.k, max_rows=self.max_rows, max_new_tokens=self.max_new_tokens, optional=["max_new_tokens"])
        check_whole(0, min_new_tokens=self.min_new_tokens, top_k=self.top_k, seed=self.seed)
        check_not_negative(temperature=self.temperature)
        for name in ("stop_strings", "stop_token_ids", "prefixes"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str | int) else tuple(given))
        if self.k > self.n:
            raise ValueError(f"k is {self.k} and n {self.n}; expected k of at most n: vote among fewer, or sample more")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"temperature is 0 and n {self.n}: all rows would be equal; expected a temperature above 0, or n=1")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; expected a number above 0 and at most 1")
        if self.max_new_tokens is not None and self.min_new_tokens >= self.max_new_tokens:
            raise ValueError(f"min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}; expected it to be below")
        if self.n > self.max_rows:
            raise ValueError(f"n is {self.n} and max_rows {self.max_rows}; expected n of at most max_rows: raise max_rows, or sample fewer")
        if "" in self.stop_strings:
            raise ValueError("stop_strings holds ''; expected texts of at least one character: leave it out")


def uniforms(*key: int) -> Iterator[float]:
    """Numbers from 0 to 1 without end, the same for the same key and independent of those of other keys."""
    draw = np.random.default_rng(key)
    while True:
        yield from draw.random(DRAWN_AT_ONCE).tolist()


def draw_tokens(logits: Float[Tensor, "R V"], u: Float[Tensor, " R"], config: RaceConfig) -> Int64[Tensor, " R"]:
    """The token of each row at which the distribution function of its tempered, filtered distribution passes u.

    One number from 0 to 1 a row and token: a row's trace depends on no other row.
    """
    if config.temperature == 0:
        return logits.argmax(-1)
    probabilities, order = torch.softmax(logits / config.temperature, -1).double(), None
    if config.top_k or config.top_p < 1:
        probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
        if config.top_k:
            probabilities[:, config.top_k :] = 0
            probabilities /= probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= config.top_p] = 0
    mass = probabilities.cumsum(-1)
    drawn = torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True)
    return (drawn if order is None else order.gather(-1, drawn)).squeeze(-1)
