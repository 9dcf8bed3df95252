"""What study and bench count in, the ways a user has today, and the check by hand."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewer.data import load_e_coli, load_state_of_the_union

LENGTH = 1_000_000  # letters of a text
PATTERNS = (64, 256, 1024, 4096, 16384, 65536)
LETTERS = 50  # as many are convolved where there are more, and the time is scaled up
HELD_OUT, PASSAGES, PASSAGE = 5, 20, 256
REPLACED = (0.0, 0.1, 0.2, 0.3, 0.4)  # shares of a passage's words


def dna(length: int = LENGTH) -> np.ndarray:
    """The first letters of E. coli's genome, as bytes."""
    return np.frombuffer(load_e_coli()[:length].encode("ascii"), dtype=np.uint8)


def english(length: int = LENGTH) -> np.ndarray:
    """The State of the Union addresses in order, as bytes."""
    return np.frombuffer("\n".join(text for _, text in load_state_of_the_union()).encode()[:length], dtype=np.uint8)


def addresses() -> list[np.ndarray]:
    """Each State of the Union address as the numbers of its words, lower case and without punctuation."""
    number: dict[str, int] = {}
    return [
        np.array([number.setdefault(word, len(number)) for word in re.findall(r"[a-z0-9']+", text.lower())], dtype=np.int64)
        for _, text in load_state_of_the_union()
    ]


def hard(length: int, m: int, rng: np.random.Generator) -> np.ndarray:
    """Sqrt m letters, uniformly: the alphabet for which neither pairs nor transforms alone are good."""
    return rng.integers(math.isqrt(m), size=length)


@dataclass(frozen=True)
class Texts:
    """What the arms count in: texts by name, and the addresses of which passages are planted."""

    named: dict[str, np.ndarray]
    addresses: list[np.ndarray]
    patterns: tuple[int, ...] = PATTERNS

    def problems(self, rng: np.random.Generator) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
        """(text's name, m, text, pattern), the pattern cut out of the text at a random place and changed in a tenth of its letters."""
        for name in (*self.named, *(["hard"] if self.addresses else [])):
            for m in self.patterns:
                text = hard(LENGTH, m, rng) if name == "hard" else self.named[name]
                if 2 * m > len(text):
                    continue
                place = int(rng.integers(len(text) - m + 1))
                pattern = text[place : place + m].copy()
                changed = rng.random(m) < 0.1
                pattern[changed] = rng.choice(text, int(changed.sum()))
                yield name, m, text, pattern


@dataclass(frozen=True)
class Planted:
    """A passage, and where in the text it stands with a share of its words replaced."""

    passage: np.ndarray
    replaced: float
    position: int
    distance: int


def contaminate(texts: list[np.ndarray], length: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Planted]]:
    """The addresses but five as one text, with passages of those five planted in it, some of their words replaced."""
    order = rng.permutation(len(texts))
    out = np.concatenate([texts[i] for i in order[HELD_OUT:]])[:length].copy()
    held = np.concatenate([texts[i] for i in order[:HELD_OUT]])
    planted = []
    slots = rng.permutation(length // PASSAGE - 1)[:PASSAGES]
    for number, slot in enumerate(slots):
        start = int(rng.integers(len(held) - PASSAGE))
        passage, share = held[start : start + PASSAGE], REPLACED[number % len(REPLACED)]
        copy = passage.copy()
        changed = rng.permutation(PASSAGE)[: round(share * PASSAGE)]
        copy[changed] = rng.choice(out, len(changed))
        at = int(slot) * PASSAGE + 7
        out[at : at + PASSAGE] = copy
        planted.append(Planted(passage, share, at, int((copy != passage).sum())))
    return out, planted


def distance_at(text: np.ndarray, pattern: np.ndarray, i: int) -> int:
    """The distance of one window, compared plainly."""
    return int(np.count_nonzero(text[i : i + len(pattern)] != pattern))


def wrong_windows(text: np.ndarray, pattern: np.ndarray, distances: np.ndarray, rng: np.random.Generator, checked: int = 64) -> int:
    """How many of some random windows have another distance than a plain comparison finds."""
    places = rng.integers(len(text) - len(pattern) + 1, size=checked)
    return sum(distance_at(text, pattern, int(i)) != int(distances[i]) for i in places)


def by_correlation(text: np.ndarray, pattern: np.ndarray, letters: Any = None) -> np.ndarray:
    """The distances by one `scipy.signal.oaconvolve` for each letter of the pattern, or of those named."""
    from scipy.signal import oaconvolve

    matches = np.zeros(len(text) - len(pattern) + 1)
    for letter in np.unique(pattern) if letters is None else letters:
        matches += oaconvolve((text == letter).astype(np.float64), (pattern[::-1] == letter).astype(np.float64), mode="valid")
    return len(pattern) - np.rint(matches).astype(np.int32)
