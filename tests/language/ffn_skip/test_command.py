"""FFN-SkipLLM's verbs, and what its study and bench are made of."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from skip_models import planted, settings, text, written
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from fewer.errors import UserError
from fewer.language._shared.prenorm import decode_bound
from fewer.language._shared.timing import wide_llama
from fewer.language._shared.token_rows import repeating
from fewer.language._shared.trained import Trained
from fewer.language.ffn_skip import FFNSkipConfig, calibrate, ffn_skip, teacher_forced
from fewer.language.ffn_skip.bench import without
from fewer.language.ffn_skip.problems import THREE_OF_EIGHT, decoding, read_texts, way_of, write_on
from fewer.language.ffn_skip.study import EFFORT, OWN, QUARTER, Task, against, study
from fewer.study import Results, Scale, Trial
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, TrialSpec
from fewer.tasks import fetch_small_lm, micro_lm
from fewer.tasks.language_corpus import is_validation

TEXT = "The council meets on the first Monday of every month. Its minutes are kept by the clerk. " * 200


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model directory with its tokenizer; random weights."""
    folder, library = tmp_path_factory.mktemp("model"), Path(sysconfig.get_path("stdlib"))
    held_out = next(file.name for file in sorted(library.glob("*.py")) if is_validation(file.name))
    texts = [str(library / name) for name in ("argparse.py", "ast.py", "calendar.py", held_out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWER_CACHE", str(folder / "cache"))
        shutil.copytree(fetch_small_lm("family-micro", text=texts), folder / "lm")
    return folder / "lm"


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "notes.txt").write_text(TEXT)
    return tmp_path / "notes.txt"


SMALL = ("--windows", "4", "--window", "48", "--tokens", "32", "--target", "0.2")


def test_a_model_is_calibrated_and_writes_with_what_was_found(fewer, directory, notes, tmp_path):
    told = json.loads(
        fewer("skip", "calibrate", str(directory), "--text", str(notes), "--out", "skip.json", *SMALL, "--warmup", "4", "--json").stdout
    )
    config = FFNSkipConfig.load(tmp_path / "skip.json")
    assert told["achieved_ratio"] >= 0.2
    assert len(told["similarity"]) == config.num_layers == 4
    assert (config.threshold, config.warmup_tokens) == (told["threshold"], 4)
    words = ("generate", str(directory), "--prompt", "The council", "--tokens", "20")
    found = json.loads(fewer(*words, "--skip", "skip.json", "--json").stdout)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory).eval(), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("The council", return_tensors="pt").input_ids
    with ffn_skip(model, config) as stats:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert found["completion"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    assert found["skipped"] == stats.ratio > 0
    assert found["skipped_of_all"] == stats.ratio_all
    plain = fewer(*words)
    assert plain.stdout.startswith("The council")
    assert "20 tokens in" in plain.stderr
    assert "left out" not in plain.stderr
    said = fewer(*words, "--skip", "skip.json", "--sample", "--seed", "3", "--temperature", "2").stderr
    assert "of the feed-forward blocks left out after the warm-up" in said


def test_calibration_says_what_it_found_and_replaces_nothing_untold(fewer, directory, notes, tmp_path):
    words = ("skip", "calibrate", str(directory), "--text", str(notes), "--out", "skip.json", *SMALL)
    said = fewer(*words).stdout
    assert "similarity by layer: " in said
    assert "written to skip.json" in said
    before = (tmp_path / "skip.json").read_bytes()
    assert "--overwrite" in fewer(*words, status=2).stderr
    assert (tmp_path / "skip.json").read_bytes() == before
    fewer(*words, "--overwrite", "--seed", "1")
    assert "which is read here" in fewer(*words, "--out", "notes.txt", "--overwrite", status=2).stderr
    assert notes.read_text() == TEXT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("skip", "calibrate", "DIR", "--text", "notes.txt", "--out", "s.json", "--window", "48", "--target", "0.9"), "cannot be reached"),
        (
            ("skip", "calibrate", "DIR", "--text", "notes.txt", "--out", "s.json", "--window", "99999"),
            "expected at least 99999, one window",
        ),
        (("skip", "calibrate", "DIR", "--text", "none.txt", "--out", "s.json"), "none.txt is no file"),
        (("skip", "calibrate", "notes.txt", "--text", "notes.txt", "--out", "s.json"), "is no model directory"),
        (("generate", "DIR", "--prompt", "x", "--skip", "notes.txt"), "notes.txt is not JSON"),
        (("generate", "DIR", "--prompt", "x", "--skip", "other.json"), "the settings are for 9 layers and the model has 4"),
        (("generate", "DIR", "--prompt", ""), "--prompt is empty"),
        (("generate", "absent", "--prompt", "x"), "absent is no model directory"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line_and_nothing_is_written(fewer, directory, notes, tmp_path, words, message):
    settings(num_layers=9).save(tmp_path / "other.json")
    before = sorted(tmp_path.iterdir())
    done = fewer(*(str(directory) if word == "DIR" else word for word in words), status=2)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


# Study and bench


def test_the_ways_leave_out_as_many_blocks_of_the_same_window():
    model, ids = planted(), text(4, 60)
    config, report = calibrate(model, ids, 0.3, tokens=48)
    window = range(config.cold_start, config.cold_end)
    for mode, rank in (("static", report.similarity), ("layers", -report.influence), ("random", None)):
        way = way_of(mode, config, report, 2 / 6, seed=7)
        _, stats = teacher_forced(model, ids, way, 12)
        assert stats.ratio == pytest.approx(2 / 6, abs=0.03 if mode == "random" else 1e-12)
        assert (way.cold_start, way.cold_end) == (config.cold_start, config.cold_end)
        if rank is not None:
            others = [layer for layer in window if layer not in way.static_layers]
            assert min(rank[layer] for layer in way.static_layers) >= max(rank[layer] for layer in others)
    assert way_of("adaptive", config, report, 2 / 6, 0) == config


def test_texts_are_judged_after_the_warm_up():
    model, texts, config = planted(), text(3, 192), settings(warmup_tokens=25)
    read = read_texts(model, texts, config, batch=2)
    logits, stats = teacher_forced(model, texts, config, 89)
    judged = logits[:, 89:191].flatten(0, 1)
    assert read.loss == pytest.approx(F.cross_entropy(judged, texts[:, 90:].flatten()).item(), rel=1e-5)
    assert read.accuracy == (judged.argmax(1) == texts[:, 90:].flatten()).double().mean().item()
    assert (read.stats.ratio, read.stats.tokens) == (stats.ratio, stats.tokens) == (stats.ratio, 3 * 103)
    assert read_texts(model, texts, FFNSkipConfig.off()).agreement == 1


def test_writing_goes_on_from_the_prompt():
    model, texts = planted(), text(2, 70)
    out, stats = write_on(model, texts, settings(warmup_tokens=25), 30)
    assert (stats.decoded_tokens, stats.tokens) == (2 * 29, 2 * 4)
    with ffn_skip(model, settings(warmup_tokens=25)):
        assert torch.equal(out, written(model, texts[:, :64], 30)[0][:, 64 + 25 :])
    assert repeating(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9] * 2, list(range(18))])) == 0.5


