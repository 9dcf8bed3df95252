"""Letters of any alphabet as small numbers: what is read, what is refused, and the codes that the counting loops take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fewer.checks import is_whole

TABLE = 1 << 22  # letters spread over at most so many numbers are looked up in a table, others by bisection
FEW = 16  # letters that are quicker counted one by one
NOWHERE = 255  # a byte that is no code
LONGEST = 2**31 - 1  # letters of a text: distances are int32


def read_letters(letters: Any, name: str) -> tuple[np.ndarray, str]:
    """Letters as integers [n] or [q, n], and what they were: "str", "bytes" or "int".

    Args:
        letters: an integer or boolean array (NumPy, torch, nested lists), a str (compared by code point), or bytes.
        name: what messages call it.

    Raises:
        ValueError: floats, objects, no letters, or more dimensions than two.
    """
    if isinstance(letters, str):
        found, kind = np.frombuffer(letters.encode("utf-32-le", "surrogatepass"), dtype=np.uint32), "str"
        if found.size and found.max() < 256:
            found = found.astype(np.uint8)
    elif isinstance(letters, bytes | bytearray | memoryview):
        found, kind = np.frombuffer(letters, dtype=np.uint8), "bytes"
    else:
        if hasattr(letters, "detach"):  # torch's
            if letters.is_floating_point():
                letters = letters.double()  # NumPy has no bfloat16; floats are refused below
            letters = letters.detach().cpu().numpy()
        found, kind = np.asarray(letters), "int"
    if found.dtype.kind == "f":
        has_nan = " with NaN" if np.isnan(found).any() else ""
        raise ValueError(
            f"{name} is {found.dtype}{has_nan}; expected letters (integers, str or bytes): discretise numbers first, for instance by their "
            "quantiles (numpy.searchsorted(numpy.quantile(x, [.25, .5, .75]), x))"
        )
    if found.dtype.kind not in "iub":
        raise ValueError(f"{name} is an array of {found.dtype}; expected integers, str or bytes: number its letters first")
    if found.ndim not in (1, 2) or found.size == 0:
        raise ValueError(f"{name} has shape {found.shape}; expected at least one letter in one dimension (patterns may be [q, m])")
    if found.shape[-1] > LONGEST:
        raise ValueError(f"{name} has {found.shape[-1]:,} letters; expected at most {LONGEST:,}, so that int32 holds a distance: cut it")
    if found.dtype == np.uint64 and found.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds {found.max()}; expected integers below 2^63: subtract a constant from text and pattern alike")
    return (found.view(np.uint8) if found.dtype == np.bool_ else found), kind


def read_wildcard(wildcard: Any, kind: str) -> int | None:
    """The wildcard as the number that its letter has."""
    if wildcard is None:
        return None
    if kind == "str" and isinstance(wildcard, str) and len(wildcard) == 1:
        return ord(wildcard)
    if kind == "bytes" and isinstance(wildcard, bytes) and len(wildcard) == 1:
        return wildcard[0]
    if kind != "str" and is_whole(wildcard):
        return int(wildcard)
    expected = {"str": "one character", "bytes": "one byte", "int": "a whole number"}[kind]
    raise ValueError(f"wildcard is {wildcard!r} for letters of type {kind}; expected {expected} or None")


def check_kinds(text: str, pattern: str) -> None:
    """ValueError where characters would be compared with numbers."""
    if (text == "str") != (pattern == "str"):
        raise ValueError(f"the text is {text} and the pattern {pattern}; expected both of one type: encode the str, or decode the other")


class Alphabet:
    """The letters that are told apart, numbered 0..size-1; `other` is any letter besides, `wild` the wildcard.

    Args:
        letters: any integers, with repeats.
        wildcard: the letter that matches everything, or None.

    >>> alphabet = Alphabet(np.array([7, 2**60, 7]), wildcard=3)
    >>> alphabet.codes(np.array([2**60, 7, 8, 3])).tolist()
    [1, 0, 2, 3]
    """

    def __init__(self, letters: np.ndarray, wildcard: int | None = None) -> None:
        values = np.flatnonzero(np.bincount(letters, minlength=1)) if letters.dtype == np.uint8 else np.unique(letters)
        self.letters = values[values != wildcard].astype(np.int64) if wildcard is not None else values.astype(np.int64)
        self.wildcard, self.size = wildcard, len(self.letters)
        self.other, self.wild = self.size, self.size + 1
        self.dtype = np.uint8 if self.wild < NOWHERE else np.int32

    def codes(self, letters: np.ndarray) -> np.ndarray:
        """The codes of letters, uint8 where they fit, else int32."""
        if letters.dtype == np.uint8:
            return self._of_numbers(np.arange(256)).take(letters)
        return self._of_numbers(letters.astype(np.int64))

    def _of_numbers(self, numbers: np.ndarray) -> np.ndarray:
        low, high = (int(self.letters[0]), int(self.letters[-1])) if self.size else (0, 0)
        near = max(abs(int(numbers.min())), abs(int(numbers.max())), abs(low)) < 1 << 61  # differences do not wrap around
        if not self.size:
            codes = np.full(numbers.shape, self.other, dtype=self.dtype)
        elif near and high - low < TABLE:
            table = np.full(high - low + 3, self.other, dtype=self.dtype)  # one more at both ends, for what lies outside
            table[self.letters - low + 1] = np.arange(self.size)
            codes = table.take(numbers - (low - 1), mode="clip")
        else:
            at = np.minimum(np.searchsorted(self.letters, numbers), self.size - 1)
            codes = np.where(self.letters[at] == numbers, at, self.other).astype(self.dtype)
        if self.wildcard is not None:
            codes[numbers == self.wildcard] = self.wild
        return codes


@dataclass(frozen=True)
class Pair:
    """A text and a pattern in the codes of one alphabet; letters that one of them lacks count nowhere.

    Attributes:
        text: [n]; pattern: [m]; both uint8 or int32.
        letters: the codes 0..letters-1 are the alphabet's; `wild` is the wildcard's code.
        in_text: [letters], how often each stands in the text.
    """

    text: np.ndarray
    pattern: np.ndarray
    letters: int
    in_text: np.ndarray

    @property
    def wild(self) -> int:
        return self.letters + 1

    @property
    def windows(self) -> int:
        return len(self.text) - len(self.pattern) + 1

    @property
    def nowhere(self) -> int:
        """A code that stands nowhere."""
        return NOWHERE if self.text.dtype == np.uint8 else -1

    @cached_property
    def in_pattern(self) -> np.ndarray:
        return np.bincount(self.pattern, minlength=self.letters + 2)[: self.letters]

    @cached_property
    def has_wildcards(self) -> bool:
        return bool((self.pattern == self.wild).any() or (self.text == self.wild).any())

    @classmethod
    def of(cls, text: np.ndarray, pattern: np.ndarray, alphabet: Alphabet) -> Pair:
        codes = alphabet.codes(text)
        return cls(codes, alphabet.codes(pattern), alphabet.size, count_letters(codes, alphabet.size))


def count_letters(codes: np.ndarray, letters: int) -> np.ndarray:
    """How often each letter of the alphabet stands in codes."""
    if letters <= FEW:
        return np.array([np.count_nonzero(codes == letter) for letter in range(letters)], dtype=np.int64)
    return np.bincount(codes, minlength=letters + 2)[:letters]
