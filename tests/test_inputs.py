"""The user's own files: read as they are, or refused in one line that names the file and the reason."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fewer.inputs import map_array, read_arrays, read_examples, read_images, read_pairs, read_text

READERS = {
    "x.npz": lambda file: read_arrays(file, ["x"]),
    "x.npy": map_array,
    "x.jsonl": read_pairs,
    "x.txt": read_text,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("place", ["absent", "folder", "", "n" * 256, "file/below", "link"])
def test_a_place_without_a_file_is_named(tmp_path, monkeypatch, name, place):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("x")
    Path("link").symlink_to("absent")
    with pytest.raises(FileNotFoundError, match=r"^[^\n]*(is no file|is a folder); expected a[^\n]*$"):
        READERS[name](place)


def whole_npz():
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.arange(12.0).reshape(3, 4), y=np.array([0, 1, 1]))
    return stream.getvalue()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cut_or_noisy_archive_is_read_or_refused_in_one_line(tmp_path, data):
    raw = bytearray(whole_npz())
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "x.npz").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        read_arrays(tmp_path / "x.npz", ["x"])
    except (ValueError, NotImplementedError) as error:
        told = str(error)
    else:
        return
    assert "x.npz" in told
    assert "\n" not in told


def test_objects_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no array of objects"):
        read_arrays(tmp_path / "x.npz", ["x"])
    with pytest.raises(ValueError, match="cannot be read as an .npy file of plain numbers"):
        map_array(tmp_path / "x.npy")


def test_arrays_that_are_lacking_are_named_beside_those_that_are_there(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(1), b=np.ones(1))
    with pytest.raises(ValueError, match=r"has no array 'x' \(it has a, b\)"):
        read_arrays(tmp_path / "x.npz", ["x"])
    assert list(read_arrays(tmp_path / "x.npz", ["a"], ["b", "c"])) == ["a", "b"]


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.ones(3), np.zeros(3, int), "one row an example"),
        (np.ones((0, 2)), np.zeros(0, int), "one row an example"),
        (np.array([["a"]]), np.zeros(1, int), "expected numbers"),
        (np.array([[1.0], [np.nan]]), np.zeros(2, int), "infinite value in row 1"),
        (np.ones((2, 2)), np.zeros(3, int), r"y is \(3,\) int64; expected \(2,\) integers"),
        (np.ones((2, 2)), np.zeros(2), "float64; expected"),
        (np.ones((2, 2)), np.array([-1, 0]), "y holds -1"),
    ],
)
def test_examples_that_do_not_fit_are_told(tmp_path, x, y, words):
    np.savez(tmp_path / "x.npz", x=x, y=y)
    with pytest.raises(ValueError, match=words):
        read_examples(tmp_path / "x.npz")


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.int64, bool])
def test_labels_of_any_integer_type_come_as_int64(tmp_path, kind):
    np.savez(tmp_path / "x.npz", x=np.ones((2, 2), np.float32), y=np.array([0, 1]).astype(kind), client=np.array([0, 1]))
    arrays = read_examples(tmp_path / "x.npz", ["client"])
    assert (arrays["y"].dtype, arrays["y"].tolist(), arrays["client"].tolist()) == (np.int64, [0, 1], [0, 1])


def test_pictures_come_as_bytes_and_a_bad_one_is_named(tmp_path):
    for number in range(3):
        Image.fromarray(np.full((4, 6, 3), 50 * number, np.uint8)).save(tmp_path / f"{number}.png")
    assert read_images(tmp_path).shape == (3, 3, 4, 6)
    assert read_images(tmp_path, channels=1)[2, 0, 0, 0] == 100
    with pytest.raises(ValueError, match="0.png is 6 x 4 pixels; expected 8 x 8"):
        read_images(tmp_path, size=(8, 8))
    whole = (tmp_path / "1.png").read_bytes()
    for bad in (whole[:40], b"", b"noise", whole[: len(whole) // 2]):
        (tmp_path / "1.png").write_bytes(bad)
        with pytest.raises(ValueError, match="1.png is no whole picture"):
            read_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no pictures"):
        read_images((tmp_path / "empty").mkdir() or tmp_path / "empty")
    with pytest.raises(NotADirectoryError, match="is no folder"):
        read_images(tmp_path / "0.png")


@pytest.mark.parametrize(
    "line",
    ['{"prompt": null, "completion": "b"}', '{"prompt": ["a"], "completion": "b"}', '{"prompt": NaN, "completion": "b"}', "[1]", "3", "{",
     '{"prompt": "a"}', '{"prompt": "", "completion": "b"}', '{"prompt": {"a": 1}, "completion": "b"}', "[" * 5000],
)  # fmt: skip
def test_a_line_that_is_no_pair_is_named(tmp_path, line):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=r"p.jsonl, line 3: [^\n]*expected"):
        read_pairs(tmp_path / "p.jsonl")


def test_text_that_is_not_utf8_and_files_without_examples_are_told(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"is not UTF-8 \(byte 3\)"):
        read_pairs(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no examples"):
        read_pairs(tmp_path / "p.jsonl")


def test_a_folder_of_clients_is_read_as_one(tmp_path):
    for name, rows in (("b", 3), ("a", 2)):
        np.savez(tmp_path / f"{name}.npz", x=np.full((rows, 4), rows, np.float32), y=np.arange(rows))
    whole = read_examples(tmp_path, ["client"])
    assert whole["x"][:, 0].tolist() == [2, 2, 3, 3, 3]
    assert whole["client"].tolist() == [0, 0, 1, 1, 1]
    assert "client" not in read_examples(tmp_path)
    np.savez(tmp_path / "c.npz", x=np.ones((3, 5), np.float32), y=np.arange(3))
    with pytest.raises(ValueError, match=r"c.npz: x, y with x \(5,\); expected x, y with x \(4,\) as in a.npz"):
        read_examples(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no .npz files; expected one a client"):
        read_examples(tmp_path / "empty")
