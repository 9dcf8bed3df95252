"""Programs of torch.export: read where they are plain tensors and a graph, refused with the entry's name where reading could run code."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fewer.control import compile_to_c
from fewer.control._shared.program_file import UntrustedFile, read_program, run_program

torch.set_num_threads(1)


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.fixture
def plain(tmp_path) -> Path:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()).eval()
    torch.export.save(torch.export.export(model, (torch.zeros(1, 3),)), tmp_path / "plain.pt2")
    return tmp_path / "plain.pt2"


def changed(plain: Path, **changes) -> Path:
    """The archive with entries changed: a function of the old bytes, or new bytes for a new entry."""
    target = plain.with_name("changed.pt2")
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(target, "w") as new:
        names = {name.partition("/")[2]: name for name in old.namelist()}
        for short, name in names.items():
            data = old.read(name)
            new.writestr(name, changes.pop(short)(data) if short in changes else data)
        for short, data in changes.items():
            new.writestr(f"plain/{short}" if not short.startswith("/") else short[1:], data)
    return target


def pickled(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_pickled_weight(plain: Path, mark: Path) -> Path:
    def config(data: bytes) -> bytes:
        read = json.loads(data)
        read["config"]["0.weight"]["use_pickle"] = True
        return json.dumps(read).encode()

    evil = {"data/weights/weight_0": lambda data: pickled(Evil(mark)), "data/weights/model_weights_config.json": config}
    return changed(plain, **evil)


def with_opaque_constant(plain: Path, mark: Path) -> Path:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
    config = {"data/constants/model_constants_config.json": lambda data: json.dumps({"config": {"x": entry}}).encode()}
    return changed(plain, **config, **{"data/constants/opaque_obj_0": pickle.dumps(Evil(mark))})


def with_pickled_inputs(plain: Path, mark: Path) -> Path:
    return changed(plain, **{"data/sample_inputs/model.pt": lambda data: pickled(((Evil(mark),), {}))})


def with_expression(plain: Path, mark: Path) -> Path:
    code = f"open({str(mark)!r}, 'w')"

    def graph(data: bytes) -> bytes:
        read = json.loads(data)
        value = next(iter(read["graph_module"]["graph"]["tensor_values"].values()))
        value["sizes"][0] = {"as_expr": {"expr_str": code, "hint": None}}
        return json.dumps(read).encode()

    return changed(plain, **{"models/model.json": graph})


def of_an_older_torch(plain: Path, mark: Path) -> Path:
    target = plain.with_name("changed.pt2")
    with zipfile.ZipFile(target, "w") as new:
        new.writestr("version", "8.8")
        for name in ("serialized_exported_program", "serialized_state_dict", "serialized_constants", "serialized_example_inputs"):
            new.writestr(f"{name}.json", pickled(Evil(mark)))
    return target


def with_entries_beside_the_archive(plain: Path, mark: Path) -> Path:
    return changed(plain, **{"/serialized_state_dict.json": pickled(Evil(mark)), "/version": b"8.8"})


def with_a_compiled_library(plain: Path, mark: Path) -> Path:
    return changed(plain, **{"data/aotinductor/model/model.so": b"\x7fELF"})


def with_another_call(plain: Path, mark: Path) -> Path:
    return changed(plain, **{"models/model.json": lambda data: data.replace(b"torch.ops.aten.relu.default", b"torch.hub.load")})


EVIL = {
    with_pickled_weight: "model_weights_config.json says that 0.weight (weight_0) is to be unpickled",
    with_opaque_constant: "model_constants_config.json says that x (opaque_obj_0) is to be unpickled",
    with_pickled_inputs: "data/sample_inputs/model.pt holds more than tensors",
    with_expression: "models/model.json; expected fixed shapes",
    of_an_older_torch: "save it again with torch.export.save",
    with_entries_beside_the_archive: "save it again with torch.export.save",
    with_a_compiled_library: "data/aotinductor/model/model.so is no part of a network",
    with_another_call: "models/model.json calls torch.hub.load",
}


@pytest.mark.parametrize(("made", "message"), EVIL.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_a_file_that_could_run_code_is_refused_by_the_entrys_name(made, message, plain, tmp_path):
    mark = tmp_path / "ran"
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        compile_to_c(made(plain, mark), None, tmp_path / "c", test=True)
    assert message in str(caught.value)
    assert "trust" in str(caught.value) or not isinstance(caught.value, UntrustedFile)
    assert not mark.exists()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("made", [with_pickled_weight, with_pickled_inputs, with_expression])
def test_these_files_do_run_code_where_they_are_trusted(made, plain, tmp_path):
    """Without which the test above would show nothing."""
    with pytest.raises(ValueError, match="cannot|can be read"):
        read_program(made(plain, tmp_path / "ran"), trust=True)
    assert (tmp_path / "ran").exists()


def test_the_guards_of_a_file_are_not_run(plain, tmp_path):
    """`program.module()` makes code of them; what a recorded test needs is had without."""

    def graph(data: bytes) -> bytes:
        return json.dumps(json.loads(data) | {"guards_code": [f"open({str(tmp_path / 'ran')!r}, 'w') is not None"]}).encode()

    file = changed(plain, **{"models/model.json": graph})
    program = read_program(file)
    x = np.ones((1, 3), np.float32)
    assert np.allclose(run_program(program, x), read_program(plain).module()(torch.as_tensor(x)).detach().numpy())
    compile_to_c(file, None, tmp_path / "c", test=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", [0, 100, 3000])
def test_a_damaged_file_is_told_in_one_line(kept, plain, tmp_path, fewer):
    (tmp_path / "cut.pt2").write_bytes(plain.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cut.pt2 is no archive of torch.export.save that can be read \(.*\); save it again") as caught:
        compile_to_c(tmp_path / "cut.pt2", None, tmp_path / "c")
    assert "\n" not in str(caught.value)
    if kept == 100:
        done = fewer("compile-c", "cut.pt2", "--out", "c", status=2)
        assert done.stderr.count("\n") == 1
