"""The small language model: its corpus, its tokenizer, its training that goes on where it was, its cache."""

from __future__ import annotations

import dataclasses
import json
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fewer.data.made_once import is_whole
from fewer.errors import UserError
from fewer.tasks import fetch_small_lm, lm_training, load_small_lm, micro_lm, standard_library, text_corpus, token_loss
from fewer.tasks.language_corpus import END, VOCABULARY, is_validation, token_stream, train_tokenizer
from fewer.tasks.lm_training import Recipe, train, windows
from fewer.tasks.small_lm import PRESETS, lm_folder

SHORT = Recipe(steps=6, batch=2, window=16, lr=1e-2, warm_up=2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def texts():
    """Some real files, enough for 2,048 tokens and for both parts."""
    folder = Path(sysconfig.get_path("stdlib"))
    named = sorted(folder.glob("*.py"))
    return [*named[:12], next(file for file in named if is_validation(file.name))]


def test_the_corpus_is_the_library_without_its_tests_split_by_name():
    corpus = standard_library()
    names = [name for name, _ in corpus.train + corpus.validation]
    assert len(names) == len(set(names)) > 400
    assert not [name for name in names if {"test", "site-packages", "idle_test", "lib2to3"} & set(Path(name).parts[:-1])]
    assert all(is_validation(name) for name, _ in corpus.validation)
    assert not any(is_validation(name) for name, _ in corpus.train)
    assert 0.02 < len(corpus.validation) / len(names) < 0.1
    assert corpus.digest == standard_library().digest


def test_a_split_up_library_sends_the_user_to_text(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="holds 0.0 million characters.*--text"):
        standard_library(tmp_path)


def test_the_last_twentieth_of_a_single_file_is_held_out(tmp_path):
    (tmp_path / "one.txt").write_text("0123456789" * 10)
    corpus = text_corpus([tmp_path / "one.txt"])
    assert (len(corpus.train[0][1]), corpus.validation[0][1]) == (95, "56789")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "a.txt is no file; expected a text file"), (b"\xff\xfe", "is not UTF-8"), (b"", "nothing is left for training")],
)
def test_texts_that_are_none_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        text_corpus([tmp_path / "a.txt"])


def test_the_tokenizer_says_every_byte_again_and_separates_documents_by_token_zero(texts):
    corpus = text_corpus(texts)
    tokenizer = train_tokenizer(corpus)
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.eos_token) == (VOCABULARY, 0, 0, END)
    strange = "def f(x):\n\treturn 'ß☃\x00'  # Ωmega 한"
    assert tokenizer.decode(tokenizer(strange).input_ids) == strange
    stream = token_stream(tokenizer, corpus.validation)
    assert tokenizer.decode(stream[:-1]) == corpus.validation[0][1]
    assert stream[-1] == 0


def test_windows_are_runs_of_the_stream_and_the_same_for_the_same_step():
    tokens = torch.arange(100)
    batch = windows(tokens, SHORT, 3)
    assert batch.shape == (2, 16)
    assert torch.equal(batch - batch[:, :1], torch.arange(16).expand(2, 16))
    assert torch.equal(batch, windows(tokens, SHORT, 3))
    assert not torch.equal(batch, windows(tokens, SHORT, 4))


def test_training_broken_off_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(lm_training, "CHECKPOINT_EVERY", 4)
    tokens = torch.randint(VOCABULARY, (400,), generator=torch.Generator().manual_seed(0))
    recipe = dataclasses.replace(SHORT, steps=14)

    def stop(step: int, steps: int, words: str) -> None:
        if step > 10:
            raise KeyboardInterrupt

    whole, broken, taken_up = micro_lm(), micro_lm(), micro_lm()
    train(whole, tokens, recipe, tmp_path / "a", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        train(broken, tokens, recipe, tmp_path / "b", stop)
    assert [file.name for file in sorted((tmp_path / "b").iterdir())] == ["8.pt", "note.json"]
    about = train(taken_up, tokens, recipe, tmp_path / "b", lambda *_: None)
    assert [step for step, _ in about["loss_curve"]] == [0, 10, 13]
    assert about["loss_curve"][-1][1] < about["loss_curve"][0][1]
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, taken_up.state_dict()[name]), name


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine():
    recipe = Recipe()
    rates = [recipe.lr_at(step) for step in range(recipe.steps)]
    assert rates[24] == pytest.approx(recipe.lr / 2)
    assert max(rates) == rates[49] == recipe.lr
    assert rates[49 + 575] == pytest.approx(recipe.lr * 0.525, rel=1e-3)
    assert rates[-1] == pytest.approx(0.05 * recipe.lr)


def test_the_token_loss_is_the_mean_over_what_is_predicted():
    model, tokens = micro_lm(), torch.randint(VOCABULARY, (3 * 32 + 5,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(tokens[:96].reshape(3, 32)).logits
    by_hand = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:96].reshape(3, 32)[:, 1:].flatten())
    assert token_loss(model, tokens, window=32, batch=2) == pytest.approx(by_hand.item(), rel=1e-5)


def test_what_goes_in_names_the_folder(texts):
    corpus, preset = text_corpus(texts), PRESETS["family-s"]
    assert preset.recipe is not None
    folders = {
        lm_folder(preset, corpus, preset.recipe),
        lm_folder(preset, corpus, preset.recipe.of_length(30)),
        lm_folder(preset, text_corpus(texts[1:]), preset.recipe),
        lm_folder(PRESETS["family-micro"], corpus, None),
    }
    assert len(folders) == 4


def test_the_model_is_made_once_and_again_where_its_weights_are_not_those_written(texts, cache):
    told = []
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: fetch_small_lm("family-micro", text=texts, tell=lambda *words: told.append(words)), range(2))
    assert first == second
    assert is_whole(first)
    assert len(told) == 1
    assert [file.name for file in first.parent.iterdir() if file.name.endswith(".part")] == []
    loaded = load_small_lm("family-micro", text=texts)
    about = json.loads((first / "train.json").read_text())
    assert loaded.key.startswith("family-micro-")
    assert about["tokens"] == [len(loaded.train), len(loaded.validation)]
    assert token_loss(loaded.model, loaded.validation[:24_000]) == pytest.approx(about["validation_loss"], rel=1e-5)
    (first / "model.safetensors").write_bytes(b"something else")
    assert not is_whole(first)
    assert is_whole(fetch_small_lm("family-micro", text=texts))


@pytest.mark.parametrize(("words", "message"), [({"preset": "family-xl"}, "expected one of family-s"), ({"steps": 0}, "at least 1")])
def test_what_is_asked_for_wrongly_is_refused(texts, words, message):
    with pytest.raises(UserError, match=message):
        fetch_small_lm(**words, text=texts)
