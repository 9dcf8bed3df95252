"""Races in a model: who wins, what each row draws, and that nothing is stepped in vain."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from ffs_models import EOS, make, prompts, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.language import ffs_generate, last_finish, majority_vote
from fewer.language.first_finish_search.engine.races import Ends, Engine, Race
from fewer.language.first_finish_search.engine.rows import Batch
from fewer.language.first_finish_search.engine.sampling import RaceConfig, draw_tokens
from fewer.language.first_finish_search.traces import choose

FREE = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 40}


def whole_traces(model, given_prompts, n, seed):
    """Every row to its end."""
    return last_finish(model, given_prompts, n=n, seed=seed, **FREE)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_race_is_what_its_whole_traces_replay_to(k):
    """The k-th smallest length s ends it; the rows came as far as min(length, s); the tie rule decides who is among the k."""
    model, asked = make(), prompts(30)
    recorded = whole_traces(model, asked, 4, seed=5)
    raced = ffs_generate(model, asked, tokenizer(), n=4, k=k, seed=5, answer_fn=lambda text: "same", **FREE)
    ties = 0
    for whole, race in zip(recorded, raced, strict=True):
        finished = sorted(
            (row for row in range(4) if whole.rows[row].finished),
            key=lambda row: (whole.rows[row].tokens, -whole.rows[row].mean_logprob, row),
        )
        lengths = [row.tokens for row in whole.rows]
        stop = lengths[finished[k - 1]] if len(finished) >= k else max(lengths)
        if finished:
            assert race.winner == finished[0]
            assert race.finished
            assert race.token_ids == whole.rows[race.winner].token_ids
        ties += len(finished) > 1 and lengths[finished[0]] == lengths[finished[1]]
        assert (race.sequential_tokens, race.total_tokens) == (stop, sum(min(length, stop) for length in lengths))
        for cut, row in zip(race.rows, whole.rows, strict=True):
            assert cut.token_ids == row.token_ids[: cut.tokens], "stopped, not altered"
        if k == 1 and finished:
            assert race.total_tokens == 4 * race.sequential_tokens
    assert ties, "the tie rule was needed"


def test_a_row_depends_on_no_other():
    model, asked = make(), prompts(100)
    words = FREE | {"max_new_tokens": 10}
    four, eight = (last_finish(model, asked, n=n, seed=2, **words) for n in (4, 8))
    few_rows = last_finish(model, asked, n=4, seed=2, max_rows=10, **words)
    for a, b, c in zip(four, eight, few_rows, strict=True):
        assert [row.token_ids for row in a.rows] == [row.token_ids for row in b.rows[:4]] == [row.token_ids for row in c.rows]
    assert len({row.token_ids for row in four[0].rows}) > 1, "rows differ"


def test_one_row_is_simple_sampling():
    """Against a loop without cache, batch or engine."""
    model, asked = make(), prompts(10)
    for number, result in enumerate(ffs_generate(model, asked, n=1, seed=7, **FREE)):
        import numpy as np

        draw, ids = np.random.default_rng((7, number, 0)), list(asked[number])
        while len(ids) < len(asked[number]) + 40 and (len(ids) == len(asked[number]) or ids[-1] != EOS):
            with torch.no_grad():
                distribution = model(torch.tensor([ids])).logits[0, -1].softmax(-1).cumsum(-1)
            ids.append(int((distribution <= draw.random()).sum()))
        assert list(result.token_ids) == ids[len(asked[number]) :]


@pytest.mark.parametrize("k", [1, 2])
def test_no_row_is_stepped_in_vain(k):
    model, asked, seen = make(), prompts(12), []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, output: seen.append(tuple(args[0].shape)))
    results = ffs_generate(model, asked, tokenizer(), n=4, k=k, seed=1, max_rows=10, answer_fn=str, **FREE)
    hook.remove()
    prefills = {(1, len(ids)) for ids in asked}
    decoding = [rows for rows, length in seen if length == 1]
    read_alone = sum(len(ids) == 1 for ids in asked)  # a prompt of one token looks like a step of one row
    assert len([shape for shape in seen if shape in prefills and shape[1] > 1]) == sum(len(ids) > 1 for ids in asked), (
        "one prefill a prompt"
    )
    assert sum(decoding) - read_alone == sum(result.total_tokens - 4 for result in results)
    assert not any(EOS in row.token_ids[:-1] for result in results for row in result.rows), "none goes on after its end"
    assert max(decoding) <= 10
    assert max(decoding) > 4, "prompts share the model"


def test_rows_of_a_prompt_that_is_over_are_gone_at_once():
    engine, ends = Engine(make()), Ends(frozenset([EOS]))
    races = [Race(ids, RaceConfig(temperature=1.0, top_p=1.0, seed=3), ends, prompt=p, longest=40) for p, ids in enumerate(prompts(5))]
    with torch.no_grad():
        for race in races:
            engine.admit(race)
        while engine.rows:
            over = engine.step()
            assert not {row.race for row in engine.rows} & set(over)
            assert engine.batch is None or len(engine.batch) == len(engine.rows)
    assert engine.batch is None
    assert engine.peak_rows == 20


@pytest.mark.parametrize("kind", ["llama", "sliding", "gpt2"])
def test_what_is_left_after_rows_went_and_came_equals_a_fresh_run(kind):
    model, asked = make(kind=kind), [[3, 4, 5], [2, 9, 8, 7, 6, 5, 4, 3, 2], [5, 14, 3, 2, 11], [7, 6]]
    steps = torch.randint(2, 16, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batch = Batch(model, torch.tensor(asked[0]))
        for ids in asked[1:3]:
            batch.join(Batch(model, torch.tensor(ids)))
        for step in range(5):
            batch.feed(steps[:3, step : step + 1])
        batch.keep([0, 2])
        assert batch.mask.shape[1] == 10, "columns that were the longest row's alone are gone"
        batch.join(Batch(model, torch.tensor(asked[3])))
        for step in range(5, 9):
            batch.feed(steps[[0, 2, 3], step : step + 1])
        written = {0: asked[0] + steps[0].tolist(), 2: asked[2] + steps[2].tolist(), 3: asked[3] + steps[3, 5:].tolist()}
        for place, row in enumerate((0, 2, 3)):
            fresh = model(torch.tensor([written[row]]), use_cache=False).logits[0, -1]
            assert torch.allclose(batch.logits[place], fresh, atol=1e-5), (kind, row)
        batch.keep([2])
        assert torch.allclose(batch.logits[0], fresh, atol=1e-5)
        assert batch.mask.shape[1] == int(batch.lengths[0]), "columns that nobody has are gone"
        batch.feed(torch.tensor([[5]]))
        assert torch.allclose(batch.logits[0], model(torch.tensor([[*written[3], 5]]), use_cache=False).logits[0, -1], atol=1e-5)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (1.3, 0.9, 6)])
def test_first_tokens_are_drawn_from_the_exact_distribution(temperature, top_p, top_k):
    from scipy.stats import chisquare
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    model, rows, ids = make(), 20_000, torch.tensor([[3, 7, 2]])
    config = RaceConfig(n=rows, max_rows=rows, max_new_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k)
    (result,) = last_finish(model, ids, config=config)
    counts = torch.bincount(torch.tensor([row.token_ids[0] for row in result.rows]), minlength=16)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    with torch.no_grad():
        exact = LogitsProcessorList(warpers)(ids, model(ids).logits[:, -1]).softmax(-1)[0]
    assert not counts[exact == 0].any()
    assert chisquare(counts[exact > 0], rows * exact[exact > 0]).pvalue > 0.001


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=2, max_size=30), st.floats(0, 1 - 1e-9), st.floats(0.05, 1), st.integers(0, 40))
def test_a_drawn_token_is_one_that_the_filters_keep(values, u, top_p, top_k):
    logits = torch.tensor([values], dtype=torch.float64)
    token = draw_tokens(logits, torch.tensor([u], dtype=torch.float64), RaceConfig(n=1, temperature=0.8, top_p=top_p, top_k=top_k)).item()
    p = (logits[0] / 0.8).softmax(-1)
    above = p > p[int(token)]  # logits that differ by less than a rounding are as likely
    assert not top_k or int(above.sum()) < top_k
    assert p[above].sum() <= top_p + 1e-9 or top_k


def test_min_new_tokens_masks_the_end():
    model, asked = make(), prompts(20)
    plain = ffs_generate(model, asked, n=4, seed=1, **FREE)
    assert min(result.sequential_tokens for result in plain) < 6
    masked = ffs_generate(model, asked, n=4, seed=1, min_new_tokens=6, **FREE)
    assert min(result.sequential_tokens for result in masked) > 6
    assert not any(EOS in row.token_ids[:6] for result in masked for row in result.rows)


def test_a_stop_string_spans_tokens_and_waits_for_min_new_tokens():
    model, asked, words = make(eos=None), prompts(10), {"stop_strings": ["gg", "dc"], "stop_token_ids": [EOS], **FREE}
    seen = 0
    for result in last_finish(model, asked, tokenizer(), n=4, seed=1, **words):
        for row in result.rows:
            ends = [row.text.find(stop) + 2 for stop in ("gg", "dc") if stop in row.text]
            assert not ends or min(ends) == len(row.text), "it ends where the string is whole"
            if ends:
                assert row.finished
                seen += 1
    assert seen
    later = last_finish(model, asked, tokenizer(), n=4, seed=1, min_new_tokens=9, **words)
    for row in (row for result in later for row in result.rows if row.finished):
        assert row.tokens > 9
        assert row.token_ids[-1] == EOS or row.text.endswith(("gg", "dc"))


def test_a_stop_string_of_bytes_that_are_no_characters_by_themselves():
    """é is two bytes, each a token here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bytewise = PreTrainedTokenizerFast(tokenizer_object=made)
    ends = Ends(frozenset(), ("né",), bytewise)
    (row,) = Race([1], RaceConfig(n=1), ends, longest=99).rows
    written = bytewise("fin né").input_ids
    for place, token in enumerate(written):
        assert not row.reason
        row.take(token, -1.0)
        assert bool(row.reason) == (place == len(written) - 1)
    assert row.reason == "stop"


