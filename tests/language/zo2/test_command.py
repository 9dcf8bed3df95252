"""The verbs: a directory in, a directory out, and the journal that makes it again."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from zo2_models import make

from fewer.language.zo2.command import app


@pytest.fixture
def base(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make().save_pretrained(tmp_path / "base")
    tokenizer = Tokenizer(models.WordLevel({chr(97 + letter): letter for letter in range(26)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "base")
    (tmp_path / "notes.txt").write_text("the quick brown fox jumps over the lazy dog " * 4)
    return tmp_path


def fewer_zo2(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_train_and_replay(base):
    words = ("--text", base / "notes.txt", "--steps", 4, "--lr", "1e-3", "--batch", 2, "--window", 16)
    told = json.loads(fewer_zo2("train", base / "base", base / "out", *words, "--json"))
    assert (told["steps"], len(told["losses"]), told["lost_updates"]) == (4, 4, None)
    assert not (base / "out.blocks").exists(), "its own blocks are gone"
    assert "written to" in fewer_zo2("replay", base / "base", base / "out" / "journal.json", base / "again")
    for file in (base / "out").glob("*.safetensors"):
        assert (base / "again" / file.name).read_bytes() == file.read_bytes()
    assert AutoModelForCausalLM.from_pretrained(base / "out", local_files_only=True).config.num_hidden_layers == 2
    assert (base / "out" / "tokenizer.json").exists()


def test_a_run_goes_on_from_its_store(base):
    words = ("--text", base / "notes.txt", "--lr", "1e-3", "--batch", 2, "--window", 16, "--store-dir", base / "blocks")
    fewer_zo2("train", base / "base", base / "half", "--steps", 2, *words)
    text = fewer_zo2("train", base / "base", base / "whole", "--steps", 4, "--resume", *words)
    assert "4 steps" in text
    shutil.rmtree(base / "blocks")
    fewer_zo2("train", base / "base", base / "once", "--steps", 4, *words)
    for file in (base / "once").glob("*.safetensors"):
        assert (base / "whole" / file.name).read_bytes() == file.read_bytes()
