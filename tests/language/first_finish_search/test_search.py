"""The search as a transformers user meets it: prompts of every form, modes, files, streamers, and what it is held against."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from ffs_models import EOS, make, prompts, tokenizer

from fewer.language import AsyncFFS, beam, budget_forcing, ffs_generate
from fewer.language.first_finish_search.engine.sampling import RaceConfig
from fewer.language.first_finish_search.traces import FFSResult, Trace

FREE = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 40}


def tokens(results):
    return [result.token_ids for result in results]


def test_prompts_in_every_form_are_the_same_prompts():
    model, words = make(), ["cde", "fg"]
    want = tokens(ffs_generate(model, words, tokenizer(), seed=1, **FREE))
    rows = [tokenizer()(text).input_ids for text in words]
    padded = tokenizer()(words, padding=True, padding_side="left", return_tensors="pt")
    for form in (
        rows,
        [torch.tensor(row) for row in rows],
        padded,
        tokenizer()(words),
        {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]},
    ):
        assert tokens(ffs_generate(model, form, tokenizer(), seed=1, **FREE)) == want
    alone = [
        words[0],
        rows[0],
        tokenizer()(words[0]),
        torch.tensor(rows[0]),
        torch.tensor([rows[0]]),
        torch.tensor([rows[0], rows[0]]).T.contiguous().T[:1],
    ]
    for form in alone:
        assert tokens(ffs_generate(model, form, tokenizer(), seed=1, **FREE)) == want[:1]


def test_messages_go_through_the_chat_template():
    chatty = copy.deepcopy(tokenizer())
    chatty.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}c{% endif %}"
    message = [{"role": "user", "content": "de"}]
    model = make()
    want = tokens(ffs_generate(model, ["dec"], chatty, seed=1, **FREE))
    assert tokens(ffs_generate(model, message, chatty, seed=1, **FREE)) == want
    assert tokens(ffs_generate(model, [message], chatty, seed=1, **FREE)) == want


def test_prefixes_open_the_rows_in_turn_and_are_no_generated_tokens():
    model = make()
    (result,) = ffs_generate(model, "cde", tokenizer(), n=4, k=4, seed=2, prefixes=["fgh", "i"], answer_fn=str, **FREE)
    for row, trace in enumerate(result.rows):
        opening = ("fgh", "i")[row % 2]
        assert trace.text.startswith(opening)
        with torch.no_grad():
            ids = tokenizer()("cde" + opening).input_ids + list(trace.token_ids)
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(ids) - trace.tokens
        mean = sum(logprobs[start - 1 + at, token].item() for at, token in enumerate(trace.token_ids)) / trace.tokens
        assert trace.mean_logprob == pytest.approx(mean, abs=1e-9)
    assert result.prefill_tokens == 3 + 2 * (3 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_precisions_race_too(dtype):
    for result in ffs_generate(make(dtype), prompts(5), n=3, seed=0, **FREE):
        assert result.total_tokens == 3 * result.sequential_tokens
        assert all(row.mean_logprob < 0 for row in result.rows)


def test_the_mode_comes_back_and_dropout_does_not_draw():
    model = make(kind="gpt2").train()
    first = tokens(ffs_generate(model, prompts(3), n=2, seed=0, **FREE))
    assert model.training
    assert first == tokens(ffs_generate(model.eval(), prompts(3), n=2, seed=0, **FREE))
    assert not model.training
    with pytest.raises(ValueError, match="empty"):
        ffs_generate(model.train(), [[]], n=2)
    assert model.training


def test_a_saved_model_races_alike(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = make()
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64", local_files_only=True)
    words = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    asked = ["cde", "ponm"]
    assert tokens(ffs_generate(loaded, asked, words, seed=3, **FREE)) == tokens(ffs_generate(model, asked, tokenizer(), seed=3, **FREE))


def test_with_an_adapter_of_peft():
    import peft

    model = make()
    want = tokens(ffs_generate(model, prompts(4), seed=1, **FREE))
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert tokens(ffs_generate(wrapped, prompts(4), seed=1, **FREE)) == want


def test_greedy_is_transformers_greedy():
    model, asked = make(), prompts(5)
    for ids, result in zip(asked, ffs_generate(model, asked, n=1, temperature=0, max_new_tokens=20), strict=True):
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20)[0, len(ids) :].tolist()
        assert list(result.token_ids) == made


@pytest.mark.parametrize("way", [ffs_generate, beam, budget_forcing])
def test_the_streamer_gets_the_winner(way):
    class Kept:
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got += value.reshape(-1).tolist()

        def end(self):
            self.ended = True

    kept = Kept()
    (result,) = way(make(), [3, 4], tokenizer(), seed=1, streamer=kept, **FREE)
    assert kept.got == [3, 4, *result.token_ids]
    assert kept.ended


def test_beam_search_is_transformers_and_is_counted_whole():
    model, ids = make(), [3, 4, 5]
    for penalty in (0.0, 1.0):
        (result,) = beam(model, ids, tokenizer(), n=4, max_new_tokens=12, length_penalty=penalty)
        made = model.generate(torch.tensor([ids]), num_beams=4, do_sample=False, max_new_tokens=12, length_penalty=penalty)[0, 3:].tolist()
        assert list(result.token_ids) == made
        assert (result.sequential_tokens, result.total_tokens, result.prefill_tokens) == (len(made), 4 * len(made), 12)
        assert result.finished == (made[-1] == EOS)


def test_budget_forcing_writes_the_continuation_in_place_of_the_end():
    model = make()
    plain = ffs_generate(model, prompts(8), tokenizer(), n=1, seed=1, **FREE)
    forced = budget_forcing(model, prompts(8), tokenizer(), continuation="mn", num_forced=2, seed=1, **FREE)
    for before, after in zip(plain, forced, strict=True):
        if before.finished and after.finished:
            assert before.token_ids[:-1] == after.token_ids[: len(before.token_ids) - 1]
            assert after.token_ids[len(before.token_ids) - 1 :][:2] == tuple(tokenizer()("mn").input_ids)
            assert after.token_ids.count(EOS) == 1
            assert after.total_tokens == after.sequential_tokens == len(after.token_ids) >= len(before.token_ids) + 2
    (closed,) = budget_forcing(model, [3], tokenizer(), continuation="m", before=[4, 5, 6, 7, 8], num_forced=1, seed=1, **FREE)
    assert closed.token_ids[: closed.token_ids.index(12)].count(4) == 0


def test_results_and_settings_survive_copies():
    (result,) = ffs_generate(make(), [[3, 4]], tokenizer(), seed=1, **FREE)
    assert pickle.loads(pickle.dumps(result)) == copy.deepcopy(result) == result
    assert isinstance(result, FFSResult)
    assert isinstance(result.rows[0], Trace)
    config = RaceConfig(stop_strings=["x"])
    assert pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config


REFUSED = [
    ({"n": 0}, "n is 0; expected a whole number of at least 1"),
    ({"k": 0}, "k is 0"),
    ({"k": 5}, "k is 5 and n 4; expected k of at most n"),
    ({"k": 2}, "k is 2 and there is no answer_fn"),
    ({"temperature": 0}, "temperature is 0 and n 4: all rows would be equal"),
    ({"temperature": -1.0}, "temperature is -1.0"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_p": 0}, "top_p is 0; expected a number above 0 and at most 1"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"max_new_tokens": 8, "min_new_tokens": 8}, "min_new_tokens is 8 and max_new_tokens 8"),
    ({"n": 65}, "n is 65 and max_rows 64; expected n of at most max_rows"),
    ({"stop_strings": [""]}, "stop_strings holds ''"),
    ({"max_new_tokens": 200}, "expected at most 128 together, the model's positions"),
    ({"answer_fn": str}, "answer_fn is given and no tokenizer"),
    ({"stop_strings": ["x"]}, "no tokenizer; expected one to read and write them"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=lambda each: str(each)[:40])
def test_settings_that_cannot_be(words, said):
    with pytest.raises(ValueError, match=said.replace("'", ".")):
        ffs_generate(make(), [3, 4], **words)


def test_prompts_and_models_that_cannot_be():
    model = make()
    for empty in ("", [], [[]], torch.zeros(0, dtype=torch.long)):
        with pytest.raises(ValueError, match="expected at least one"):
            ffs_generate(model, empty, tokenizer())
    with pytest.raises(ValueError, match="a tensor of 2 rows without padding information; expected the tokenizer's whole output"):
        ffs_generate(model, torch.ones(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="prompts are texts and there is no tokenizer"):
        ffs_generate(model, "cde")
    with pytest.raises(ValueError, match="neither model nor tokenizer names an end token"):
        ffs_generate(make(eos=None), [3, 4])
    with pytest.raises(ValueError, match="streamer is given and 2 prompts"):
        ffs_generate(model, [[3], [4]], streamer=object())
    with pytest.raises(TypeError, match="temprature is no setting of a race; expected one of n, k"):
        ffs_generate(model, [3], temprature=1)
    with pytest.raises(ValueError, match="continuation is '', which is no token"):
        budget_forcing(model, [3], tokenizer(), continuation="")
    broken = make()
    torch.nn.init.constant_(broken.lm_head.weight, float("nan"))
    for words in ({}, {"n": 1, "temperature": 0}):
        with pytest.raises(FloatingPointError, match="NaN or infinite logits"):
            ffs_generate(broken, [3], **words)


def test_a_model_whose_state_is_no_keys_and_values_is_refused():
    from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

    mamba = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=16, state_size=4, num_hidden_layers=1, eos_token_id=1)).eval()
    with pytest.raises(ValueError, match="expected keys and values of every token"):
        ffs_generate(mamba, [3, 4], max_new_tokens=4)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
    with pytest.raises(ValueError, match="encoder"):
        ffs_generate(t5, [3, 4], max_new_tokens=4)


def test_an_address_that_is_none():
    for url in ("localhost:8000", "ftp://host/v1", "http://", "", "http://host:port/v1"):
        with pytest.raises(ValueError, match="expected an address such as http://localhost:8000/v1"):
            AsyncFFS(url, "model")