def test_several_end_tokens():
    model, asked = make(eos=[1, 4, 9]), prompts(10)
    for result in ffs_generate(model, asked, n=2, seed=0, stop_token_ids=[5], **FREE):
        assert result.token_ids[-1] in (1, 4, 5, 9)
        assert not {1, 4, 5, 9} & set(result.token_ids[:-1])


def test_being_cut_off_is_no_finish_and_the_likeliest_row_is_taken():
    model, asked = make(), prompts(10)
    for result in ffs_generate(model, asked, n=4, seed=1, min_new_tokens=5, temperature=1.0, top_p=1.0, max_new_tokens=6):
        best = max(range(4), key=lambda row: result.rows[row].mean_logprob)
        if not any(row.finished for row in result.rows):
            assert (result.finished, result.winner, result.rows[0].reason) == (False, best, "length")
            break
    else:
        raise AssertionError("no race was cut off")
    (only,) = ffs_generate(make(eos=None), [[3]], n=3, stop_token_ids=[15], temperature=1.0, top_p=1.0, max_new_tokens=1, seed=4)
    assert only.sequential_tokens == 1


def test_log_probabilities_are_those_before_temperature_and_filters():
    model, asked = make(), prompts(5)
    for ids, result in zip(asked, ffs_generate(model, asked, n=2, seed=1, temperature=0.5, top_p=0.6, max_new_tokens=20), strict=True):
        row = result.rows[result.winner]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids + list(row.token_ids)])).logits[0].log_softmax(-1)
        mean = sum(logprobs[len(ids) - 1 + at, token].item() for at, token in enumerate(row.token_ids)) / row.tokens
        assert math.isclose(row.mean_logprob, mean, rel_tol=1e-9)


