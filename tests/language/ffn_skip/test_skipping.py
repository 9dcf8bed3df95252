"""Skipping held against the plain model, against a loop over tokens and layers, and against itself decoded another way."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from skip_models import FAMILIES, LAYERS, THETA, WAYS, logits, planted, settings, text, written
from transformers import DynamicCache

from fewer.language.ffn_skip import disable_ffn_skip, enable_ffn_skip, ffn_skip, teacher_forced
from fewer.language.ffn_skip.tokens import Tokens, similarity, uniform


@pytest.mark.parametrize(
    ("nothing", "dtype"),
    [
        *(({"threshold": 1.001}, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
        *((nothing, torch.float32) for nothing in ({"mode": "off"}, {"warmup_tokens": 40}, {"max_skips": 0})),
    ],
    ids=str,
)
def test_where_nobody_skips_every_bit_is_the_plain_models(nothing, dtype):
    model, prompt = planted(dtype=dtype), text(2, 7)
    plain = written(model, prompt, 12)
    with ffn_skip(model, settings(**nothing)) as stats:
        skipped = written(model, prompt, 12)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(skipped, plain, strict=True))
    assert stats.skipped_blocks == stats.ffn_flops_saved == 0
    assert nothing.get("mode") == "off" or "max_skips" in nothing or stats.decoded_tokens == 2 * 11


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lowest_threshold_leaves_out_all_of_the_window_but_its_first(family):
    """As a copy does whose down_proj are zero there; also for the prompt's tokens, where these may skip."""
    model, ids, config = planted(family=family), text(3, 20), settings(threshold=-1)
    emptied = planted(family=family)
    with torch.no_grad():
        for layer in emptied.model.layers[2:5]:
            layer.mlp.down_proj.weight.zero_()
    mine, stats = teacher_forced(model, ids, config, 0)
    with ffn_skip(model, settings(threshold=-1, skip_prefill=True)) as of_prompt:
        assert torch.allclose(logits(model, ids), mine, atol=1e-5)
    assert torch.allclose(mine, logits(emptied, ids), atol=1e-5)
    assert stats.per_layer == of_prompt.per_layer == [0, 0, 60, 60, 60, 0]
    assert stats.ratio == of_prompt.ratio == 3 / LAYERS


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_decoding_with_a_cache_is_reading_in_parallel(way, padded):
    model, prompt, mask = planted(), text(3, 9), torch.ones(3, 9, dtype=torch.long)
    if padded:
        for row, pads in enumerate((0, 3, 5)):
            mask[row, :pads], prompt[row, :pads] = 0, 0
    config = settings(**WAYS[way], warmup_tokens=3)
    with ffn_skip(model, config, per_token=True) as decoded:
        ids, of_steps = written(model, prompt, 16, attention_mask=mask)
    whole = torch.cat([mask, torch.ones(3, 15, dtype=torch.long)], dim=1)
    of_text, read = teacher_forced(model, ids[:, :-1], config, 9 + 3, attention_mask=whole, per_token=True)
    assert torch.allclose(of_steps, of_text[:, 8:], atol=1e-4)
    assert torch.equal(decoded.per_token, read.per_token[:, 9:])
    assert decoded.tokens == read.tokens == 3 * 12
    assert 0.05 < decoded.ratio < 0.5, "a test of something"
    assert decoded.per_layer == read.per_layer


@pytest.mark.parametrize("start", [0, 6])
def test_rows_may_start_to_skip_at_columns_of_their_own(start):
    model, ids = planted(), text(2, 14)
    both, _ = teacher_forced(model, ids, settings(), torch.tensor([start, 14]))
    assert torch.allclose(both[0], teacher_forced(model, ids, settings(), start)[0][0], atol=1e-5)
    assert torch.allclose(both[1], logits(model, ids)[1], atol=1e-5)


