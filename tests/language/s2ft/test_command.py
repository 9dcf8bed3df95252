"""S2FT's command line, its study's and bench's parts, and the questions that they teach."""

from __future__ import annotations

import json
import re
import shutil
import sysconfig
from pathlib import Path

import click
import peft
import pytest
import torch
from s2ft_models import logits, make
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.main import get_command

from fewer.errors import UserError
from fewer.inputs import read_pairs
from fewer.language._shared.questions import answer_loss, draw_sums, encode, judge
from fewer.language.s2ft import bench, command
from fewer.language.s2ft.command import merge, to_lora, train
from fewer.language.s2ft.study import Task, study
from fewer.study import Scale, Trial
from fewer.study.trial import FigureEvent, ObjectiveEvent, TrialSpec
from fewer.tasks import fetch_small_lm
from fewer.tasks.language_corpus import is_validation

TEXT = "The council meets on the first Monday of every month. Its minutes are kept by the clerk. " * 40
SMALL = {"steps": 8, "batch": 4, "window": 24, "d_ratio": 0.1, "lr": 3e-2}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model directory with its tokenizer; random weights."""
    folder, library = tmp_path_factory.mktemp("model"), Path(sysconfig.get_path("stdlib"))
    held_out = next(file.name for file in sorted(library.glob("*.py")) if is_validation(file.name))
    texts = [str(library / name) for name in ("argparse.py", "ast.py", "typing.py", "calendar.py", "inspect.py", held_out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWER_CACHE", str(folder / "cache"))
        shutil.copytree(fetch_small_lm("family-micro", text=texts), folder / "lm")
    return folder / "lm"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


@pytest.fixture
def examples(tmp_path):
    rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(4) for b in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


def test_a_model_is_trained_merged_and_exported(fewer, directory, text, tmp_path):
    said = fewer(
        *("s2ft", "train", str(directory), "adapter", "--text", str(text), "--steps", "8", "--batch", "4"),
        *("--window", "24", "--lr", "0.03", "--o-ratio", "0.1", "--json"),
    ).stdout
    told = json.loads(said)
    assert told["losses"][-1] < told["losses"][0] - 0.1
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {".fewer.json", "adapter_config.json", "adapter_model.safetensors"}
    merge(directory, tmp_path / "adapter", tmp_path / "merged")
    to_lora(tmp_path / "adapter", tmp_path / "lora")
    ids = torch.arange(10)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(directory)
    assert not torch.allclose(logits(merged, ids), logits(base, ids), atol=1e-3)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(base, tmp_path / "lora"), ids), logits(merged, ids), atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("x") == AutoTokenizer.from_pretrained(directory).encode("x")
    with pytest.raises(ValueError, match="merged already needs no second merge"):
        merge(tmp_path / "merged", tmp_path / "adapter", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_examples_are_trained_on_their_completions(directory, examples, tmp_path, capsys):
    train(directory, tmp_path / "adapter", jsonl=examples, **SMALL)
    said = capsys.readouterr().out
    assert "step 8 of 8" in said
    assert "parameters trained; loss" in said


def test_directories_are_replaced_only_when_told(directory, text, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    words = SMALL | {"steps": 1}
    with pytest.raises(FileExistsError, match="is not empty; expected a new directory"):
        train(directory, out, text=[text], **words)
    train(directory, tmp_path / "adapter", text=[text], **words)
    for refused in (lambda: merge(directory, tmp_path / "adapter", out), lambda: to_lora(tmp_path / "adapter", out)):
        with pytest.raises(FileExistsError):
            refused()
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(FileExistsError, match="holds thesis.txt, which fewer did not write there"):
        train(directory, out, text=[text], **words, overwrite=True)
    train(directory, tmp_path / "adapter", text=[text], **words, overwrite=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "expected either --text .* or --jsonl"),
        ({"text": ["text.txt"], "jsonl": "rows.jsonl"}, "expected either --text .* or --jsonl"),
        ({"text": ["text.txt"], "window": 99999}, "tokens; expected at least 99999, one window"),
        ({"text": ["text.txt"], "steps": 0}, "--steps is 0"),
        ({"text": ["text.txt"], "d_ratio": 2.0}, "d_ratio is 2.0"),
        ({"jsonl": "torn.jsonl"}, 'torn.jsonl, line 1: expected {"prompt": "...", "completion": "..."}'),
        ({"jsonl": "empty.jsonl"}, "holds no examples"),
        ({"jsonl": "rows.jsonl", "window": 2}, "the prompts alone fill --window 2"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_and_leaves_nothing(directory, text, examples, tmp_path, words, message):
    (tmp_path / "torn.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    given = SMALL | words
    given["text"] = [tmp_path / file for file in given["text"]] if "text" in given else None
    given["jsonl"] = tmp_path / given["jsonl"] if "jsonl" in given else None
    with pytest.raises((ValueError, UserError), match=message):
        train(directory, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--lr", "inf"),
        ("--lr", "0"),
        ("--lr", "nan"),
        ("--seed", str(10**30)),
        ("--seed", "-1"),
        ("--window", "0"),
        ("--batch", "-1"),
        ("--steps", "0"),
        ("--d-ratio", "1.5"),
        ("--device", "nope"),
    ],
)
def test_numbers_and_words_have_their_limits_where_they_are_declared(directory, text, tmp_path, option, value):
    words = ["train", directory, tmp_path / "out", "--text", text, "--window", 24, option, value]
    with pytest.raises((click.UsageError, ValueError), match=re.escape(value.removeprefix("-")) + "|nan"):
        get_command(command.app)([str(word) for word in words], standalone_mode=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [None, ["a"], float("nan"), 5, ""])
@pytest.mark.parametrize("name", ["prompt", "completion"])
def test_examples_that_are_no_texts_are_refused_by_their_line(directory, tmp_path, name, value):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"} | {name: value}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=rf"rows.jsonl, line 2: its {name} is .*; expected a text"):
        train(directory, tmp_path / "out", jsonl=tmp_path / "rows.jsonl", **SMALL)


@pytest.mark.parametrize("option", ["text", "jsonl"])
@pytest.mark.parametrize("kind", ["bad bytes", "a folder", "absent"])
def test_files_that_cannot_be_read_are_named(directory, tmp_path, option, kind):
    file = tmp_path / "given"
    if kind == "bad bytes":
        file.write_bytes(b"\xff\xfe\x00")
    elif kind == "a folder":
        file.mkdir()
    with pytest.raises((ValueError, OSError, UserError), match=r"given .*(UTF-8|a folder|no file)"):
        train(directory, tmp_path / "out", **SMALL, **{option: [file] if option == "text" else file})


def test_examples_without_room_are_left_out_and_told(directory, tmp_path, capsys):
    rows = [{"prompt": "word " * 60, "completion": " x"}] + [{"prompt": "a", "completion": " b"}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(directory, tmp_path / "out", jsonl=tmp_path / "rows.jsonl", **SMALL)
    assert "1 of 4 examples are left out: their prompts alone fill --window 24" in capsys.readouterr().err


def test_mistakes_are_told_in_one_line(fewer, text):
    done = fewer("s2ft", "train", "nowhere", "out", "--text", str(text), status=2)
    assert done.stderr.startswith("error: nowhere is no model directory")
    assert done.stderr.count("\n") == 1
    assert "merge" in fewer("s2ft", "--help").stdout


# Questions


@pytest.fixture(scope="module")
def tokenizer(directory):
    return AutoTokenizer.from_pretrained(directory)


def test_held_out_sums_are_never_trained_on():
    held = draw_sums(50, 2, seed=1)
    drawn = draw_sums(400, 2, seed=1, but=held)
    assert not set(drawn) & set(held)
    assert len(set(drawn)) == 400
    assert all(eval(q.removeprefix("What is ").replace("plus", "+").rstrip("?")) == int(a) for q, a in drawn)


def test_one_pass_judges_as_greedy_decoding_does(directory, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    pairs = draw_sums(6, 2, seed=0)
    answers = []
    for asked, _ in pairs[:3]:  # what the model writes by itself is right by definition
        ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt").input_ids
        words = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        answers.append((ids[0].tolist(), model.generate(ids, attention_mask=torch.ones_like(ids), **words)[0, ids.shape[1] :].tolist()))
    problems = encode(tokenizer, pairs)
    for row, (asked, written) in enumerate(answers):
        problems.ids[row], problems.labels[row] = tokenizer.eos_token_id, -100
        whole = torch.tensor(asked + written)
        problems.ids[row, : len(whole)] = whole
        problems.labels[row, len(asked) : len(whole)] = whole[len(asked) :]
    accuracy, loss = judge(model, problems, batch=4)
    assert accuracy == pytest.approx(3 / 6)
    with torch.no_grad():
        whole = model(input_ids=problems.ids, labels=problems.labels).loss.item()
        assert answer_loss(model, problems).item() == pytest.approx(whole, rel=1e-4)
    assert loss == pytest.approx(whole, rel=1e-4)


def test_pairs_are_read_line_by_line(examples):
    assert read_pairs(examples)[1] == ("0 + 1 =", " 1")


# Study and bench


@pytest.fixture(scope="module")
def logged(directory, tokenizer):
    """What each arm says of a short run on a small model."""
    sums = draw_sums(12, 2, seed=5)
    text = torch.randint(3, 2000, (800,), generator=torch.Generator().manual_seed(0))
    task = Task(directory, tokenizer, None, sums[:4], {"same": sums[4:8], "longer": sums[8:]}, text, Scale.QUICK)
    events = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("fewer.language.s2ft.study", fromlist=["STEPS"]).STEPS, Scale.QUICK, 3)
        for name, arm in study.arms.items():
            for seed, tuning in ((0, False), (1, False), (0, True)):
                settings = arm.defaults(Scale.QUICK, {})
                spec = TrialSpec("study", study.slug, name, seed, Scale.QUICK, settings, tuning=tuning)
                arm.run(task, Trial(spec, events.setdefault((name, seed, tuning), []).append))
    return events


def names_in(events):
    return {event.name for event in events if isinstance(event, FigureEvent)}


def test_every_arm_logs_the_figures_that_tables_and_claims_ask_for(logged):
    costs = {"bytes", "optimizer_bytes", "peak_memory", "cpu_seconds", "parameters"}
    quality = {"accuracy", "accuracy_longer", "loss", "forgetting", "forgetting_at", "training_loss"}
    for name in study.arms:
        assert costs | quality <= names_in(logged[name, 0, False])
        assert ("step_ratio" in names_in(logged[name, 0, False])) == (name == "s2ft")
        assert ("merge_seconds" in names_in(logged[name, 0, False])) == (name != "full")
        assert names_in(logged[name, 1, False]) == (set() if name == "s2ft-heads" else quality)
        told = [event for event in logged[name, 0, True] if isinstance(event, ObjectiveEvent)]
        assert len(told) == 1
        assert not names_in(logged[name, 0, True])


def test_a_second_rate_makes_the_front(logged):
    for name in ("s2ft", "lora"):
        rates = {
            event.coordinates["lr"] for event in logged[name, 0, False] if isinstance(event, FigureEvent) and "lr" in event.coordinates
        }
        assert len(rates) == 2


def test_the_races_train_as_many_parameters():
    counts = []
    for model in (bench._s2ft(5), bench._lora(5)):
        counts.append(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
    assert counts[0] == counts[1]
    assert all(module.p == 0 for name, module in bench._lora(1).named_modules() if "dropout" in name and hasattr(module, "p"))
    assert command.COMMANDS["s2ft"] is command.app
    assert make().config.num_hidden_layers == 3