def test_the_bound_is_that_of_the_weights_read():
    with torch.device("meta"):
        wide = wide_llama(8)
    assert sum(p.numel() * 4 for p in wide.parameters()) == pytest.approx(1.6e9, rel=0.05)
    assert decode_bound(wide, 3 / 8) == pytest.approx(1.33, abs=0.005)
    model = micro_lm()
    read = sum(p.numel() for layer in model.model.layers for p in layer.parameters()) + 2048 * 64
    assert decode_bound(model, 0.5) == pytest.approx(1 / (1 - 2 * 3 * 64 * 128 / read))


def test_what_is_timed_decodes_and_skips():
    model, passes = micro_lm(), []
    model.model.register_forward_hook(lambda _, args, output: passes.append(output.last_hidden_state.shape[:2]))
    skipping, plain = decoding(model, 3, FFNSkipConfig(1, 4, threshold=-1.0, warmup_tokens=0)), decoding(model, 3)
    assert [skipping().ratio, skipping().ratio] == [0.5, 0.5]
    assert plain() is None
    assert [shape for shape in passes if shape != (1, 1)] == [(1, 2)] * 3, "two prompts, and a look at the structure"
    assert passes.count((1, 1)) == 9
    _, stats = teacher_forced(planted(), text(1, 9), dataclasses.replace(THREE_OF_EIGHT, cold_end=5), 0)
    assert stats.per_layer == [0, 0, 0, 9, 9, 0]


