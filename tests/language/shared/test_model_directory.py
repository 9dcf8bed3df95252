"""One reader for every model directory: broken ones of each kind are told in one line, and nothing of theirs is run."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewer.language._shared.model_directory import load_directory
from fewer.tasks import micro_lm
from fewer.tasks.language_corpus import Corpus, train_tokenizer

WORDS = " ".join(f"word{number} said {number * 7}" for number in range(400))
EVIL = "import pathlib\npathlib.Path('RAN').touch()\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "model"
    micro_lm().save_pretrained(folder)
    train_tokenizer(Corpus((("a", WORDS),), (), "here")).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path, monkeypatch):
    """A copy that a test may break, and the folder that a stranger's code would leave its mark in."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(whole, tmp_path / "model")


def change(folder, file="config.json", **words):
    config = json.loads((folder / file).read_text()) | words
    (folder / file).write_text(json.dumps(config))


def drop(folder, name):
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if name not in key}, folder / "model.safetensors", metadata={"format": "pt"})


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_whole_directory_is_read_in_its_own_dtype(dtype, folder):
    micro_lm().to(dtype).save_pretrained(folder)
    model, tokenizer = load_directory(folder)
    assert model.dtype == dtype
    assert not model.training
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, micro_lm().to(dtype).model.layers[1].mlp.up_proj.weight)
    assert tokenizer("word1 said").input_ids


def test_shards_are_read_and_their_index_names_only_files_beside_it(folder):
    model = micro_lm()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="200KB")
    assert (folder / "model.safetensors.index.json").exists()
    assert torch.equal(load_directory(folder)[0].lm_head.weight, model.lm_head.weight)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    (folder / first).rename(folder.parent / first)
    with pytest.raises(ValueError, match=f"lacks {first}, which model.safetensors.index.json names"):
        load_directory(folder)
    index["weight_map"] = {name: f"../{file}" for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="has no weight_map of file names"):
        load_directory(folder)


BROKEN = {
    "no folder": (lambda f: shutil.rmtree(f), "is no model directory"),
    "cut weights": (lambda f: cut(f / "model.safetensors"), r"model.safetensors is no whole safetensors file"),
    "foreign weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x04pickle" * 50), "is no whole safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights as safetensors"),
    "pickled weights": (
        lambda f: ((f / "model.safetensors").unlink(), torch.save(micro_lm().state_dict(), f / "pytorch_model.bin")),
        "has no weights as safetensors",
    ),
    "other weights": (
        lambda f: save_file({"a": torch.ones(3)}, f / "model.safetensors", metadata={"format": "pt"}),
        "of no; expected the config",
    ),
    "a layer gone": (lambda f: drop(f, "layers.3."), "names 4 layers and the weights are of 3"),
    "a weight gone": (lambda f: drop(f, "layers.2.mlp.up_proj"), r"the weights lack model.layers.2.mlp.up_proj.weight"),
    "cut config": (lambda f: cut(f / "config.json"), "config.json is not JSON"),
    "config of a list": (lambda f: (f / "config.json").write_text("[1]"), "holds a list; expected an object"),
    "config of bad bytes": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json"),
    "config is a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "is no model directory"),
    "cut tokenizer": (lambda f: cut(f / "tokenizer.json"), "its tokenizer cannot be read"),
    "cut tokenizer config": (lambda f: cut(f / "tokenizer_config.json"), "tokenizer_config.json is not JSON"),
    "a billion layers": (lambda f: change(f, num_hidden_layers=10**9), r"num_hidden_layers is 1e\+09, and there are \d+ weights"),
    "a billion layers within": (lambda f: change(f, text_config={"n_layer": 10**9}), r"n_layer is 1e\+09"),
    "fewer layers than weights": (lambda f: change(f, num_hidden_layers=2), "names 2 layers and the weights are of 4"),
    "hidden size -1": (lambda f: change(f, hidden_size=-1), "config.json|does not hold together"),
    "hidden size x": (lambda f: change(f, hidden_size="x"), "config.json cannot be used"),
    "hidden size of a planet": (lambda f: change(f, hidden_size=99999999999999), "does not hold together|cannot be used"),
    "no heads": (lambda f: change(f, num_attention_heads=0), "cannot be used|does not hold together"),
    "model type 5": (lambda f: change(f, model_type=5), "model_type is 5; expected a word"),
    "model type unknown": (lambda f: change(f, model_type="llamas"), "model_type 'llamas' is none that transformers knows"),
    "quantised": (lambda f: change(f, quantization_config={"quant_method": "bitsandbytes"}), "holds quantised weights"),
    "an adapter beside": (lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "/x"}'), "holds an adapter"),
    "code of its own": (
        lambda f: ((f / "evil.py").write_text(EVIL), change(f, auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"})),
        r"asks for Python code of its own \(auto_map\)",
    ),
    "a tokenizer with code": (
        lambda f: ((f / "evil.py").write_text(EVIL), change(f, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})),
        r"tokenizer_config.json asks for Python code",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_named_in_one_line_and_never_run(kind, folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    breaking, message = BROKEN[kind]
    breaking(folder)
    with pytest.raises(ValueError, match=message) as told:
        load_directory(folder)
    assert "\n" not in str(told.value)
    assert not list(folder.parent.rglob("RAN"))


def test_code_of_a_type_that_looks_like_ours_is_not_run_either(folder):
    (folder / "evil.py").write_text(EVIL)
    change(folder, model_type="fewer_llama", auto_map={"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"})
    model, _ = load_directory(folder)  # our own class, whatever the directory names
    assert type(model).__module__.startswith("fewer.")
    assert not list(folder.parent.rglob("RAN"))


ODD = st.one_of(
    st.sampled_from([None, -1, 0, 1, 3, 10**9, 10**30, 2.5, float("nan"), "x", "", True, [], [1, 2], {}, {"rope_type": "yarn"}]),
    st.integers(-(2**70), 2**70),
    st.text(max_size=4),
)
KEYS = [*micro_lm().config.to_dict(), "num_layers", "n_layer", "dtype", "torch_dtype", "layer_types", "text_config", "attn_implementation"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), ODD, min_size=1, max_size=2))
def test_odd_values_in_a_config_give_a_model_that_runs_or_one_line(folder, words):
    before, model, told = (folder / "config.json").read_text(), None, "config.json"
    try:
        change(folder, **words)
        model, _ = load_directory(folder)
    except ValueError as refusal:
        told = str(refusal)
    finally:
        (folder / "config.json").write_text(before)
    assert "config.json" in told or str(folder) in told
    assert "\n" not in told
    if model is not None:
        with torch.no_grad():
            assert model(torch.ones(1, 3, dtype=torch.long), use_cache=False).logits.shape[:2] == (1, 3)
