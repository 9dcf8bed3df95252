"""The scikit-learn estimator: the conventions, real digits, pipelines and grids, what it refuses, and its folders."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from fewer.forward_only import CascadedForwardConfig, LocalLearningClassifier, MonoForwardConfig, load_model, save_model

METHODS = {
    "mono-forward": {"hidden_sizes": (200,), "lr": 5e-3, "epochs": 15},
    "forward-forward": {"hidden_sizes": (200, 200), "lr": 5e-3, "epochs": 20},
    "cascaded-forward": {"channels": (16, 32), "image_shape": (1, 8, 8), "lr": 1e-2, "epochs": 15},
    "backpropagation": {"hidden_sizes": (200,), "lr": 5e-3, "epochs": 15},
}


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return train_test_split(x, y, test_size=400, random_state=0)


@pytest.fixture(scope="module")
def fitted(digits):
    """A fitted classifier of each method."""
    x, _, y, _ = digits
    return {name: LocalLearningClassifier(name, random_state=0, **settings).fit(x, y) for name, settings in METHODS.items()}


# Every check of scikit-learn is expected to pass. "cascaded-forward" takes images alone, which the checks' tables are not.
# `check_array_api_input` skips itself where SCIPY_ARRAY_API is not set: the estimator takes numpy arrays, and says nothing else.
@parametrize_with_checks(
    [
        LocalLearningClassifier(name, hidden_sizes=(32,), lr=1e-2, epochs=20, random_state=0)
        for name in ("mono-forward", "forward-forward", "backpropagation")
    ],
    expected_failed_checks=lambda _: {},
)
def test_it_keeps_scikit_learns_conventions(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    ("method", "least"), [("mono-forward", 0.95), ("forward-forward", 0.9), ("cascaded-forward", 0.93), ("backpropagation", 0.95)]
)
def test_it_learns_the_digits(digits, fitted, method, least):
    _, x, _, y = digits
    assert fitted[method].score(x, y) > least


def test_it_works_in_a_pipeline_and_a_grid(digits):
    x, test_x, y, test_y = digits
    steps = make_pipeline(StandardScaler(), LocalLearningClassifier(hidden_sizes=(200,), epochs=10, random_state=0))
    grid = GridSearchCV(steps, {"locallearningclassifier__lr": [1e-5, 5e-3]}, cv=2).fit(x, y)
    assert grid.best_params_ == {"locallearningclassifier__lr": 5e-3}
    assert grid.score(test_x, test_y) > 0.95


def test_images_make_the_twin_a_cnn(digits):
    x, test_x, y, test_y = digits
    twin = LocalLearningClassifier("backpropagation", channels=(8, 16), image_shape=(1, 8, 8), lr=1e-2, epochs=10, random_state=0).fit(x, y)
    assert any(isinstance(part, torch.nn.Conv2d) for part in twin.model_.modules())
    assert twin.score(test_x, test_y) > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_one_seed_gives_one_result_bit_for_bit(digits, fitted, method):
    x, test_x, y, _ = digits
    torch.manual_seed(7)  # the seed of torch's own generator plays no part
    again = clone(fitted[method]).fit(x, y)
    assert np.array_equal(again.predict_proba(test_x), fitted[method].predict_proba(test_x))
    other = clone(fitted[method]).set_params(random_state=1).fit(x, y)
    assert not np.array_equal(other.predict_proba(test_x), fitted[method].predict_proba(test_x))


def test_a_fit_leaves_torchs_generator_alone(digits):
    x, _, y, _ = digits
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    LocalLearningClassifier(hidden_sizes=(8,), epochs=1, random_state=0).fit(x, y)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_do_not_depend_on_the_company(digits, fitted, method):
    _, x, _, _ = digits
    whole = fitted[method].predict_proba(x)
    assert np.array_equal(np.concatenate([fitted[method].predict_proba(row[None]) for row in x[:20]]), whole[:20])
    order = np.random.default_rng(0).permutation(len(x))
    assert np.array_equal(fitted[method].predict(x[order]), fitted[method].predict(x)[order])
    np.testing.assert_allclose(whole.sum(1), 1)
    assert np.array_equal(fitted[method].classes_[whole.argmax(1)], fitted[method].predict(x))


def test_labels_may_be_words(digits):
    x, test_x, y, test_y = digits
    words = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
    named = LocalLearningClassifier(random_state=0, **METHODS["mono-forward"]).fit(x, words[y])
    assert (named.predict(test_x) == words[test_y]).mean() > 0.95


def test_forward_forward_loses_no_feature_to_its_label():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 2))  # fewer features than the label needs, and the first one decides
    y = (x[:, 0] > 0).astype(int)
    assert LocalLearningClassifier("forward-forward", hidden_sizes=(50,), lr=1e-2, epochs=40, random_state=0).fit(x, y).score(x, y) > 0.9


def test_lr_and_epochs_stand_in_for_the_configs(digits):
    x, _, y, _ = digits
    config = MonoForwardConfig(schedule="simultaneous", lr=1e-9, epochs_per_layer=9, patience=None)
    classifier = LocalLearningClassifier(hidden_sizes=(100,), config=config, lr=1e-2, epochs=4, random_state=0).fit(x, y)
    assert max(line.epoch for line in classifier.history_.epochs) == 4
    assert classifier.history_.epochs[-1].stage == "network"
    assert classifier.score(x, y) > 0.8


def test_without_a_validation_part_all_epochs_are_trained(digits):
    x, _, y, _ = digits
    classifier = LocalLearningClassifier(hidden_sizes=(8,), epochs=7, validation_fraction=0, random_state=0).fit(x, y)
    assert [line.stage for line in classifier.history_.epochs].count("layer 1") == 7


@pytest.mark.parametrize("scale", [1, 255])
def test_normalising_makes_the_scale_of_x_irrelevant(digits, fitted, scale):
    x, test_x, y, _ = digits
    scaled = LocalLearningClassifier(random_state=0, **METHODS["mono-forward"]).fit(x * scale + scale, y)
    assert (scaled.predict(test_x * scale + scale) == fitted["mono-forward"].predict(test_x)).mean() > 0.99


def test_predict_before_fit_is_refused():
    for ask in ("predict", "predict_proba"):
        with pytest.raises(NotFittedError):
            getattr(LocalLearningClassifier(), ask)(np.zeros((2, 2)))


def spoiled(x, value):
    return np.where(np.arange(len(x))[:, None] == 7, value, x)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"method": "backprop"}, "method is 'backprop'; expected one of mono-forward, "),
        ({"hidden_sizes": ()}, "hidden_sizes is .*; expected at least one"),
        ({"hidden_sizes": (0,)}, "hidden_sizes is .*; expected at least one"),
        ({"lr": 0.0}, "lr is 0.0; expected"),
        ({"epochs": 0}, "epochs_per_layer is 0; expected"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0; expected"),
        ({"config": CascadedForwardConfig()}, "config is a CascadedForwardConfig; expected a MonoForwardConfig"),
        ({"image_shape": (1, 8, 8)}, "has no CNN; expected None"),
        ({"method": "cascaded-forward"}, "image_shape is None; expected"),
        ({"method": "cascaded-forward", "image_shape": (1, 8, 9)}, "X has 64 features; expected channels x height x width"),
        ({"method": "cascaded-forward", "image_shape": (1, 8, 8), "channels": (2,) * 4}, "8x8 pixels is too small for 4 blocks"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_in_one_line(digits, settings, what):
    x, _, y, _ = digits
    with pytest.raises(ValueError, match=what) as raised:
        LocalLearningClassifier(**settings).fit(x[:50], y[:50])
    assert "\n" not in str(raised.value)


def test_data_that_cannot_be_used_are_refused(digits, fitted):
    x, _, y, _ = digits
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="X has a NaN or infinite value in row 7"):
            LocalLearningClassifier().fit(spoiled(x, value), y)
        with pytest.raises(ValueError, match="X has a NaN or infinite value in row 7"):
            fitted["mono-forward"].predict(spoiled(x, value))
    with pytest.raises(ValueError, match="y holds 1 class"):
        LocalLearningClassifier().fit(x, y * 0)
    with pytest.raises(ValueError, match="X has 63 features, but LocalLearningClassifier is expecting 64 features"):
        fitted["mono-forward"].predict(x[:, :63])


# Folders


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_gives_the_same_classifier_back(digits, fitted, method, tmp_path):
    _, x, _, _ = digits
    save_model(fitted[method], tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert np.array_equal(loaded.predict_proba(x), fitted[method].predict_proba(x))
    given = fitted[method].get_params() | {"random_state": None}
    assert loaded.get_params() == given
    assert sorted(os.listdir(tmp_path / "model")) == [".fewer.json", "config.json", "model.safetensors"]
    assert not [name for name in os.listdir(tmp_path) if name not in ("model", ".model.lock")]


def test_a_config_and_words_as_labels_come_back(digits, tmp_path):
    x, _, y, _ = digits
    config = CascadedForwardConfig(predictor_loss="mse")
    classifier = LocalLearningClassifier("cascaded-forward", channels=(4,), image_shape=(1, 8, 8), config=config).fit(x, y.astype(str))
    save_model(classifier, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == config
    assert np.array_equal(loaded.predict(x), classifier.predict(x))


def test_numbers_of_numpy_are_written_as_numbers(digits, tmp_path):
    x, _, y, _ = digits
    classifier = LocalLearningClassifier(hidden_sizes=np.array([16, 8]), epochs=np.int64(1), lr=np.float64(1e-3), random_state=0)
    save_model(classifier.fit(x[:200], y[:200]), tmp_path / "model")
    assert (load_model(tmp_path / "model").predict(x[:50]) == classifier.predict(x[:50])).all()


def test_a_folder_is_never_overwritten_unasked_and_never_if_it_is_no_model(fitted, tmp_path):
    classifier = fitted["mono-forward"]
    (tmp_path / "empty").mkdir()
    save_model(classifier, tmp_path / "empty")
    with pytest.raises(FileExistsError, match="is not empty; expected a new directory"):
        save_model(classifier, tmp_path / "empty")
    before = (tmp_path / "empty" / "model.safetensors").read_bytes()
    save_model(fitted["forward-forward"], tmp_path / "empty", overwrite=True)
    assert (tmp_path / "empty" / "model.safetensors").read_bytes() != before
    (tmp_path / "empty" / "thesis.tex").write_text("dear")
    with pytest.raises(FileExistsError, match="holds thesis.tex, which fewer did not write there, and is not replaced"):
        save_model(classifier, tmp_path / "empty", overwrite=True)
    assert (tmp_path / "empty" / "thesis.tex").read_text() == "dear"
    with pytest.raises(FileExistsError, match="thesis.tex is a file; expected a new directory"):
        save_model(classifier, tmp_path / "empty" / "thesis.tex", overwrite=True)


def test_a_write_that_fails_leaves_the_old_model_and_nothing_else(digits, fitted, tmp_path, monkeypatch):
    _, x, _, _ = digits
    save_model(fitted["mono-forward"], tmp_path / "model")
    monkeypatch.setattr(
        "fewer.forward_only.backprop_free_mlps.estimator.saved_form.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        save_model(fitted["forward-forward"], tmp_path / "model", overwrite=True)
    assert np.array_equal(load_model(tmp_path / "model").predict(x), fitted["mono-forward"].predict(x))
    assert set(os.listdir(tmp_path)) <= {"model", ".model.lock"}


def broken(name):
    """What is wrong with the model in a folder."""

    def text(folder, content):
        (folder / "config.json").write_text(content)

    def changed(folder, **fields):
        text(folder, json.dumps(json.loads((folder / "config.json").read_text()) | fields))

    def cut_weights(folder):
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])

    def lacking(folder):
        weights = load_file(folder / "model.safetensors")
        weights.pop("layers.0.bias")
        save_file(weights, folder / "model.safetensors")

    return {
        "no json": lambda folder: text(folder, "{"),
        "a list": lambda folder: text(folder, "[]"),
        "no fields": lambda folder: text(folder, "{}"),
        "another format": lambda folder: changed(folder, format="pickle"),
        "another width": lambda folder: changed(folder, features=10**9),
        "another class": lambda folder: changed(folder, classes=[1, 2, 3]),
        "objects as classes": lambda folder: changed(folder, classes=[{"a": 1}, None]),
        "half the weights": cut_weights,
        "a tensor missing": lacking,
    }[name]


@pytest.mark.parametrize(
    "what",
    [
        "no json", "a list", "no fields", "another format", "another width", "another class", "objects as classes", "half the weights",
        "a tensor missing",
    ],
)  # fmt: skip
def test_a_broken_folder_is_refused_in_one_line(fitted, tmp_path, what):
    save_model(fitted["mono-forward"], tmp_path / "model")
    broken(what)(tmp_path / "model")
    with pytest.raises(ValueError, match="holds no model that can be read") as raised:
        load_model(tmp_path / "model")
    assert "\n" not in str(raised.value)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json; expected a folder that"):
        load_model(tmp_path / "nowhere")


def test_an_unfitted_classifier_is_not_written(tmp_path):
    with pytest.raises(NotFittedError):
        save_model(LocalLearningClassifier(), tmp_path / "model")
    assert os.listdir(tmp_path) == []
