"""Images for studies: known sets and a user's own file are split and normalised; what cannot be used is refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fewer.errors import UserError
from fewer.tasks import accuracy, image_task


@pytest.fixture
def write(tmp_path):
    def save(**arrays):
        np.savez(tmp_path / "mine.npz", **arrays)
        return str(tmp_path / "mine.npz")

    return save


def pictures(count=100, shape=(6, 6), dtype=np.uint8):
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (count, *shape)).astype(dtype), np.arange(count, dtype=np.uint8) % 3


def test_a_known_set_is_split_without_overlap_and_normalised_over_its_training_images():
    task = image_task("digits", train=900)
    assert (task.name, task.classes, task.shape) == ("digits", 10, (1, 8, 8))
    assert [len(part[0]) for part in (task.train, task.validation, task.test)] == [900, 143, 359]
    assert task.train[0].mean().abs() < 1e-5
    assert task.train[0].std() == pytest.approx(1, abs=1e-3)
    rows = torch.cat([part[0].flatten(1) for part in (task.train, task.validation, task.test)])
    assert len(rows.unique(dim=0)) == len(rows)


def test_a_set_with_a_test_split_keeps_it_and_given_numbers_normalise_it():
    task = image_task("fashion-mnist", train=50, validation=20, test=30, side=14, normalise=(0.25, 0.5))
    assert task.shape == (1, 14, 14)
    assert [len(part[1]) for part in (task.train, task.validation, task.test)] == [50, 20, 30]
    assert task.test[1][:4].tolist() == [9, 2, 1, 1]
    assert task.train[0].min() == -0.5


def test_the_split_is_the_same_each_time():
    assert torch.equal(image_task("digits").train[0], image_task("digits").train[0])


@pytest.mark.parametrize(("shape", "expected"), [((6, 6), (1, 6, 6)), ((3, 6, 5), (3, 6, 5))])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16, np.int64])
def test_a_file_of_ones_own_is_split_in_three(write, shape, expected, dtype):
    x, y = pictures(shape=shape, dtype=dtype)
    file = write(x=x, y=y, client=np.arange(100))
    task = image_task(file, test=7, beside=["client"])
    assert (task.name, task.classes, task.shape) == (file, 3, expected)
    assert [len(part[0]) for part in (task.train, task.validation, task.test)] == [72, 8, 7]
    assert task.train[1].dtype == torch.int64
    assert (torch.as_tensor(task.beside["client"]) % 3).equal(task.train[1])
    assert task.train[0].dtype == torch.float32


def test_a_channel_that_is_the_same_everywhere_stays_finite(write):
    x, y = pictures(shape=(2, 6, 6))
    x[:, 1] = 7
    task = image_task(write(x=x, y=y))
    assert task.train[0].isfinite().all()
    assert task.train[0][:, 1].abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.zeros((100, 36))}, "expected images"),
        ({"x": np.zeros((100, 6, 6, 3))}, "looks like channels last; expected .N, C, H, W."),
        ({"y": np.zeros(100, int)}, "1 classes; expected at least 10 of at least 2"),
        ({"y": np.zeros(99, int)}, "expected .100,. integers"),
        ({"client": np.zeros(3)}, "client has 3 rows"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(write, change, words):
    x, y = pictures()
    with pytest.raises(UserError, match=words):
        image_task(write(**{"x": x, "y": y} | change), beside=["client"])


@pytest.mark.parametrize(
    ("data", "words"), [("mnits", "did you mean 'mnist'"), ("absent.npz", "absent.npz is no file"), ("", "expected one of mnist")]
)
def test_a_set_that_is_not_known_is_refused(data, words):
    with pytest.raises(UserError, match=words):
        image_task(data)


def test_accuracy_is_that_of_eval_mode_and_gives_the_mode_back():
    model = nn.Sequential(nn.Dropout(0.9), nn.Flatten(), nn.Linear(36, 3))
    model[0].eval()
    model[2].train()
    data = torch.randn(64, 1, 6, 6), torch.randint(3, (64,))
    with torch.no_grad():
        expected = float((model[1:](data[0]).argmax(1) == data[1]).float().mean())
    assert accuracy(model, data, batch=10) == pytest.approx(expected)
    assert [part.training for part in model] == [False, True, True]