def test_the_warm_up_counts_steps_or_positions():
    model, prompt = planted(), text(1, 6)
    for config, tokens in (
        (settings(warmup_tokens=5), 9 - 5),
        (settings(warmup_tokens=8, warmup_counts="position"), 9 - 2),
        (settings(warmup_tokens=4, warmup_counts="position", skip_prefill=True), 9 + 2),
        (settings(warmup_tokens=5, skip_prefill=True), 6 + 9 - 5),
    ):
        with ffn_skip(model, config) as stats:
            written(model, prompt, 10)
        assert stats.tokens == tokens
        assert stats.ratio_all == pytest.approx(stats.ratio * stats.tokens / stats.decoded_tokens)


def test_positions_are_counted_without_the_padding():
    """Also where the caller gives a mask alone; padding is no token that skips."""
    model, ids, mask = planted(), text(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    config = settings(threshold=-1, warmup_tokens=3, warmup_counts="position", skip_prefill=True)
    with ffn_skip(model, config, per_token=True) as stats:
        logits(model, ids, attention_mask=mask)
    assert stats.per_token.any(-1).tolist() == [[False] * 3 + [True] * 5, [False] * 6 + [True] * 2]
    assert (stats.tokens, stats.decoded_tokens) == (7, 13)
    with ffn_skip(model, settings(threshold=-1, skip_prefill=True)) as stats:
        logits(model, ids, attention_mask=mask)
    assert stats.per_layer == [0, 0, 13, 13, 13, 0]


def test_a_second_prompt_on_the_same_cache_begins_a_warm_up_of_its_own():
    model, ids, cache = planted(), text(1, 20), DynamicCache()
    with torch.no_grad(), ffn_skip(model, settings(warmup_tokens=2, threshold=-1), per_token=True) as stats:
        for part in (ids[:, :5], *ids[:, 5:9].split(1, 1), ids[:, 9:13], *ids[:, 13:17].split(1, 1)):
            model(part, cache=cache, use_cache=True)
    assert stats.per_token.any(-1).tolist() == [[False, False, True, True] * 2]


def test_a_cache_that_the_model_makes_for_itself_is_counted_from_its_prompt_on():
    model, ids = planted(), text(1, 12)
    with torch.no_grad(), ffn_skip(model, settings(warmup_tokens=2, threshold=-1), per_token=True) as stats:
        cache = model(ids[:, :6], use_cache=True).cache
        for token in ids[:, 6:].split(1, 1):
            model(token, cache=cache, use_cache=True)
    assert stats.per_token.any(-1).tolist() == [[False] * 2 + [True] * 4]


def test_two_caches_may_be_written_to_in_turn():
    model, ids, caches = planted(), text(2, 12), [DynamicCache(), DynamicCache()]
    apart = [teacher_forced(model, ids[row : row + 1], settings(), 6 + row)[0] for row in (0, 1)]
    with torch.no_grad(), ffn_skip(model, settings(warmup_tokens=2)):
        given_ = [ids[:1, :4].split(4, 1) + ids[:1, 4:].split(1, 1), ids[1:, :5].split(5, 1) + ids[1:, 5:].split(1, 1)]
        out = [[], []]
        for step in range(8):
            for row in (0, 1):
                out[row].append(model(given_[row][step], cache=caches[row], use_cache=True).logits)
    for row in (0, 1):
        mine = torch.cat(out[row], dim=1)
        assert torch.allclose(mine, apart[row][:, : mine.shape[1]], atol=1e-4)


def test_the_cache_has_every_entry_and_skipped_parts_are_never_called():
    model, prompt, calls = planted(), text(1, 5), []
    with contextlib.ExitStack() as hooks, ffn_skip(model, settings(threshold=-1), per_token=True) as stats:
        for number, layer in enumerate(model.model.layers):
            mlp = layer.mlp
            for part in (layer.post_attention_layernorm, mlp, mlp.gate_proj, mlp.up_proj, mlp.down_proj, layer.self_attn):
                kind = type(part).__name__
                hooks.callback(part.register_forward_hook(lambda *_, at=(number, kind): calls.append(at)).remove)
        out = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert [layer.keys.shape[-2] for layer in out.cache.layers] == [5 + 8 - 1] * LAYERS
    ran = {number: [kind for at, kind in calls if at == number] for number in range(LAYERS)}
    for number in range(LAYERS):
        passes = 1 if number in (2, 3, 4) else 8
        assert ran[number].count("LlamaRMSNorm") == ran[number].count("LlamaMLP") == passes
        assert ran[number].count("Linear") == 3 * passes
        assert ran[number].count("LlamaAttention") == 8
    assert stats.untouched_ratio == stats.ratio == 3 / LAYERS
    assert stats.ffn_flops_saved == 7 * 3 * 6 * 32 * 48


def brute_force(model, ids, config, start):
    """Logits and skips of one text, a token and a layer at a time; the similarity from its dot product, in float64."""
    length, decoder = len(ids), model.model
    h = decoder.embed_tokens(ids)[None]
    turns = decoder.rotary_emb(h, torch.arange(length)[None])
    mask = torch.full((length, length), float("-inf"), dtype=h.dtype).triu(1)[None, None]
    state, left, skips = [False] * length, [config.max_skips if config.max_skips is not None else 99] * length, []
    for number, layer in enumerate(decoder.layers):
        h = h + layer.self_attn(layer.input_layernorm(h), position_embeddings=turns, attention_mask=mask)[0]
        out, skipped = h.clone(), []
        for t in range(length):
            inside = t >= start and config.cold_start <= number < config.cold_end
            if inside and state[t] and left[t] > 0:
                left[t] -= 1
                if config.rearm and left[t] == 0:
                    state[t], left[t] = False, config.max_skips
                skipped.append(True)
                continue
            skipped.append(False)
            out[0, t] = h[0, t] + layer.mlp(layer.post_attention_layernorm(h[0, t]))
            if inside and not state[t]:
                a, b = h[0, t].double(), out[0, t].double()
                state[t] = bool(a @ b / (a.norm() * b.norm()) >= config.threshold)
        h = out
        skips.append(skipped)
    return model.lm_head(decoder.norm(h)), torch.tensor(skips).T[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_decisions_are_those_of_a_loop_over_tokens_and_layers(dtype):
    model = planted(seed=1, dtype=dtype)
    for seed, way in enumerate(
        ({}, {"max_skips": 1}, {"max_skips": 2}, {"max_skips": 1, "rearm": True, "threshold": 0.5}, {"threshold": 0.98})
    ):
        ids, config = text(1, 18, seed), settings(**way)
        expected, skips = brute_force(model, ids[0], config, 4)
        mine, stats = teacher_forced(model, ids, config, 4, per_token=True)
        assert torch.equal(stats.per_token, skips)
        assert torch.allclose(mine, expected, atol={torch.bfloat16: 0.2, torch.float16: 0.05}.get(dtype, 1e-4))
        assert stats.ratio == pytest.approx(skips[:, 4:].double().mean().item(), abs=1e-12)
        assert 0 < stats.ratio < 0.5


def test_the_similarity_is_of_the_states_in_float32():
    """1 - 2**-11 is 1 in bfloat16, and half of what lies between in float16."""
    before = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)
    after = torch.tensor([[1.0, 2.0**-5]], dtype=torch.bfloat16)
    exact = 1 / (1 + 2.0**-10) ** 0.5
    assert similarity(before, after).item() == pytest.approx(exact, abs=1e-7)
    assert similarity(before, after).dtype == torch.float32
    config = settings(threshold=0.9999)
    tokens = Tokens(config, torch.ones(1, 1, dtype=torch.bool), *torch.zeros(2, 1, 1, dtype=torch.long))
    tokens.watch(1, before[None], after[None], torch.ones(1, 1, dtype=torch.bool))
    assert not tokens.skip(2).any(), "0.9995 is below the threshold"


@hypothesis_settings(deadline=None, max_examples=12)
@given(st.integers(0, 5), st.lists(st.floats(-1, 1.1), min_size=2, max_size=4))
def test_the_first_token_after_a_full_pass_skips_less_at_higher_thresholds_and_more_with_more_skips(seed, thresholds):
    model, ids = MODEL, text(1, 8, seed)

    def skips(**given_):
        return teacher_forced(model, ids, settings(**given_), 7)[1].skipped_blocks

    counts = [skips(threshold=theta) for theta in sorted(thresholds)]
    assert counts == sorted(counts, reverse=True)
    for theta in thresholds:
        counts = [skips(threshold=theta, max_skips=k) for k in (0, 1, 2, 3, None)]
        assert counts == sorted(counts)


MODEL = planted(seed=2)


@pytest.mark.parametrize("way", WAYS)
def test_a_row_is_written_alone_as_in_a_batch(way):
    model, prompt, config = planted(), text(4, 8), settings(**WAYS[way], warmup_tokens=2)
    with ffn_skip(model, config, per_token=True) as together:
        ids, of_batch = written(model, prompt, 9)
    for row in range(0, 4, 3):
        with ffn_skip(model, config, per_token=True) as alone:
            own, of_row = written(model, prompt[row : row + 1], 9)
        assert torch.equal(own[0], ids[row])
        assert torch.allclose(of_row[0], of_batch[row], atol=1e-4)
        assert torch.equal(alone.per_token[0], together.per_token[row])


def test_a_batch_reads_weights_unless_all_rows_skip():
    model, prompt = planted(), text(4, 8)
    with ffn_skip(model, settings(), per_token=True) as stats:
        written(model, prompt, 12)
    everybody = stats.per_token.all(0).float().mean().item()
    assert stats.untouched_ratio == pytest.approx(everybody)
    assert everybody < stats.ratio


def test_random_skips_follow_from_their_seed():
    model, ids = planted(), text(8, 40)
    config = settings(mode="random", p=0.3, seed=5)
    first, again, other = (
        teacher_forced(model, ids, each, 0, per_token=True)[1].per_token
        for each in (config, config, settings(mode="random", p=0.3, seed=5 + 2**32))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    draws = torch.stack([uniform(1, layer, text(50, 200), torch.arange(200).expand(50, 200)).flatten() for layer in range(8)])
    assert abs((draws < 0.3).double().mean().item() - 0.3) < 0.01
    assert (torch.corrcoef(draws) - torch.eye(8)).abs().max() < 0.05, "layers draw apart"


STATIC = {"cache_implementation": "static"}


@pytest.mark.parametrize("words", [{"do_sample": True, "top_k": 5}, {"num_beams": 3}, {"use_cache": False}, STATIC], ids=str)
def test_generate_samples_and_searches_as_it_does(words):
    model, prompt = planted(), text(2, 6)
    told = {"max_new_tokens": 10, "min_new_tokens": 10, "attention_mask": torch.ones_like(prompt)} | {"do_sample": False} | words
    torch.manual_seed(0)
    plain = model.generate(prompt, **told)
    for config, same in ((settings(threshold=2.0), True), (settings(threshold=-1), words == {"use_cache": False})):
        torch.manual_seed(0)
        with ffn_skip(model, config) as stats:
            assert torch.equal(model.generate(prompt, **told), plain) == same
        assert bool(stats.skipped_blocks) != same, "texts that are read anew for each token are prompts"


def test_disabled_it_is_the_model_that_it_was():
    model = planted()
    modules, attributes = dict(model.named_modules()), [set(vars(module)) for module in model.modules()]
    keys = list(model.state_dict())
    assert enable_ffn_skip(model, settings()) is model
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules
    disable_ffn_skip(model)
    assert all(mine is modules[name] for name, mine in model.named_modules())
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not model.model._forward_pre_hooks
    assert list(model.state_dict()) == keys


def test_the_threshold_of_these_tests_tells_tokens_apart():
    _, stats = teacher_forced(planted(), text(4, 20), settings(threshold=THETA), 0, per_token=True)
    assert len({tuple(row) for row in stats.per_token.flatten(0, 1).tolist()}) > 2
