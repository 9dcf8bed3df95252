"""Matches by bit vectors and by transforms of a text's letters, piece by piece; an index keeps both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = 2**15  # the longest pattern whose transforms are tried in float32
SHORTEST = 1 << 13  # numbers of a transform at least
GROUP = 32  # letters of the pattern that are transformed at a time
SURE = 0.25  # a transform's numbers lie nearer than this to the whole ones that they are rounded to


def bit_vectors(codes: np.ndarray, letters: np.ndarray, reach: int) -> np.ndarray:
    """The places of each letter as bits [len(letters) + 1, words] uint64, lowest first, with room for shifts by `reach`; the last row is empty.

    >>> bit_vectors(np.array([0, 1, 0], dtype=np.uint8), np.array([0, 1]), 1)[:, 0].tolist()
    [5, 2, 0]
    """
    words = (len(codes) + 63) // 64 + reach // 64 + 3
    vectors = np.zeros((len(letters) + 1, words), dtype=np.uint64)
    for row, letter in enumerate(letters):
        packed = np.packbits(codes == letter, bitorder="little")
        vectors[row].view(np.uint8)[: len(packed)] = packed
    return vectors


def frame_size(m: int) -> int:
    """Numbers of a transform for a pattern of m letters: a power of two of at least 4 m.

    >>> frame_size(64), frame_size(4096)
    (8192, 16384)
    """
    return max(SHORTEST, 1 << (4 * m - 1).bit_length())


class Rounded(ArithmeticError):
    """Transforms of this precision do not tell which whole number is meant."""


class Transforms:
    """Spectra of the indicators of a text's letters in frames of one size, each less its mean (which shrinks rounding errors).

    Args:
        codes: the text [n].
        m: letters of the pattern: the frames overlap by m - 1.
        double: float64 in place of float32.
        shares: [letters], the frequency of each letter, taken as its mean.
    """

    def __init__(self, codes: np.ndarray, m: int, double: bool, shares: np.ndarray) -> None:
        self.codes, self.m, self.shares = codes, m, shares
        self.dtype = np.float64 if double else np.float32
        self.size = frame_size(m)
        self.step = self.size - m + 1
        self.windows = len(codes) - m + 1
        self.frames = max(2, -(-self.windows // self.step))  # MKL takes four times as long for one alone as for two

    def spectrum(self, letter: int) -> Tensor:
        """The letter's indicator in every frame, transformed: [frames, size / 2 + 1]."""
        import torch

        indicator = np.zeros((self.frames - 1) * self.step + self.size, dtype=self.dtype)
        indicator[: len(self.codes)] = self.codes == letter
        indicator[: len(self.codes)] -= self.dtype(self.shares[letter])
        return torch.fft.rfft(torch.from_numpy(indicator).as_strided((self.frames, self.size), (self.step, 1)))

    def add_matches(self, pattern: np.ndarray, letters: np.ndarray, out: np.ndarray, kept: dict[Any, Tensor] | None = None) -> float:
        """out[i] += matches of those letters; all their spectra are added up first, so that a frame is transformed back once.

        Args:
            kept: spectra of the text by (size, type, letter), where they are kept for the next pattern.

        Returns:
            the largest distance of a result from a whole number.

        Raises:
            Rounded: it is no less than a quarter.
        """
        import torch

        total, constant = None, 0.0
        for low in range(0, len(letters), GROUP):
            group = letters[low : low + GROUP]
            places = np.zeros((max(2, len(group)), self.size), dtype=self.dtype)
            for row, letter in zip(places, group, strict=False):
                row[: self.m] = pattern == letter
            constant += float((places[: len(group)].sum(axis=1, dtype=np.float64) * self.shares[group]).sum())  # the means took it away
            theirs = torch.fft.rfft(torch.from_numpy(places)).conj().resolve_conj()
            if total is None:
                total = torch.zeros(self.frames, theirs.shape[1], dtype=theirs.dtype)
            for row, letter in zip(theirs, group, strict=False):
                total.addcmul_(self._text(int(letter), kept), row)
        assert total is not None
        found = torch.fft.irfft(total, self.size)[:, : self.step].reshape(-1)[: self.windows].add_(constant)
        whole = found.round()
        worst = float(found.sub_(whole).abs_().max())
        if not worst < SURE:
            raise Rounded(f"transforms of {self.size} numbers are off by {worst:.2f}")
        out += whole.to(torch.int32).numpy()
        return worst

    def _text(self, letter: int, kept: dict[Any, Tensor] | None) -> Tensor:
        if kept is None:
            return self.spectrum(letter)
        key = (self.size, self.dtype, letter)
        if key not in kept:
            kept[key] = self.spectrum(letter)
        return kept[key]


def precisions(m: int) -> tuple[bool, ...]:
    """The precisions to try in turn: float64 or not."""
    return (False, True) if m <= SINGLE else (True,)
