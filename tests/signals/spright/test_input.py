"""What cannot be done is told in one clear error: what was given, what was expected, what to do."""

from __future__ import annotations

import numpy as np
import pytest

from fewer.signals.spright import ArrayFunction, SparseSpectrum, SparseWalshRegressor, WHTConfig, sparse_wht
from fewer.signals.spright.command import wht


def ones(m):
    return np.ones(len(m))


@pytest.mark.parametrize(
    ("n", "arguments", "message"),
    [
        (0, {}, "n is 0; expected a whole number of at least 1"),
        (5, {"sparsity": 0}, "sparsity is 0; expected a whole number of at least 1"),
        (5, {"sparsity": 33}, "sparsity is 33; expected 1 to 2^5"),
        (5, {"bins": 12}, "bins is 12; expected a power of two up to 2^5, such as 16"),
        (5, {"bins": 64}, "bins is 64; expected a power of two up to 2^5, such as 32"),
        (5, {"bins": 0}, "bins is 0; expected a power of two"),
        (20, {"groups": 1}, "groups is 1; expected a whole number of at least 2"),
        (20, {"noise_std": -0.1}, "noise_std is -0.1; expected a finite number of at least 0"),
        (20, {"noise_std": float("nan")}, "noise_std is nan"),
        (20, {"noise_std": 0.5, "design": "none"}, "reads functions without noise; use 'so' or 'nso'"),
        (20, {"design": "best"}, "design is 'best'; expected one of so, nso, none"),
        (
            20,
            {"sparsity": 60, "config": WHTConfig(hashing="partition")},
            "3 groups of 7 coordinates and n = 20; expected groups x log2(bins) <= n",
        ),
        (20, {"max_degree": -1}, "max_degree is -1; expected a whole number of at least 0"),
        (20, {"max_queries": 0}, "max_queries is 0; expected a whole number of at least 1"),
    ],
)
def test_an_argument_out_of_range_is_named(n, arguments, message):
    asked = []

    def f(m):
        asked.append(m)
        return np.ones(len(m))

    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        sparse_wht(f, n, **arguments)
    assert message in str(caught.value)
    assert not asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hashing": "modulo"}, "hashing is 'modulo'; expected one of"),
        ({"rate": 4}, "rate is 4; expected one of 2, 3"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number of at least 1"),
        ({"min_magnitude": -1.0}, "min_magnitude is -1.0; expected a finite number of at least 0"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        WHTConfig(**settings)
    assert message in str(caught.value)


def test_too_few_queries_for_a_round_say_how_many_it_needs():
    asked = []
    for settings in ({"sparsity": 40}, {}, {"bins": 16, "design": "nso"}):
        with pytest.raises(ValueError, match="max_queries is 100, and one round needs") as caught:
            sparse_wht(lambda m: asked.append(m), 40, max_queries=100, **settings)
        needed = int(str(caught.value).split("needs ")[1].split()[0])
        assert not asked
        assert sparse_wht(ones, 40, max_queries=needed, **settings).queries == needed
        with pytest.raises(ValueError, match=f"one round needs {needed} queries"):
            sparse_wht(ones, 40, max_queries=needed - 1, **settings)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda m: np.ones(len(m) - 1), "f gave shape (499,) for 500 rows; expected (500,)"),
        (lambda m: np.ones((len(m), 1)), "f gave shape (500, 1) for 500 rows"),
        (lambda m: np.ones(len(m)) * 1j, "f gave complex128; expected real numbers"),
        (lambda m: np.array(["a"] * len(m)), "expected real numbers"),
        (lambda m: None, "f gave shape () for 500 rows"),
    ],
)
def test_answers_of_a_wrong_kind_are_refused(answer, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        sparse_wht(answer, 20, sparsity=8, config=WHTConfig(batch_size=500))
    assert message in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_not_finite_is_named_by_its_row_and_nothing_more_is_asked(bad):
    calls = []

    def f(m):
        calls.append(len(m))
        answers = np.ones(len(m))
        if len(calls) == 3:
            answers[[17, 40]] = bad
        return answers

    with pytest.raises(ValueError, match=f"f gave {bad} in row 17 of a batch of 100 \\(query 217\\); expected finite numbers"):
        sparse_wht(f, 20, sparsity=8, config=WHTConfig(batch_size=100))
    assert len(calls) == 3


def test_an_exception_of_f_comes_through_with_the_queries_spent():
    calls = []

    def f(m):
        calls.append(len(m))
        if len(calls) == 4:
            raise ConnectionError("the service is down")
        return np.ones(len(m))

    with pytest.raises(ConnectionError, match="the service is down") as caught:
        sparse_wht(f, 20, sparsity=8, config=WHTConfig(batch_size=100))
    assert caught.value.__notes__ == ["300 queries had been answered before the batch of 100 in which f raised this"]


def test_integers_and_booleans_are_real_numbers():
    both = sparse_wht(lambda m: (m[:, 0] & m[:, 4]).astype(bool), 6, sparsity=4)
    assert both.to_dict() == pytest.approx({"000000": 0.25, "100000": -0.25, "000010": -0.25, "100010": 0.25})


def test_rows_that_are_no_bits_are_refused():
    spectrum = SparseSpectrum(np.array([[1, 0]], dtype=np.uint8), np.ones(1), np.zeros(1))
    for rows, message in (
        (np.zeros((3, 4)), r"shape \(3, 4\); expected zeros and ones of shape \(rows, 2\)"),
        (np.array([[0, 1], [0, 2]]), "other than 0 and 1 in row 1"),
        (np.array([[0.5, 1]]), "other than 0 and 1 in row 0"),
        (np.array([[-1, 1]]), "other than 0 and 1 in row 0"),
        (np.array([["a", "b"]]), "expected zeros and ones"),
    ):
        with pytest.raises(ValueError, match=message):
            spectrum(rows)
    with pytest.raises(ValueError, match="3 feature names for 2 variables"):
        spectrum.interactions(["a", "b", "c"])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"n": 2, "indices": ["02"], "values": [1.0], "stderr": [0.0]}', '{"n": 2, "indices": ["01"]}']
)
def test_text_that_is_no_spectrum_is_refused(text):
    with pytest.raises(ValueError, match="the text is no spectrum"):
        SparseSpectrum.from_json(text)


