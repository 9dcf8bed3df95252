"""Sheets of pictures: from a trial through the store and the record to the page."""

from __future__ import annotations

import io

import msgspec
import numpy as np
import pytest
import torch
from guessing.study import study as guessing
from PIL import Image

from fewer.study import LocalEngine, Scale, Store, make_record, plan, read_record, run
from fewer.study.pictures import GREY, SHOWN, sheet
from fewer.study.recording import write_record
from fewer.study.trial import PictureEvent, Trial, TrialSpec, decode_event, encode


def opened(png):
    picture = Image.open(io.BytesIO(png))
    return np.asarray(picture.convert("L") if picture.mode == "P" else picture)


def level(value):
    """The nearest of sixteen brightnesses."""
    return round(value / 17) * 17


def test_images_stand_eight_a_row_with_a_gap_between():
    images = torch.linspace(-1, 1, 10).reshape(10, 1, 1, 1).expand(10, 1, 2, 3)
    pixels = opened(sheet(images))
    assert pixels.shape == (2 * 3 - 1, 8 * 4 - 1)
    for number in range(10):
        top, left = (number // 8) * 3, (number % 8) * 4
        assert (pixels[top : top + 2, left : left + 3] == level(255 * number / 9)).all()
    assert (pixels[2] == 17 * GREY).all()
    assert (pixels[3:, 8:] == 17 * GREY).all(), "the rest of the last row is empty"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
def test_colours_values_and_kinds_of_numbers(dtype):
    image = torch.tensor([[[0, 255]], [[64, 0]], [[255, 128]]], dtype=dtype)[None]
    pixels = opened(sheet(image, (0, 255)))
    assert pixels.tolist() == [[[0, level(64), 255], [255, 0, level(128)]]]
    assert opened(sheet(image[:, 0].numpy() if dtype not in (torch.bfloat16,) else image[:, 0], (0, 255))).tolist() == [[0, 255]]


def test_values_beyond_black_and_white_are_cut_off_and_nan_is_black():
    assert opened(sheet(np.array([[[-9.0, 9.0, np.nan, 0.0]]]))).tolist() == [[0, 255, 0, level(127.6)]]


def test_large_images_are_averaged_and_many_are_left_out():
    checks = np.indices((130, 130)).sum(0) % 2
    pixels = opened(sheet(np.stack([checks] * 70), (0, 1)))
    side = 130 // 3
    assert pixels.shape == (8 * (side + 1) - 1, 8 * (side + 1) - 1), f"{SHOWN} images are shown"
    assert set(np.unique(pixels[:side, :side])) <= {level(113), level(142)}, "the mean of nine, not every third"
    assert opened(sheet(np.zeros((1, 1, 300)))).shape == (1, 300)


@pytest.mark.parametrize("shape", [(2, 2), (2, 4, 3, 3), (0, 2, 2), (1, 1, 1, 2, 2)])
def test_what_is_no_picture_is_refused_by_the_sheet_and_left_out_by_a_trial(shape):
    with pytest.raises(ValueError, match=r"expected \[N, H, W\]"):
        sheet(np.zeros(shape))
    events = []
    Trial(TrialSpec("m", "s", "a", 0, Scale.QUICK, {}), events.append).show(np.zeros(shape))
    assert events == []


def test_nothing_is_kept_while_settings_are_tuned():
    events = []
    Trial(TrialSpec("m", "s", "a", 0, Scale.QUICK, {}, tuning=True), events.append).show(np.zeros((1, 2, 2)))
    assert events == []


def test_a_picture_crosses_a_process_and_its_name_is_made_plain():
    png = sheet(np.zeros((1, 2, 2)))
    assert decode_event(encode(PictureEvent("a\x1b[31m", png))) == PictureEvent("a\\x1b[31m", png)


def test_the_first_seed_is_kept_in_the_record_and_a_repeated_trial_replaces_its_own(tmp_path):
    with Store(tmp_path / "store.sqlite", write=True) as store:
        planned = plan(guessing, "guessing.study", seeds=2, store=store)
        for _ in range(2):
            outcome = run(planned, store, LocalEngine(), fresh=True)
        assert store._select("SELECT count(*) FROM pictures") == [(4,)], "two arms, two seeds"
        store.finish(store.begin(planned.specs[0], {}), *_failed())
        assert list(store.pictures(planned.specs)["seeds"]) == ["mean", "median"], "of the next seed where the first is not done"
    record = make_record(outcome)
    assert record.pictures["seeds"]["mean"] == sheet(np.zeros((3, 2, 2))), "of the first seed"
    write_record(record, tmp_path)
    assert read_record(tmp_path) == record
    old = msgspec.to_builtins(record)
    del old["pictures"]
    assert msgspec.convert(old, type(record)).pictures == {}, "records from before pictures are read"


def _failed():
    from fewer.study.trial import FinishedEvent

    return FinishedEvent("failed", 0.1, 0, "a fault"), {}