def test_a_model_without_layers_is_that_of_their_states_passed_on():
    model, ids = planted(), text(2, 10)
    shorter = without(model, [2, 3])
    _, stats = teacher_forced(model, ids, settings(mode="layers", static_layers=(2, 3)), 0)
    mine = teacher_forced(model, ids, settings(mode="layers", static_layers=(2, 3)), 0)[0]
    with torch.no_grad():
        assert torch.allclose(shorter(ids, use_cache=False).logits, mine, atol=1e-5)
        out = shorter.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert [layer.keys.shape[-2] for layer in out.cache.layers] == [13] * 4
    assert len(model.model.layers) == 6
    assert stats.ratio == 2 / 6


def test_rivals_are_compared_at_as_many_blocks_skipped():
    """Between the rival's shares on the line between its losses."""
    losses = {0.125: 1.1, 0.25: 1.4, 0.375: 2.0}
    rows = [Row("static", seed, "loss", {"skipped": share}, loss + seed) for share, loss in losses.items() for seed in (0, 1)]
    rows += [Row("static", seed, "ratio", {"skipped": share}, share) for share in losses for seed in (0, 1)]
    rows += [Row("full", seed, figure, QUARTER, value) for seed in (0, 1) for figure, value in (("loss", 1.0 + seed), ("ratio", 0.0))]
    rows += [Row("ffn-skip", seed, "loss", QUARTER, 1.15 + seed) for seed in (0, 1)]
    rows += [Row("ffn-skip", 0, "ratio", QUARTER, 0.1875), Row("ffn-skip", 1, "ratio", QUARTER, 0.0625)]
    difference = against(Results(rows, list(study.arms)), "static")
    assert difference.per_seed.tolist() == pytest.approx([1.15 - 1.25, 1.15 - 1.05])


def test_a_model_of_the_users_own_that_cannot_skip_is_told_in_one_line(directory, notes, tmp_path):
    shallow = planted()
    shallow.model.layers, shallow.config.num_hidden_layers = shallow.model.layers[:2], 2
    shallow.save_pretrained(tmp_path / "shallow")
    AutoTokenizer.from_pretrained(directory).save_pretrained(tmp_path / "shallow")
    options = study.choose_options({"model": str(tmp_path / "shallow"), "text": str(notes)})
    with pytest.raises(UserError, match=r"--set model=.*the model has 2 layers; expected at least 3"):
        study.build_task(Scale.QUICK, options)


@pytest.mark.parametrize("arm", ["full", "ffn-skip", "variants"])
def test_every_arm_logs_what_the_claims_ask(directory, arm, monkeypatch):
    monkeypatch.setattr("fewer.language.ffn_skip.study.PROMPTS", 2)
    tokens = text(1, 2000)[0]
    given = Trained(directory, tokens, tokens, "a model of random weights")
    events = []
    trial = Trial(TrialSpec("m", "ffn-skip", arm, 0, Scale.QUICK, study.choose_options({})), events.append)
    study.arms[arm].run(Task(given, given.model("cpu"), tokens, 1, 6, 400), trial)
    figures = {(event.name, *event.coordinates.values()) for event in events if isinstance(event, FigureEvent)}
    values = [event.value for event in events if isinstance(event, FigureEvent)]
    assert all(value is not None and math.isfinite(value) for value in values)
    if arm == "variants":
        assert {name for name, *_ in figures} == {"variant_loss", "variant_ratio"}
    else:
        assert {("loss", share) for share in (0.125, 0.25, 0.375)} | {("repeating", 0.25), ("writing_seconds", 0.25)} <= figures


def test_the_users_own_model_takes_fewer_passes_and_the_houses_as_many_as_before(directory, notes):
    assert EFFORT == {Scale.QUICK: (8, 30, 8_000), Scale.FULL: (128, 30, 200_000)}
    assert OWN[0] * (OWN[1] + 2) <= 8 * 32 / 3
    given = {"model": str(directory), "text": str(notes)}
    own, more = (study.build_task(Scale.QUICK, study.choose_options(given | words)) for words in ({}, {"held_out": "8000"}))
    full = study.build_task(Scale.FULL, study.choose_options(given))
    assert (own.passages, own.steps, own.judged) == OWN
    assert (full.passages, full.steps, full.judged) == EFFORT[Scale.FULL]
    trial = Trial(TrialSpec("m", "ffn-skip", "full", 0, Scale.QUICK, study.choose_options({})), [].append)
    assert [len(each.texts(trial)) for each in (own, more)] == [16, 41]
    assert len(own.windows(trial)) == 4
