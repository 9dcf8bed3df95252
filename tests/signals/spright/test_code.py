"""The convolutional code and its soft Viterbi decoder against every message, and against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fewer.signals.spright.bins.code import OUTPUTS, generator_matrix, viterbi
from fewer.signals.spright.bins.peeling import _decode


def messages(n: int) -> np.ndarray:
    return np.array(list(itertools.product((0, 1), repeat=n)), dtype=np.uint8)


def codewords(n: int, rate: int = 2) -> np.ndarray:
    return (messages(n).astype(int) @ generator_matrix(n, rate).T.astype(int)) % 2


def decode(received: np.ndarray, n: int, rate: int = 2) -> tuple[np.ndarray, float]:
    bits = np.empty(n, dtype=np.uint8)
    metric = viterbi(np.ascontiguousarray(received, dtype=float), n, rate, OUTPUTS, bits)
    return bits, metric


def test_the_generator_matrix_is_a_shift_register():
    """Coded step by step from the generators' octal digits, zeros at the end."""
    rng = np.random.default_rng(0)
    for rate in (2, 3):
        message = rng.integers(0, 2, 9)
        register, sent = [0] * 7, []
        for bit in [*message, *[0] * 6]:
            register = [int(bit), *register[:-1]]
            taps = [[int(digit) for digit in f"{int(octal, 8):07b}"] for octal in ("171", "133", "165")[:rate]]
            sent += [sum(t * r for t, r in zip(tap, register, strict=True)) % 2 for tap in taps]
        assert (generator_matrix(9, rate) @ message % 2 == sent).all()


@pytest.mark.parametrize("rate", [2, 3])
def test_every_message_is_read_without_noise_and_with_two_bits_flipped(rate):
    n, rng = 10, np.random.default_rng(0)
    for message, word in zip(messages(n), codewords(n, rate), strict=True):
        clean = 1.0 - 2.0 * word
        bits, metric = decode(clean, n, rate)
        assert (bits == message).all()
        assert metric == len(word)
        flipped = clean.copy()
        flipped[rng.choice(len(word), 2, replace=False)] *= -1
        bits, metric = decode(flipped, n, rate)
        assert (bits == message).all()
        assert metric == len(word) - 4


def test_the_decoder_is_maximum_likelihood_on_random_soft_inputs():
    n, rng = 8, np.random.default_rng(0)
    words, every = 1.0 - 2.0 * codewords(n), messages(n)
    for _ in range(300):
        received = rng.standard_normal(words.shape[1])
        fits = words @ received
        bits, metric = decode(received, n)
        assert (bits == every[fits.argmax()]).all()
        assert np.isclose(metric, fits.max())


def test_the_global_sign_is_found_with_the_message():
    """Both signs are tried: read through a random sign, with places that were not received, as brute force over both reads it."""
    n, rng = 8, np.random.default_rng(1)
    words, every = 1.0 - 2.0 * codewords(n), messages(n)
    votes = np.arange(words.shape[1])[None].copy()
    votes[0, [1, -1]] = -1
    heard = votes[0] >= 0
    for _ in range(300):
        received = rng.standard_normal(words.shape[1])
        bits = np.empty(n, dtype=np.uint8)
        _decode(received, votes, 2, OUTPUTS, bits)
        fits = np.abs(words[:, heard] @ received[heard])
        assert np.isclose(fits[(every == bits).all(axis=1)][0], fits.max())
