"""Distances against a plain comparison: every way, every alphabet, wildcards, pieces, threads, and what the check of the sum sees."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_windows import plain

from fewer.signals.hamming_distances import TextIndex, calibrate, hamming_distances, plan
from fewer.signals.hamming_distances.counting import matches
from fewer.signals.hamming_distances.counting.costs import WAYS, choose, costs
from fewer.signals.hamming_distances.counting.letters import Alphabet, Pair
from fewer.signals.hamming_distances.counting.matches import count_matches
from fewer.signals.hamming_distances.counting.spectra import Rounded, Transforms
from fewer.signals.hamming_distances.problems import by_correlation


def a_case(rng):
    """A text and a pattern of any size, alphabet and kind."""
    n = int(rng.integers(1, 2000))
    m, sigma = int(rng.integers(1, n + 1)), int(rng.choice([1, 2, 4, 50, 5000]))
    kind = rng.integers(4)
    if kind == 0:
        text = rng.integers(sigma, size=n)
    elif kind == 1:
        text = np.minimum(rng.zipf(1.5, n), sigma) - 1
    elif kind == 2:
        text = np.resize(rng.integers(sigma, size=int(rng.integers(1, 9))), n)
    else:
        text = np.zeros(n, dtype=np.int64)
    place = int(rng.integers(n - m + 1))
    return text, text[place : place + m] if rng.random() < 0.3 else rng.integers(sigma, size=m)


@pytest.mark.parametrize("method", ["auto", *WAYS])
def test_every_way_equals_a_plain_comparison(method):
    rng = np.random.default_rng(0)
    for _ in range(300):
        text, pattern = a_case(rng)
        found = hamming_distances(text, pattern, method=method)
        assert found.dtype == np.int32
        assert np.array_equal(found, plain(text, pattern)), (len(text), len(pattern))


def test_both_precisions_of_the_transforms_are_exact():
    rng = np.random.default_rng(1)
    for double in (False, True):
        for _ in range(50):
            text, pattern = a_case(rng)
            pair = Pair.of(text, pattern, Alphabet(pattern))
            found = np.zeros(pair.windows, dtype=np.int32)
            shares = pair.in_text / len(text)
            Transforms(pair.text, len(pattern), double, shares).add_matches(pair.pattern, np.arange(pair.letters), found)
            assert np.array_equal(len(pattern) - found, plain(text, pattern))


@pytest.mark.parametrize("method", ["auto", *WAYS])
def test_special_shapes(method):
    text = np.random.default_rng(2).integers(4, size=500)
    assert hamming_distances(text, text, method=method).tolist() == [0]
    assert np.array_equal(hamming_distances(text, text[:1], method=method), text != text[0])
    assert hamming_distances(text, text[200:300], method=method)[200] == 0
    assert hamming_distances([3], [4], method=method).tolist() == [1]
    assert (hamming_distances(text, np.full(9, 77), method=method) == 9).all(), "a pattern of letters that the text lacks"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_shifts_and_other_names_of_letters_change_nothing(text, data):
    m = data.draw(st.integers(1, len(text)))
    pattern = data.draw(st.lists(st.integers(0, 5), min_size=m, max_size=m))
    names = np.array(data.draw(st.permutations([2**60, -(2**60), 7, -1, 2**62, 2**60 + 1])))
    method = data.draw(st.sampled_from(["auto", *WAYS]))
    found = hamming_distances(text, pattern, method=method)
    assert np.array_equal(hamming_distances([9, 9, 9, *text], pattern, method=method)[3:], found)
    assert np.array_equal(hamming_distances(names[text], names[pattern], method=method), found)


def test_types_of_letters():
    text, pattern = "mississippi river", "issi"
    expected = plain(list(text), list(pattern))
    numbers, short = np.array([ord(c) for c in text]), np.array([ord(c) for c in pattern])
    assert np.array_equal(hamming_distances(text, pattern), expected)
    assert np.array_equal(hamming_distances(text.encode(), pattern.encode()), expected)
    assert np.array_equal(hamming_distances(bytearray(text.encode()), short), expected)
    for dtype in (np.uint8, np.int8, np.int16, np.uint32, np.int64, np.uint64):
        assert np.array_equal(hamming_distances(numbers.astype(dtype), short), expected), dtype
    assert np.array_equal(hamming_distances(np.repeat(numbers, 2)[::2], short[::-1][::-1]), expected), "not contiguous"
    assert np.array_equal(hamming_distances(numbers > 110, short > 110), plain(numbers > 110, short > 110))
    assert hamming_distances("naïve 🙂🙂", "🙂").tolist() == [1, 1, 1, 1, 1, 1, 0, 0]
    found = hamming_distances(torch.tensor(numbers), torch.tensor(short))
    assert found.dtype == torch.int32
    assert np.array_equal(found.numpy(), expected)
    both = hamming_distances(torch.tensor(numbers), torch.tensor(np.stack([short, short + 1])))
    assert both.shape == (2, len(expected))


def test_many_patterns_and_their_plans():
    rng = np.random.default_rng(3)
    text, patterns = rng.integers(9, size=700), rng.integers(9, size=(3, 40))
    found, plans = hamming_distances(text, patterns, return_plan=True)
    assert np.array_equal(found, [plain(text, each) for each in patterns])
    assert len(plans) == 3
    assert all(each.measured_seconds > 0 and each.predicted_seconds > 0 for each in plans)
    one_row = hamming_distances(text, patterns[:1])
    assert one_row.shape == (1, 661)


@pytest.mark.parametrize("method", ["auto", *WAYS])
def test_wildcards_in_both_against_counting(method):
    rng = np.random.default_rng(4)
    for sigma in (3, 300):
        text, pattern = rng.integers(sigma, size=900), rng.integers(sigma, size=70)
        text[rng.random(900) < 0.2], pattern[rng.random(70) < 0.3] = 1, 1
        windows = np.lib.stride_tricks.sliding_window_view(text, 70)
        expected = ((windows != pattern) & (windows != 1) & (pattern != 1)).sum(axis=1)
        assert np.array_equal(hamming_distances(text, pattern, wildcard=1, method=method), expected)
        assert np.array_equal(TextIndex(text, wildcard=1).distances(pattern, method=method), expected)
        assert np.array_equal(hamming_distances(text, pattern, wildcard=1, max_distance=9, method=method), np.minimum(expected, 10))
    assert not hamming_distances("abcab", "??", wildcard="?", method=method).any()
    assert not hamming_distances(b"??", b"a", wildcard=b"?", method=method).any()


def test_254_letters_leave_no_room_for_the_codes_of_others_in_a_byte():
    rng = np.random.default_rng(5)
    for sigma in (252, 253, 254, 255, 256):
        text, pattern = rng.integers(sigma + 1, size=3000).astype(np.uint16), rng.permutation(sigma)
        for method in WAYS:
            assert np.array_equal(hamming_distances(text, pattern, wildcard=7, method=method)[0], ((text[:sigma] != pattern) & (text[:sigma] != 7) & (pattern != 7)).sum())  # fmt: skip


def test_the_sum_over_all_shifts_is_known_beforehand_and_a_fault_is_told(monkeypatch):
    rng = np.random.default_rng(6)
    text, pattern = rng.integers(5, size=400), rng.integers(5, size=60)
    around = np.concatenate([np.full(59, 9), text, np.full(59, 9)])
    pair = Pair.of(text, pattern, Alphabet(pattern))
    for method in WAYS:
        matched = 60 - hamming_distances(around, pattern, method=method)
        assert matched.sum() == pair.in_text @ pair.in_pattern
    told = choose(pair.in_text, pair.in_pattern, 400, 60, calibrate())
    right, _ = count_matches(pair, told)
    matches.check(pair, right)
    right[17] += 1
    with pytest.raises(RuntimeError, match="do not add up"):
        matches.check(pair, right)
    right[18:] -= 1
    right[18] += len(right) - 19
    with pytest.raises(RuntimeError, match="do not add up"):
        matches.check(pair, right)


@pytest.mark.parametrize("method", ["auto", *WAYS])
def test_pieces_and_threads_change_nothing(monkeypatch, method):
    rng = np.random.default_rng(7)
    text, pattern = rng.integers(6, size=20_000), rng.integers(6, size=90)
    whole = hamming_distances(text, pattern, method=method, threads=1)
    monkeypatch.setattr(matches, "PIECE", 3_000)
    monkeypatch.setattr(matches, "GROUP", 4)
    for threads in (1, 2):
        assert np.array_equal(hamming_distances(text, pattern, method=method, threads=threads), whole)
    assert np.array_equal(plain(text, pattern), whole)


def test_float32_is_left_where_it_does_not_round(monkeypatch):
    """All-equal text of 2^15: exact in float32; where rounding is off, float64 does it again, and else it is told."""
    m = 2**15
    pattern = np.random.default_rng(8).integers(2, size=m)
    found, told = hamming_distances(np.zeros(2 * m, dtype=int), pattern, method="fft", return_plan=True)
    assert (found == pattern.sum()).all()
    assert told.rounding < 0.25
    text = np.random.default_rng(9).integers(2, size=2 * m)
    right, told = hamming_distances(text, pattern, method="fft", return_plan=True)
    assert np.array_equal(right, hamming_distances(text, pattern, method="bits"))
    assert 0 < told.rounding < 0.01
    inverse = torch.fft.irfft
    monkeypatch.setattr(torch.fft, "irfft", lambda x, n: inverse(x, n) + (0.6 if x.dtype == torch.complex64 else 0.0))
    assert np.array_equal(hamming_distances(text, pattern, method="fft"), right)
    monkeypatch.setattr(torch.fft, "irfft", inverse)
    asked, honest = [], Transforms.add_matches

    def coarse(self, *arguments):
        asked.append(self.dtype)
        if self.dtype == np.float32 or fails:
            raise Rounded("coarse")
        return honest(self, *arguments)

    monkeypatch.setattr(Transforms, "add_matches", coarse)
    fails = False
    assert np.array_equal(hamming_distances(text, pattern, method="fft"), right)
    assert asked == [np.float32, np.float64]
    fails = True
    with pytest.raises(RuntimeError, match="do not round to whole numbers"):
        hamming_distances(text, pattern, method="fft")


def test_one_convolution_a_letter_gives_the_same():
    rng = np.random.default_rng(10)
    text, pattern = rng.integers(20, size=5000), rng.integers(20, size=333)
    assert np.array_equal(by_correlation(text, pattern), hamming_distances(text, pattern))


def test_an_index_answers_as_a_call_does_and_survives_copies_and_files(tmp_path):
    rng = np.random.default_rng(11)
    for text in (rng.integers(4, size=3000), rng.integers(2**40, 2**40 + 400, size=3000), "to be or not to be " * 50):
        index = TextIndex(text)
        index.save(tmp_path / "index.npz", overwrite=True)
        for other in (index, copy.deepcopy(index), pickle.loads(pickle.dumps(index)), TextIndex.load(tmp_path / "index.npz")):
            for m in (1, 17, 64, 300, 900):
                for method in ("auto", "bits", "fft"):
                    pattern = text[5 : 5 + m]
                    if not isinstance(text, str):
                        pattern = np.where(rng.random(m) < 0.3, 2**50, pattern)  # a letter that the text lacks
                    assert np.array_equal(other.distances(pattern, method=method), hamming_distances(text, pattern)), (m, method)
    assert index.nearest("to bx", top=2, exclusion=9) == [(0, 1), (13, 1)]
    wild = TextIndex("gattNca", wildcard="N")
    wild.save(tmp_path / "wild.npz")
    assert TextIndex.load(tmp_path / "wild.npz").distances("tac").tolist() == wild.distances("tac").tolist() == [2, 3, 1, 0, 2]


def test_the_choice_is_the_least_of_all_predictions():
    rng = np.random.default_rng(12)
    for _ in range(30):
        sigma, m = int(rng.integers(1, 200)), int(rng.integers(1, 5000))
        in_text, in_pattern = rng.integers(1, 3000, size=sigma), rng.multinomial(m, np.full(sigma, 1 / sigma))
        n = int(in_text.sum()) + m
        told = choose(in_text, in_pattern, n, m, calibrate())
        shared = np.flatnonzero(in_pattern)
        order = shared[np.argsort(-(in_text * in_pattern)[shared], kind="stable")]
        by = costs(in_text[order], in_pattern[order], n, m, calibrate())
        for way in ("bits", "fft"):
            assert told.predicted_seconds <= (by[way] + by["pairs"]).min() + (n - m + 1) * calibrate().window + 1e-12
        assert sum(told.letters_by_method.values()) == len(shared)
    rare = plan(rng.integers(100_000, size=50_000), rng.integers(100_000, size=20_000))
    assert set(rare.letters_by_method) == {"pairs"}, "very rare letters"
    dense = plan(rng.integers(2, size=400_000), rng.integers(2, size=160_000))  # far apart also where a busy machine was measured
    assert set(dense.letters_by_method) == {"fft"}, "two letters, a long pattern"


def test_what_is_kept_may_grow_while_its_bytes_are_counted():
    kept = matches.Kept()
    spectra = kept.of_piece(0, 1)
    assert spectra is not None

    class Growing:
        @property
        def nbytes(self):
            spectra["another thread's"] = np.zeros(1)
            return 8

    spectra[0], spectra[1] = Growing(), np.zeros(1)
    assert kept.bytes == 16
