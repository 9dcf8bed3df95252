"""What CFSP leaves on disk, how it recovers, and its command line."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from fewer.errors import UserError
from fewer.language._shared.feed_forward import decoder_layers, width_of
from fewer.language._shared.lora import adapted
from fewer.language.cfsp import calibrate, lora_ranks, prune, recover, save_pruned
from fewer.language.cfsp.command import prune as prune_verb
from fewer.language.cfsp.recovery import peft_config
from fewer.tasks import fetch_small_lm, micro_lm
from fewer.tasks.language_corpus import is_validation

IDS = torch.randint(1, 2048, (4, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def pruned():
    model = micro_lm()
    report = prune(model, calibrate(model, [IDS]), 0.5, multiple_of=16)
    assert len(set(report.widths)) > 1
    return model, report


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def greedy(model):
    return model.generate(IDS[:1, :8], max_new_tokens=12, do_sample=False, pad_token_id=0).tolist()


def test_a_directory_of_own_widths_is_loaded_with_this_library(pruned, tmp_path):
    model, report = pruned
    folder = save_pruned(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert [width_of(layer) for layer in decoder_layers(loaded)] == report.widths == loaded.config.intermediate_size
    assert torch.equal(logits(loaded), logits(model))
    assert greedy(loaded) == greedy(model)
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters
    stored = (folder / "model.safetensors").stat().st_size
    assert 4 * report.parameters < stored < 4 * report.parameters + 10_000
    again = save_pruned(loaded, tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(again)), logits(model))


def test_a_directory_of_own_widths_is_loaded_without_this_library(pruned, tmp_path):
    model, report = pruned
    save_pruned(model, tmp_path / "out")
    code = f"""
import sys, json
sys.modules["fewer"] = None
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
tokens = model.generate(torch.tensor({IDS[:1, :8].tolist()}), max_new_tokens=12, do_sample=False, pad_token_id=0).tolist()
print(json.dumps([[layer.mlp.down_proj.in_features for layer in model.model.layers], tokens]))
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [report.widths, greedy(model)]


def test_a_padded_directory_is_a_plain_llama_with_the_same_logits(pruned, tmp_path):
    model, report = pruned
    folder = save_pruned(model, tmp_path / "out", export="padded")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["intermediate_size"]) == ("llama", max(report.widths))
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is LlamaForCausalLM
    assert torch.allclose(logits(loaded), logits(model), atol=1e-6)


def test_equal_widths_make_a_plain_llama(tmp_path):
    model = micro_lm()
    prune(model, calibrate(model, [IDS]), 0.5, global_metric="none", multiple_of=16)
    folder = save_pruned(model, tmp_path / "out")
    assert not (folder / "modeling_fewer.py").exists()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is LlamaForCausalLM
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_trainer_trains_a_pruned_model(pruned, tmp_path):
    save_pruned(pruned[0], tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    words = TrainingArguments(
        str(tmp_path / "trained"),
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=words, train_dataset=rows)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "trained"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "trained").config.intermediate_size == pruned[1].widths


def test_a_directory_with_something_in_it_is_left_alone(pruned, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; expected a new directory"):
        save_pruned(pruned[0], out)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "thesis.txt"]
    with pytest.raises(FileExistsError, match=r"holds thesis.txt, which fewer did not write there"):
        save_pruned(pruned[0], out, overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"
    save_pruned(pruned[0], tmp_path / "ours")
    save_pruned(pruned[0], tmp_path / "ours", overwrite=True)


def test_a_failed_write_leaves_nothing_behind(pruned, tmp_path, monkeypatch):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save_pruned(pruned[0], tmp_path / "out", Broken())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ig", ["importance", "inverse", "uniform"])
@pytest.mark.parametrize("r_mean", [1, 3, 8])
def test_ranks_share_out_the_whole_budget(ig, r_mean):
    scores = np.random.default_rng(r_mean).uniform(0.01, 1, size=9)
    ranks = lora_ranks(scores, r_mean, ig)
    assert sum(ranks) == 9 * r_mean
    assert min(ranks) >= 1
    order = np.argsort(scores)
    steps = np.diff(np.array(ranks)[order])
    assert (steps >= 0).all() if ig == "importance" else (steps <= 0).all()


def test_the_merged_model_is_the_one_with_adapters(pruned):
    model, report = pruned
    names = [name for name, _ in model.named_parameters()]
    model.model.embed_tokens.weight.requires_grad_(False)
    for seed in (0, 1):  # a second time too: the first leaves nothing behind
        before = logits(model)
        with adapted(model, peft_config(report.scores, 4), seed) as wrapped:
            trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
            assert len(trainable) == 2 * 7 * 4
            assert all("lora_" in name for name in trainable)
            for name, parameter in trainable.items():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
            with_adapters = logits(wrapped.eval())
        assert torch.allclose(logits(model), with_adapters, atol=1e-5)
        assert not torch.allclose(before, with_adapters, atol=1e-2)
        assert [name for name, _ in model.named_parameters()] == names
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]


