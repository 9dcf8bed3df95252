"""What a user points at is recognised by looking; what is none of it is refused in one line; no code of its own is run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fewer.advise.things import recognise
from fewer.errors import UserError


def write_model(folder, classes=("LlamaForCausalLM",), **shapes):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": list(classes)}))
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in (shapes or {"w": (1000, 500)}).items()},
        folder / "model.safetensors",
    )
    return folder


def test_a_transformers_directory(tmp_path):
    thing = recognise(str(write_model(tmp_path / "lm")))
    assert thing.words == ("a transformers causal LM",)
    assert thing.about == "a transformers causal LM: llama, 0.5 million parameters in BF16"
    assert thing.memory == 4 * 500_000


def test_a_diffusers_directory(tmp_path):
    folder = tmp_path / "pipe"
    write_model(folder / "unet") if folder.mkdir() is None else None
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "X"]})
    )
    thing = recognise(str(folder))
    assert thing.words == ("a diffusers pipeline",)
    assert "DDPMPipeline of scheduler, unet" in thing.about


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((4, 8, 8)), "y": np.zeros(4, int)}, ("images",)),
        ({"x": np.zeros((4, 8, 8), "uint8"), "y": np.zeros(4, int), "client": np.zeros(4, int)}, ("a federated job", "images")),
        ({"x": np.zeros((4, 8)), "edge_index": np.zeros((2, 5), int), "labels": np.zeros(4, int)}, ("a graph",)),
        ({"x": np.zeros((4, 8)), "y": np.zeros((4, 8))}, ("an operator between functions",)),
        ({"u": np.zeros((4, 1)), "y": np.zeros((4, 2))}, ("a control loop",)),
        ({"frames": np.zeros((4, 8, 8, 3), "uint8")}, ("videos",)),
    ],
)
def test_an_npz_by_its_arrays(tmp_path, arrays, words):
    np.savez(tmp_path / "mine.npz", **arrays)
    assert recognise(str(tmp_path / "mine.npz")).words == words


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "odd.npz", x=np.array([print], dtype=object), y=np.zeros(1, int))
    with pytest.raises(UserError, match="holds x"):
        recognise(str(tmp_path / "odd.npz"))


def test_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("some words")
    (tmp_path / "n.txt").write_text("1 2.5\n3e4")
    (tmp_path / "dna.fasta").write_text(">a\nACGT\n>b\nTT\n")
    (tmp_path / "net.onnx").write_bytes(b"\x08\x07")
    np.save(tmp_path / "f.npy", np.zeros(1 << 5))
    np.save(tmp_path / "t.npy", np.zeros((3, 4)))
    kinds = {name: recognise(str(tmp_path / name)).words[0] for name in ("notes.txt", "n.txt", "dna.fasta", "net.onnx", "f.npy", "t.npy")}
    assert kinds == {
        "notes.txt": "text", "n.txt": "numbers", "dna.fasta": "sequences", "net.onnx": "a small network in C", "f.npy": "a function of bits",
        "t.npy": "tensors",
    }  # fmt: skip
    assert "5 bits" in recognise(str(tmp_path / "f.npy")).about


def test_a_function_is_read_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boom.py").write_text("raise SystemExit('it was run')\ndef score(m):\n    return m.sum(1)\n")
    thing = recognise("boom:score:12")
    assert thing.words[0] == "a function of bits"
    assert thing.about == "a Python function of 12 bits, boom.py: score"
    for given, words in (
        ("boom:score", "of how many bits"), ("boom:score:99", "of how many bits"), ("boom:other:3", "defines no function other (it defines score)"),
        ("no_such_module_here:score:3", "no module no_such_module_here"),
    ):  # fmt: skip
        with pytest.raises(UserError) as told:
            recognise(given)
        assert words in str(told.value)


def test_what_is_none_of_it(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "word.docx").write_bytes(b"PK")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    cut = write_model(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(b"\x00" * 20)
    seer = write_model(tmp_path / "seer", classes=("ViTForImageClassification",))
    bare = write_model(tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    odd = write_model(tmp_path / "odd")
    (odd / "config.json").write_text("{")
    for given, words in (
        (tmp_path / "absent", "is not there"),
        (tmp_path / "empty", "neither config.json nor model_index.json"),
        (tmp_path / "word.docx", "a .docx file, of no kind that is known"),
        (tmp_path / "cut.npz", "cannot be read as an .npz file"),
        (cut, "no whole safetensors file"),
        (seer, "no causal language model (architectures: ViTForImageClassification)"),
        (bare, "no weights as safetensors"),
        (odd, "is not JSON"),
        ("\0", "is not there"),
    ):
        with pytest.raises(UserError) as told:
            recognise(str(given))
        assert words in str(told.value)
        assert "\n" not in str(told.value)


def test_a_thing_that_changed_is_another(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("some words")
    before = recognise(str(file)).digest()
    assert recognise(str(file)).digest() == before
    file.write_text("some other words")
    assert recognise(str(file)).digest() != before