def test_the_estimator_refuses_a_table_in_place_of_a_model():
    with pytest.raises(TypeError, match="model_predict is ndarray; expected a function"):
        SparseWalshRegressor().fit(np.zeros((3, 4)), n_features=4)


def test_arrays_that_are_no_function_of_bits_are_refused():
    for array, message in (
        (np.zeros(6), "length 6; expected a power of two, such as 8"),
        (np.zeros((2, 2)), r"shape \(2, 2\); expected real numbers of shape \(2\^n,\)"),
        (np.zeros(4, dtype=complex), "complex128"),
    ):
        with pytest.raises(ValueError, match=message):
            ArrayFunction(array)


def test_files_that_hold_no_such_array_are_refused(tmp_path):
    np.save(tmp_path / "six.npy", np.zeros(6))
    np.save(tmp_path / "one.npy", np.zeros(1))
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "archive.npz", x=np.zeros(4))
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "nan.npy", np.array([0.0, 1.0, np.nan, 0.0]))
    for name, message in (
        ("six.npy", "length 6; expected a power of two"),
        ("one.npy", "single number"),
        ("objects.npy", "cannot be read as an .npy file of plain numbers"),
        ("archive.npz", "is an archive of arrays"),
        ("text.npy", "cannot be read as an .npy file"),
        ("nan.npy", "expected finite numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            wht(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="is no file"):
        wht(tmp_path / "absent.npy")
    with pytest.raises(ValueError, match="--top is 0; expected a whole number"):
        wht(tmp_path / "six.npy", top=0)
