"""What is written for a user: whole or not at all, in place of nothing but fewer's own, and what cannot be written is told before the work."""

import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.files import MARKER, check_new, check_new_file, foreign_files, made_whole, model_digest, read_json, read_weights, whole_file


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() if file.is_file() else b"/" for file in sorted(folder.rglob("*"))}


def write(path, text="new", **words):
    with made_whole(path, **words) as part:
        (part / "deep").mkdir()
        (part / "deep" / "a.txt").write_text(text)


def test_what_fewer_wrote_is_replaced_when_asked_and_only_then(here):
    write("out", "old")
    with pytest.raises(FileExistsError, match="not empty; expected a new directory"):
        write("out")
    write("out", overwrite=True)
    assert (here / "out/deep/a.txt").read_text() == "new"
    assert sorted(os.listdir(here)) == ["out"]


@pytest.mark.parametrize("foreign", ["notes.txt", "deep/notes.txt", "folder/"])
def test_a_directory_with_something_foreign_in_it_is_never_replaced(here, foreign):
    write("out", "old")
    target = here / "out" / foreign
    target.mkdir() if foreign.endswith("/") else target.write_text("mine")
    before = tree(here)
    with pytest.raises(FileExistsError, match=f"holds {foreign.rstrip('/')}, which fewer did not write"):
        write("out", overwrite=True)
    assert tree(here) == before


def test_a_directory_without_a_marker_is_all_foreign(here):
    (here / "mine").mkdir()
    (here / "mine/thesis.tex").write_text("years")
    for marker in (None, "noise", '{"files": 3}', "[]"):
        if marker is not None:
            (here / "mine" / MARKER).write_text(marker)
        with pytest.raises(FileExistsError, match="fewer did not write"):
            write("mine", overwrite=True)
    assert (here / "mine/thesis.tex").read_text() == "years"


def test_what_running_it_leaves_behind_is_no_foreign_file(here):
    write("out")
    (here / "out/deep/__pycache__").mkdir()
    (here / "out/deep/__pycache__/a.pyc").write_bytes(b"")
    assert foreign_files(here / "out") == []
    write("out", overwrite=True)


@pytest.mark.parametrize("place", [".", "..", "sub/..", "link", "model", "model/..", "file", "", "file/below", "n" * 256])
def test_places_that_are_refused_with_overwrite_too(here, monkeypatch, place):
    (here / "sub").mkdir()
    (here / "sub/model").mkdir()
    (here / "sub/model/config.json").write_text("{}")
    monkeypatch.chdir(here / "sub")
    Path("file").write_text("x")
    Path("sub").mkdir()
    Path("link").symlink_to("model")
    before = tree(here)
    with pytest.raises((OSError, ValueError), match="--out"):
        write(place, overwrite=True, inputs=["model"])
    with pytest.raises((OSError, ValueError), match="--out"):
        check_new(place, True, inputs=["model"])
    assert tree(here) == before


def test_a_file_keeps_its_place_unless_told_and_a_users_part_is_no_name_of_ours(here):
    Path("f.csv").write_text("mine")
    Path("f.csv.part").write_text("mine too")
    with pytest.raises(FileExistsError, match="f.csv exists; expected a new file"), whole_file("f.csv"):
        raise AssertionError("not reached")
    with whole_file("f.csv", overwrite=True) as part:
        part.write_text("new")
    assert (Path("f.csv").read_text(), Path("f.csv.part").read_text()) == ("new", "mine too")


@pytest.mark.parametrize("place", ["pipe", "folder", "link", "", "file/below", "n" * 256])
def test_what_is_no_regular_file_is_never_touched(here, place):
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("file").write_text("x")
    Path("link").symlink_to("file")
    with pytest.raises((OSError, ValueError), match="--out"), whole_file(place, overwrite=True):
        raise AssertionError("not reached")
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)
    assert sorted(os.listdir()) == ["file", "folder", "link", "pipe"]


def test_an_input_is_not_written_over(here):
    Path("x.npz").write_text("data")
    with pytest.raises(FileExistsError, match="which is read here"):
        check_new_file("./x.npz", overwrite=True, inputs=["x.npz"])


@settings(max_examples=20, deadline=None)
@given(depth=st.integers(0, 3), fails=st.booleans(), kind=st.sampled_from(["file", "folder"]))
def test_all_or_nothing_at_any_depth(tmp_path_factory, depth, fails, kind):
    root = tmp_path_factory.mktemp("whole")
    target = root.joinpath(*"abc"[:depth], "out")
    try:
        with (whole_file if kind == "file" else made_whole)(target) as part:
            (part if kind == "file" else part / "x").write_text("whole")
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert tree(root) == {}
    else:
        assert not fails
        assert (target if kind == "file" else target / "x").read_text() == "whole"
        assert not [name for name in tree(root) if ".fewer-" in name]


def test_what_is_written_has_the_usual_rights(here):
    mask = os.umask(0o022)
    os.umask(mask)
    write("out")
    with whole_file("f") as part:
        part.write_text("x")
    assert stat.S_IMODE(os.stat("out").st_mode) == 0o777 & ~mask
    assert stat.S_IMODE(os.stat("f").st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(
    ("text", "why"), [("{", "is not JSON"), ("[1]", "holds a list"), ("\xff", "is not JSON"), ("[" * 100_000, "is not JSON")]
)
def test_a_broken_json_file_is_named(here, text, why):
    Path("config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=f"config.json {why}"):
        read_json("config.json")


def test_a_json_file_that_is_none_is_told_and_never_waited_for(here):
    os.mkfifo("pipe")
    for place in ("absent", "pipe", "."):
        with pytest.raises(FileNotFoundError, match="cannot be read"):
            read_json(place)


def test_weights_that_are_cut_off_are_named(here):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(100)}, "w.safetensors")
    assert read_weights("w.safetensors")["w"].sum() == 100
    whole = Path("w.safetensors").read_bytes()
    for cut in (whole[:-1], whole[:10], b"", b"noise" * 100):
        Path("w.safetensors").write_bytes(cut)
        with pytest.raises(ValueError, match="w.safetensors is no whole safetensors file"):
            read_weights("w.safetensors")
    with pytest.raises(FileNotFoundError, match="missing.safetensors is no file"):
        read_weights("missing.safetensors")


def test_a_models_digest_tells_names_types_and_values_apart():
    model = torch.nn.Linear(2, 3)
    first = model_digest(model)
    assert model_digest(model) == first
    assert model_digest(torch.nn.Sequential(model)) != first
    assert model_digest(torch.nn.Linear(2, 3)) != first
    assert model_digest(model.bfloat16()) != first
