"""What cannot be done is told in one clear error: what was given, what was expected, what to do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewer.signals.hamming_distances import SequenceContamination, TextIndex, hamming_distances, hamming_profile, plan
from fewer.signals.hamming_distances.counting import letters

TEXT = [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "pattern", "options", "message"),
    [
        ([1, 2], [1, 2, 3], {}, "the pattern has 3 letters and the text 2; expected a text at least as long"),
        (TEXT, [], {}, "pattern is an array|pattern is float64"),
        (TEXT, np.array([], dtype=int), {}, "pattern has shape \\(0,\\); expected at least one letter"),
        ("", "", {}, "text has shape \\(0,\\)"),
        ([0.5, 1.0], [1], {}, "text is float64; expected letters .*: discretise numbers first, for instance by their quantiles"),
        ([0.5, np.nan], [1], {}, "text is float64 with NaN; expected letters"),
        (TEXT, [1.0], {}, "pattern is float64; expected letters"),
        (np.array([{}, []], dtype=object), [1], {}, "text is an array of object; expected integers, str or bytes"),
        (["a", "b"], ["a"], {}, "text is an array of <U1; expected integers, str or bytes"),
        (np.array([1j, 2]), [1], {}, "text is an array of complex128"),
        ([[1, 2], [3, 4]], [1], {}, "text has shape \\(2, 2\\); expected one dimension"),
        (TEXT, [[[1]]], {}, "pattern has shape \\(1, 1, 1\\)"),
        ("abc", [1], {}, "the text is str and the pattern int; expected both of one type: encode the str"),
        (TEXT, "a", {}, "the text is int and the pattern str"),
        ("abc", b"a", {}, "the text is str and the pattern bytes"),
        (np.array([2**63, 1], dtype=np.uint64), [1], {}, "text holds 9223372036854775808; expected integers below 2\\^63"),
        (TEXT, [1], {"max_distance": -1}, "max_distance is -1; expected a whole number of at least 0"),
        (TEXT, [1], {"max_distance": 1.5}, "max_distance is 1.5; expected a whole number"),
        (TEXT, [1], {"epsilon": 0}, "epsilon is 0; expected a number between 0 and 1"),
        (TEXT, [1], {"epsilon": 1.0}, "epsilon is 1.0; expected a number between 0 and 1"),
        (TEXT, [1], {"epsilon": float("nan")}, "epsilon is nan"),
        (TEXT, [1], {"epsilon": 0.1, "delta": 1}, "delta is 1; expected a number between 0 and 1"),
        (TEXT, [1], {"epsilon": 1e-12, "method": "hash"}, "epsilon is 1e-12 with method='hash'; expected at least 2e-06"),
        (torch.ones(3, dtype=torch.bfloat16), [1], {}, "text is float64; expected letters"),
        (TEXT, [1], {"epsilon": 0.1, "max_distance": 2}, "epsilon=0.1 and max_distance=2 are given; expected one of them"),
        (
            TEXT,
            [1],
            {"epsilon": 0.1, "method": "sample", "minimum": 2, "wildcard": 3},
            "wildcard=3 with method='sample'; expected no wildcard",
        ),
        (TEXT, [1], {"epsilon": 0.1, "method": "sample"}, "minimum is None and method 'sample'; expected minimum"),
        (
            TEXT,
            [1],
            {"epsilon": 0.1, "minimum": 2},
            "minimum is 2 and method 'auto'; expected minimum, .* for method='sample' and for no other",
        ),
        (TEXT, [1], {"minimum": 2}, "minimum is 2 and method 'auto'"),
        (TEXT, [1], {"epsilon": 0.1, "method": "sample", "minimum": 0}, "minimum is 0; expected a whole number of at least 1"),
        (TEXT, [1], {"estimator": "mean"}, "estimator='mean' without epsilon"),
        (TEXT, [1], {"method": "hash"}, "method='hash' without epsilon; expected it for approximate distances alone"),
        (TEXT, [1], {"epsilon": 0.1, "method": "bits"}, "method is 'bits'; expected one of auto, hash, sample"),
        (TEXT, [1], {"epsilon": 0.1, "estimator": "median"}, "estimator is 'median'; expected one of max, mean"),
        (TEXT, [1], {"method": "pair"}, "method is 'pair'; expected one of auto, pairs, bits, fft, direct: did you mean 'pairs'"),
        (TEXT, [1], {"positions_only": True}, "positions_only=True without max_distance"),
        (TEXT, [1], {"threads": 0}, "threads is 0; expected a whole number of at least 1"),
        (TEXT, [1], {"seed": -1}, "seed is -1; expected a whole number of at least 0"),
        ("abc", "a", {"wildcard": 3}, "wildcard is 3 for letters of type str; expected one character"),
        ("abc", "a", {"wildcard": "NN"}, "wildcard is 'NN' for letters of type str; expected one character"),
        (b"abc", b"a", {"wildcard": "N"}, "wildcard is 'N' for letters of type bytes; expected one byte"),
        (TEXT, [1], {"wildcard": 0.5}, "wildcard is 0.5 for letters of type int; expected a whole number"),
    ],
)
def test_what_is_wrong_is_named(text, pattern, options, message):
    with pytest.raises(ValueError, match=message):
        hamming_distances(text, pattern, **options)


def test_counts_that_int32_cannot_hold_are_refused(monkeypatch):
    monkeypatch.setattr(letters, "LONGEST", 5)
    with pytest.raises(ValueError, match="text has 6 letters; expected at most 5, so that int32 holds a distance"):
        hamming_distances(TEXT, [1])


@pytest.mark.parametrize("method", ["auto", "bits"])
def test_a_distance_that_no_window_has_bounds_nothing(method):
    exact = hamming_distances(TEXT, [1, 3]).tolist()
    assert hamming_distances(TEXT, [1, 3], max_distance=2**40, method=method).tolist() == exact


@pytest.mark.parametrize("epsilon", [1e-12, 1e-320])
def test_a_factor_too_near_to_one_is_answered_exactly(epsilon):
    distances, plan = hamming_distances(TEXT, [1, 3], epsilon=epsilon, return_plan=True)
    assert distances.tolist() == hamming_distances(TEXT, [1, 3]).tolist()
    assert plan.method == "exact"


def test_negative_letters_are_fine():
    assert hamming_distances([-5, -(2**63), 2**63 - 1], [-(2**63)]).tolist() == [1, 0, 1]
    assert hamming_distances(np.array([-1, 5], dtype=np.int8), np.array([255, 5], dtype=np.uint8)).tolist() == [1]


def test_the_index_the_profile_and_the_plan_refuse_alike(tmp_path):
    for call in (lambda: TextIndex([[1, 2]]), lambda: hamming_profile([[1, 2]], 1)):
        with pytest.raises(ValueError, match="shape \\(1, 2\\)"):
            call()
    index = TextIndex("abcab", wildcard="c")
    with pytest.raises(ValueError, match="the index has a wildcard; expected none for method='sample'"):
        index.distances("ab", epsilon=0.2, method="sample", minimum=1)
    with pytest.raises(ValueError, match="the text is str and the pattern int"):
        index.distances([1])
    with pytest.raises(ValueError, match="the pattern has 6 letters and the text 5"):
        index.distances("ababab")
    with pytest.raises(ValueError, match="top is 0"):
        index.nearest("ab", top=0)
    with pytest.raises(ValueError, match="exclusion is -1"):
        index.nearest("ab", exclusion=-1)
    with pytest.raises(ValueError, match="pattern has 2 rows; expected one pattern"):
        TextIndex(TEXT).nearest([[1], [2]])
    with pytest.raises(ValueError, match="m is 9; expected one dimension of at least m letters"):
        hamming_profile(TEXT, 9)
    with pytest.raises(ValueError, match="m is 0; expected a whole number"):
        hamming_profile(TEXT, 0)
    with pytest.raises(ValueError, match="the pattern has 9"):
        plan(TEXT, [1] * 9)


def test_files_that_are_no_index_are_refused_and_none_is_overwritten(tmp_path):
    index, file = TextIndex("abcab"), tmp_path / "index.npz"
    index.save(file)
    with pytest.raises(FileExistsError, match="path .*index.npz exists; expected a new file"):
        index.save(file)
    whole = dict(np.load(file))
    for changed, message in (
        ({"format": np.array(2)}, "has format 2; expected 1"),
        ({"codes": np.array([0, 9])}, "holds no text that fits its letters"),
        ({"codes": np.array([0, 3])}, "holds no text that fits its letters"),
        ({"codes": np.array([0.5])}, "holds no text that fits its letters"),
        ({"letters": np.array([2, 1, 3])}, "holds no text that fits its letters"),
        ({"kind": np.array(7)}, "holds no text that fits its letters"),
    ):
        np.savez(tmp_path / "other.npz", **(whole | changed))
        with pytest.raises(ValueError, match=message):
            TextIndex.load(tmp_path / "other.npz")
    del whole["letters"]
    np.savez(tmp_path / "other.npz", **whole)
    with pytest.raises(ValueError, match="has no array 'letters'"):
        TextIndex.load(tmp_path / "other.npz")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as an .npz file"):
        TextIndex.load(file)


def test_the_estimator_refuses_what_is_no_list_of_sequences():
    from sklearn.exceptions import NotFittedError

    estimator = SequenceContamination()
    for given, message in (
        ("abc", "train_sequences is str of length 3; expected a list"),
        ([], "train_sequences is list of length 0"),
        (["abc", [1, 2]], "the text is str and the pattern int"),
        ([[[1, 2]]], "sequence 0 has shape \\(1, 2\\)"),
        ([[0.5]], "sequence 0 is float64; expected letters"),
    ):
        with pytest.raises(ValueError, match=message):
            estimator.fit(given)
    with pytest.raises(NotFittedError):
        estimator.score_samples(["a"])
    estimator.fit(["abcd", "ab"])
    with pytest.raises(ValueError, match="test sequence 1 has 5 letters; expected at most 4"):
        estimator.score_samples(["ab", "abcde"])
    with pytest.raises(ValueError, match="test_sequences is str; expected a list"):
        estimator.score_samples("ab")
