"""The verbs on files and a tiny model, and the arms of the study on the same."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llamas import directory_of, tiny_llama

from fewer.lowbit import FORMATS, fake_quantize, qsnr, quantize
from fewer.lowbit.int_vs_fp import load_packed
from fewer.lowbit.int_vs_fp import study as declared
from fewer.lowbit.int_vs_fp.format_command import bar
from fewer.study import Scale, Trial
from fewer.study.trial import FigureEvent, TrialSpec


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return directory_of(tiny_llama(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tensors(tmp_path):
    draw = torch.Generator().manual_seed(0)
    held = {
        "a": torch.randn(7, 50, generator=draw),
        "b": torch.randn(4, 64, generator=draw).bfloat16(),
        "norm": torch.ones(64),
        "ids": torch.arange(5),
        "eight": torch.ones(4, 32).to(torch.float8_e4m3fn),
    }
    save_file(held, tmp_path / "in.safetensors", metadata={"format": "pt"})
    return held


def test_formats_are_listed_and_shown(fewer):
    listed = fewer("formats").stdout
    assert all(name in listed for name in FORMATS)
    assert json.loads(fewer("formats", "--json").stdout)["nvfp4"]["bits a value"] == 4.5
    assert fewer("formats", "list").stdout == listed
    shown = fewer("formats", "show", "mxfp4").stdout
    assert "bits a value: 4.25" in shown
    assert "7 6" in shown
    assert json.loads(fewer("formats", "show", "e2m1", "--json").stdout)["values"][:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert "did you mean 'mxfp4'" in fewer("formats", "show", "mxfp44", status=2).stderr


def test_errors_of_a_file(fewer, tensors):
    told = json.loads(fewer("formats", "error", "in.safetensors", "--formats", "mxfp4,nvint4", "--json").stdout)
    assert set(told) == {"a", "b", "norm"}
    assert told["a"]["mxfp4"]["qsnr"] == pytest.approx(qsnr(tensors["a"], fake_quantize(tensors["a"], "mxfp4")))
    for name in ("a", "b"):
        for fmt in ("mxfp4", "nvint4"):
            assert told[name][fmt]["bytes"] == quantize(tensors[name], fmt).nbytes
    assert "dB" in fewer("formats", "error", "in.safetensors", "--rotate", "32").stdout
    assert "expected a power of two" in fewer("formats", "error", "in.safetensors", "--rotate", "12", status=2).stderr


@pytest.mark.parametrize("fmt", ["nvfp4", "mxint8", "mxfp6_e2m3"])
def test_what_is_packed_comes_back(fewer, tensors, tmp_path, fmt):
    said = fewer("formats", "pack", "in.safetensors", "small.safetensors", "--format", fmt).stdout
    assert "2 of 5 tensors packed" in said
    fewer("formats", "unpack", "small.safetensors", "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert set(back) == set(tensors)
    for name in ("a", "b"):
        assert torch.equal(back[name], fake_quantize(tensors[name], fmt))
    for name in ("norm", "ids", "eight"):
        assert back[name].dtype == tensors[name].dtype
        assert torch.equal(back[name].float(), tensors[name].float())
    with safe_open(tmp_path / "back.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    again = fewer("formats", "pack", "in.safetensors", "small.safetensors", "--format", fmt, status=2).stderr
    assert "exists" in again
    fewer("formats", "pack", "in.safetensors", "small.safetensors", "--format", fmt, "--overwrite")
    assert "packed already" in fewer("formats", "pack", "small.safetensors", "x.safetensors", "--format", fmt, status=2).stderr
    assert "no packed file" in fewer("formats", "unpack", "in.safetensors", "x.safetensors", status=2).stderr
    itself = fewer("formats", "unpack", "small.safetensors", "small.safetensors", "--overwrite", status=2).stderr
    assert "which is read here" in itself
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("about", ['{"w": "int8"}', '{"w": ["float32"]}', '["w"]', "3"])
def test_a_packed_file_of_unknown_dtypes_is_refused(fewer, tmp_path, about):
    save_file(quantize(torch.ones(2, 32), "mxfp4").to_dict(), tmp_path / "odd.safetensors", metadata={"fewer.packed": about})
    assert "is no packed file" in fewer("formats", "unpack", "odd.safetensors", "x.safetensors", status=2).stderr
    assert not (tmp_path / "x.safetensors").exists()


def test_a_model_layer_by_layer(fewer, files):
    model, text = map(str, files)
    said = fewer("formats", "model", model, "--text", text, "--window", "32").stdout
    assert said.count("down_proj") == 2
    assert "█" in said
    assert "mxint8 suits 14 of 14 layers" in said
    told = json.loads(fewer("formats", "model", model, "--text", text, "--window", "32", "--rotate", "--json").stdout)
    assert told["recommended"]["model.layers.0.mlp.up_proj"]["mx8"] == "mxint8"
    assert "pair is 'mx5'" in fewer("formats", "model", model, "--text", text, "--pairs", "mx5", status=2).stderr
    assert bar(0.5) == " " * 12 + "|" + "█" * 6 + " " * 6


def test_what_formats_do_to_a_model(fewer, files, tmp_path):
    model, text = map(str, files)
    words = ("int-vs-fp", model, "--text", text, "--window", "32", "--windows", "2")
    told = json.loads(fewer(*words, "--rotate", "--out", "packed", "--pair", "nv4", "--json").stdout)
    assert told["formats"]["mxint8"]["kl"] < told["formats"]["mxfp8_e4m3"]["kl"]
    assert len(told["recommended"]) == len(told["crest"]) == 14
    packed = load_packed(tiny_llama(), tmp_path / "packed")
    chosen = {name: own["nv4"] for name, own in told["recommended"].items()}
    assert all(packed.get_submodule(name).fmt_w.fmt.element == FORMATS[fmt].element for name, fmt in chosen.items())
    assert "perplexity as it is" in fewer(*words, "--formats", "mxint8").stdout
    assert "not empty" in fewer(*words, "--out", "packed", status=2).stderr
    (tmp_path / "empty.txt").write_text("")
    assert "expected" in fewer("int-vs-fp", model, "--text", "empty.txt", status=2).stderr
    assert "did you mean 'mxint8'" in fewer(*words, "--formats", "mxint88", status=2).stderr


def test_the_arms_log_what_the_claims_ask(files, monkeypatch):
    model, text = map(str, files)
    monkeypatch.setattr(declared, "train_digits", lambda fmt, seed: 0.1)  # trained with another test
    work = declared.task(Scale.QUICK, model, text, "", 32)
    figures: dict[str, dict[str, float]] = {}
    for name in ("fp", "int", "reference", "int8-dynamic", "tensors"):
        events: list = []
        trial = Trial(TrialSpec("m", "int-vs-fp", name, 0, Scale.QUICK, {}), events.append)
        declared.study.arms[name].run(work, trial)
        figures[name] = {f"{each.name} {sorted(each.coordinates.items())}": each.value for each in events if isinstance(each, FigureEvent)}
    at = sorted(declared.at("mx8").items())
    assert figures["int"][f"kl {at}"] < figures["fp"][f"kl {at}"]
    assert figures["int"][f"kl {at}"] < figures["int8-dynamic"][f"kl {at}"]
    assert figures["tensors"][f"predicted {at}"] == 1
    assert figures["reference"][f"bytes {at}"] > figures["int"][f"bytes {at}"]
    assert sum(key.startswith("kl ") for key in figures["int"]) == 8


def test_the_digits_are_learnt_in_few_bits():
    from fewer.lowbit.int_vs_fp.problems import train_digits

    assert train_digits("mxint8", 0) < 0.15
