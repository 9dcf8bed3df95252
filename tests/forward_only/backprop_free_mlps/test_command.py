"""The verbs train-local and predict-local: arrays in, a model and predictions out."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fewer.forward_only import LocalLearningClassifier
from fewer.forward_only.backprop_free_mlps.command import predict_local, train_local


@pytest.fixture
def files(tmp_path):
    """train.npz and test.npz of digits, as images of bytes."""
    x, y = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x.reshape(-1, 8, 8).astype(np.uint8), y, test_size=400, random_state=0)
    np.savez(tmp_path / "train.npz", x=x, y=y)
    np.savez(tmp_path / "test.npz", x=test_x, y=test_y)
    np.savez(tmp_path / "unknown.npz", x=test_x)
    return tmp_path


def train(files, method="mono-forward", **settings):
    settings = {"out": files / "model", "hidden": "200", "channels": "16,32", "lr": 5e-3, "epochs": 15, "overwrite": True} | settings
    train_local(files / "train.npz", method=method, **settings)


def test_the_verbs_train_and_predict(fewer, files):
    told = fewer(
        *[
            "train-local",
            "train.npz",
            "--method",
            "mono-forward",
            "--hidden",
            "200,200",
            "--lr",
            "5e-3",
            "--epochs",
            "10",
            "--out",
            "model",
        ],
        cwd=files,
    )
    assert "% of the validation rows right (layer 2)" in told.stdout
    assert "layer 2, epoch 1: loss" in told.stderr
    assert sorted(file.name for file in (files / "model").iterdir()) == [".fewer.json", "config.json", "model.safetensors"]
    result = json.loads(fewer(*["predict-local", "model", "test.npz", "--out", "predictions.npz", "--json"], cwd=files).stdout)
    predicted = np.load(files / "predictions.npz")["y"]
    assert result == {"rows": 400, "accuracy": float(np.mean(predicted == np.load(files / "test.npz")["y"])), "out": "predictions.npz"}
    assert result["accuracy"] > 0.95
    again = fewer(*["train-local", "train.npz", "--out", "model"], cwd=files, status=2)
    assert again.stderr.count("\n") == 1
    assert "--out model is not empty; expected a new directory" in again.stderr


@pytest.mark.parametrize("method", ["mono-forward", "forward-forward", "cascaded-forward", "backpropagation"])
def test_every_method_learns_the_digits(files, capsys, method):
    train(files, method, lr=1e-2)
    capsys.readouterr()
    predict_local(files / "model", files / "test.npz", as_json=True)
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"] > 0.85
    assert len(result["predictions"]) == result["rows"] == 400


def test_one_seed_writes_one_file_bit_for_bit(files):
    for name, seed in [("one", 5), ("two", 5), ("three", 6)]:
        train(files, out=files / name, seed=seed, epochs=2)
    one, two, three = ((files / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two != three


def test_without_labels_the_predictions_are_printed(files, capsys):
    train(files, epochs=2)
    capsys.readouterr()
    predict_local(files / "model", files / "unknown.npz")
    printed = capsys.readouterr().out.split()
    assert len(printed) == 400
    assert set(printed) <= set("0123456789")


def test_a_training_file_that_cannot_be_used_is_refused_in_one_line(files):
    x, y = np.zeros((20, 4)), np.arange(20) % 2
    nan = x.copy()
    nan[3, 1] = np.nan
    cases = {
        "has no array 'x' (it has y)": {"y": y},
        "has no array 'y' (it has x)": {"x": x},
        "no array of objects": {"x": x, "y": y.astype(object)},
        "x is (20,) float64; expected numbers [N, ...]": {"x": x[:, 0], "y": y},
        "x is (0, 4) float64; expected numbers [N, ...]": {"x": x[:0], "y": y[:0]},
        "x is (20, 4) <U32; expected numbers": {"x": x.astype(str), "y": y},
        "y is float64; expected integers, booleans or strings": {"x": x, "y": y / 2},
        "NaN or infinite value in row 3": {"x": nan, "y": y},
        "inconsistent numbers of samples": {"x": x, "y": y[:5]},
    }
    for what, arrays in cases.items():
        np.savez(files / "train.npz", allow_pickle=True, **arrays)
        with pytest.raises(ValueError, match=re.escape(what)) as raised:
            train(files)
        assert "\n" not in str(raised.value)
    assert not (files / "model").exists()


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_nothing_is_ever_unpickled(files, monkeypatch):
    monkeypatch.chdir(files)
    np.savez(files / "train.npz", allow_pickle=True, x=np.array([Bomb()], dtype=object), y=np.zeros(1, int))
    with pytest.raises(ValueError, match="no array of objects"):
        train(files)
    np.save(files / "train.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    (files / "train.npy").rename(files / "train.npz")
    with pytest.raises(ValueError, match=r"cannot be read as an .npz file"):
        train(files)
    assert not (files / "exploded").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"no archive", b"\x93NUMPY"])
def test_a_file_that_is_no_npz_is_refused(files, content):
    (files / "train.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as an .npz file of plain arrays"):
        train(files)


def test_a_cut_file_is_refused(files):
    whole = (files / "train.npz").read_bytes()
    (files / "train.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot be read as an .npz file of plain arrays"):
        train(files)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"method": "backprop"}, "--method is 'backprop'; expected one of"),
        ({"hidden": "a,b"}, "--hidden is 'a,b'; expected whole numbers"),
        ({"hidden": "0"}, "--hidden is '0'; expected whole numbers from 1"),
        ({"hidden": "99999999999999"}, "--hidden is '99999999999999'; expected whole numbers from 1"),
        ({"hidden": "1000000,1000000"}, "--hidden 1000000,1000000 takes .* GB for .* rows"),
        ({"hidden": ",".join("9" * 2000)}, "--hidden has 3999 characters"),
        ({"method": "cascaded-forward", "channels": "1000000,1000000"}, "--channels 1000000,1000000 takes .* GB"),
        ({"epochs": 0}, "epochs_per_layer is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"method": "cascaded-forward", "channels": "2,2,2,2"}, "too small for 4 blocks"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(files, settings, what):
    with pytest.raises(ValueError, match=what):
        train(files, **settings)
    assert not (files / "model").exists()


def test_files_that_are_not_there_or_should_not_be_are_told(files):
    with pytest.raises(FileNotFoundError, match=r"nothing.npz is no file"):
        train_local(files / "nothing.npz", out=files / "model")
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        predict_local(files / "nowhere", files / "test.npz")
    train(files, epochs=1)
    (files / "p.npz").write_text("mine")
    with pytest.raises(FileExistsError, match=r"p.npz exists; expected a new file"):
        predict_local(files / "model", files / "test.npz", out=files / "p.npz")
    assert (files / "p.npz").read_text() == "mine"
    predict_local(files / "model", files / "test.npz", out=files / "p.npz", overwrite=True)
    assert np.load(files / "p.npz")["y"].shape == (400,)


def test_a_model_refuses_data_of_another_width(files):
    train(files, epochs=1)
    np.savez(files / "wide.npz", x=np.zeros((3, 65)))
    with pytest.raises(ValueError, match=r"X has 65 features, but .* is expecting 64"):
        predict_local(files / "model", files / "wide.npz")


def test_images_that_are_none_are_refused(files):
    np.savez(files / "train.npz", x=np.zeros((20, 64)), y=np.arange(20) % 2)
    with pytest.raises(ValueError, match=r"cascaded-forward expects images \[N, H, W\] or \[N, C, H, W\]"):
        train(files, "cascaded-forward")


def test_a_place_that_cannot_be_written_is_refused_before_the_work(files, monkeypatch):
    monkeypatch.setattr(LocalLearningClassifier, "fit", lambda *_, **__: pytest.fail("trained"))
    (files / "mine").mkdir()
    (files / "mine" / "thesis.tex").write_text("years")
    (files / "link").symlink_to("nowhere")
    for out in ("train.npz", "train.npz/model", "mine", "link", "n" * 256):
        with pytest.raises((OSError, ValueError), match="--out"):
            train(files, out=files / out)
    assert sorted(file.name for file in files.iterdir()) == ["link", "mine", "test.npz", "train.npz", "unknown.npz"]


def test_predictions_never_replace_what_they_are_made_from(files, fewer):
    train(files, epochs=1)
    before = (files / "test.npz").read_bytes()
    for out in ("test.npz", "model", "link"):
        (files / "link").unlink(missing_ok=True)
        (files / "link").symlink_to("nowhere")
        told = fewer("predict-local", "model", "test.npz", "--out", out, "--overwrite", cwd=files, status=2)
        assert told.stderr.count("error: ") == told.stderr.count("\n") == 1
    assert (files / "test.npz").read_bytes() == before
    predict_local(files / "model", files / "test.npz", out=files / "no_ending")
    assert np.load(files / "no_ending")["y"].shape == (400,)


def test_numbers_and_words_out_of_their_limits_are_refused_in_one_line(files, fewer):
    for words in (
        ["--lr", "inf"], ["--lr", "0"], ["--lr", "nan"], ["--seed", "1" + "0" * 30], ["--seed", "-1"], ["--epochs", "0"],
        ["--device", "nope"], ["--method", "mono-forwrd"], ["--hidden", "99999999999999"], ["--hidden", "-1"], ["--channels", "x"],
    ):  # fmt: skip
        told = fewer("train-local", "train.npz", "--out", "new", *words, cwd=files, status=2)
        assert told.stderr.count("error: ") == told.stderr.count("\n") == 1, told.stderr
        assert words[0] in told.stderr
    assert not (files / "new").exists()


def test_a_broken_model_is_told_in_one_line(files, fewer):
    train(files, epochs=1)
    config, weights = ((files / "model" / name).read_bytes() for name in ("config.json", "model.safetensors"))
    spoilt = {
        "config.json": [b"", b"[1]", config[:50], config.replace(b"200", b"99999999999999"), config.replace(b'"format"', b'"fmt"')],
        "model.safetensors": [b"", weights[: len(weights) // 2], b"\x00" * 64],
    }
    for name, contents in spoilt.items():
        for content in contents:
            (files / "model" / "config.json").write_bytes(config)
            (files / "model" / "model.safetensors").write_bytes(weights)
            (files / "model" / name).write_bytes(content)
            told = fewer("predict-local", "model", "test.npz", cwd=files, status=2)
            assert told.stderr.count("error: ") == told.stderr.count("\n") == 1, told.stderr