def test_a_vote_waits_for_all_and_k_equal_n_is_it():
    model, asked = make(), prompts(10)
    words = {"n": 4, "seed": 9, "answer_fn": lambda text: text[:1] or None, **FREE}
    voted, raced = majority_vote(model, asked, tokenizer(), **words), ffs_generate(model, asked, tokenizer(), k=4, **words)
    for a, b in zip(voted, raced, strict=True):
        assert (a.answer, a.winner, a.total_tokens) == (b.answer, b.winner, b.total_tokens)
        assert a.total_tokens == sum(row.tokens for row in a.rows)
        answers = [row.text[:1] for row in a.rows if row.finished and row.text]
        assert answers.count(a.answer) == max(map(answers.count, answers))


def test_the_last_to_finish_is_the_longest():
    for result in last_finish(make(), prompts(10), n=4, seed=9, **FREE):
        finished = [row.tokens for row in result.rows if row.finished]
        assert not finished or result.rows[result.winner].tokens == max(finished)


def test_the_vote_drops_what_cannot_be_read():
    traces = copy.copy(whole_traces(make(), prompts(1), 4, seed=0)[0].rows)
    read = dict(zip(range(4), [None, "8", "7", "7"], strict=True))
    numbered = [type(trace)(str(row), trace.token_ids, trace.tokens, trace.mean_logprob, "stop") for row, trace in enumerate(traces)]
    assert choose(numbered, [0, 1, 2, 3], 4, lambda text: read[int(text)], False) == (2, "7")
    assert choose(numbered, [0, 1, 2, 3], 3, lambda text: read[int(text)], False) == (1, "8")
    assert choose(numbered, [0, 1, 2, 3], 3, lambda text: None, False) == (0, None)
    assert choose(numbered, [0, 1, 2, 3], 3, lambda text: None, True) == (3, None)