def test_recovery_lowers_the_loss_and_changes_no_shape(pruned):
    model, report = pruned
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    text = torch.arange(400) % 37 + 1
    losses = recover(model, text, 30, scores=report.scores, lr=5e-3, batch=4, window=32)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert not model.training
    torch.manual_seed(12345)  # dropout is drawn from the seed that was given
    again = micro_lm()
    prune(again, calibrate(again, [IDS]), 0.5, multiple_of=16)
    assert recover(again, text, 30, scores=report.scores, lr=5e-3, batch=4, window=32) == losses


def test_pefts_config_gives_the_same_ranks(pruned):
    import peft

    model, report = pruned
    wrapped = peft.get_peft_model(model, peft_config(report.scores))
    found = [wrapped.get_submodule(f"base_model.model.model.layers.{number}.mlp.down_proj") for number in range(4)]
    ranks = lora_ranks(report.scores)
    assert [each.r["default"] for each in found] == ranks
    assert [each.scaling["default"] for each in found] == [2.0] * 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"window": 999}, "400 tokens; expected at least 999"),
        ({"ig": "none"}, "ig is 'none'"),
        ({"r_mean": 0}, "r_mean is 0"),
    ],
)
def test_recovery_refuses_what_cannot_be(pruned, words, message):
    model, report = pruned
    with pytest.raises(ValueError, match=message):
        recover(model, torch.arange(400), **{"steps": 1, "scores": report.scores} | words)


@pytest.fixture(scope="module")
def texts():
    folder = Path(sysconfig.get_path("stdlib"))
    held_out = next(file.name for file in sorted(folder.glob("*.py")) if is_validation(file.name))
    return [str(folder / name) for name in ("argparse.py", "ast.py", "typing.py", "calendar.py", "inspect.py", held_out)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory, texts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWER_CACHE", str(tmp_path_factory.mktemp("cache")))
        return fetch_small_lm("family-micro", text=texts)


SMALL = {"ratio": 0.5, "multiple_of": 16, "windows": 4, "window": 64}


def test_the_verb_prunes_a_directory(fewer, tmp_path, directory, texts):
    words = [word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    said = fewer("prune", str(directory), "out", *words, "--text", texts[0], "--recover-steps", "2", "--recover-batch", "1").stdout
    assert "256 of 512 channels" in said
    assert "recovery: loss" in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(width_of(layer) for layer in decoder_layers(model)) == 256
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_the_verb_replaces_a_directory_only_when_told(tmp_path, directory, texts, capsys):
    given = SMALL | {"text": [Path(texts[0])]}
    prune_verb(directory, tmp_path / "out", **given, export="uniform")
    with pytest.raises(FileExistsError, match="is not empty"):
        prune_verb(directory, tmp_path / "out", **given)
    capsys.readouterr()
    prune_verb(directory, tmp_path / "out", **given, overwrite=True, as_json=True)
    assert sum(json.loads(capsys.readouterr().out)["widths"]) == 256


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"ratio": 1.5}, "ratio is 1.5"),
        ({"window": 512, "text": ["short.txt"]}, "tokens; expected at least 512, one window"),
        ({"text": ["absent.txt"]}, "absent.txt"),
    ],
)
def test_the_verb_refuses_and_leaves_nothing(tmp_path, directory, texts, words, message):
    (tmp_path / "short.txt").write_text("x = 1\n")
    given = {"text": [Path(texts[0])], "ratio": 0.5, "multiple_of": 16, "window": 64} | words
    given["text"] = [tmp_path / file for file in given["text"]]
    with pytest.raises((ValueError, UserError), match=message):
        prune_verb(directory, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_the_verb_refuses_what_is_no_model_in_one_line(fewer, texts):
    done = fewer("prune", "nowhere", "out", "--text", texts[0], status=2)
    assert done.stderr.startswith("error: nowhere is no model directory")
    assert done.stderr.count("\n") == 1


def test_the_verb_refuses_a_model_that_is_pruned_already(pruned, tmp_path, texts):
    save_pruned(pruned[0], tmp_path / "pruned")
    with pytest.raises(ValueError, match="pruned already; expected the dense one"):
        prune_verb(tmp_path / "pruned", tmp_path / "out", text=[Path(texts[0])])
