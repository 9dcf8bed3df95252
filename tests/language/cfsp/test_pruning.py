"""CFSP's statistics, allocation, importance and pruning, each against something written out another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM, Phi3Config, Phi3ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from fewer.language._shared.feed_forward import decoder_layers, parts_of, width_of
from fewer.language.cfsp import CfspStats, allocate, calibrate, channel_importance, prune
from fewer.language.cfsp.allocation import KAPPA, block_scores, keep_shares
from fewer.language.cfsp.calibration import angular_distance
from fewer.language.cfsp.importance import activation_importance, largest
from fewer.meters import counting
from fewer.tasks import micro_lm

IDS = torch.randint(1, 2048, (4, 48), generator=torch.Generator().manual_seed(0))
importances = st.lists(st.integers(0, 1000).map(lambda thousandths: thousandths / 1000), min_size=2, max_size=12)


@pytest.fixture(scope="module")
def stats():
    return calibrate(micro_lm(), [IDS])


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_ratio_zero_leaves_every_bit(stats):
    model, dense = micro_lm(), micro_lm().state_dict()
    assert prune(model, stats, 0.0).achieved_ratio == 0
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("metric", ["relative", "activation", "wanda", "magnitude", "random"])
def test_pruning_is_exactly_a_mask(stats, metric):
    model, masked = micro_lm(), micro_lm()
    report = prune(model, stats, 0.5, metric=metric, multiple_of=16, generator=torch.Generator().manual_seed(0))
    for layer, kept in zip(decoder_layers(masked), report.kept, strict=True):
        gone = torch.ones(128, dtype=torch.bool)
        gone[kept] = False
        with torch.no_grad():
            for part, linear in zip(("gate", "up", "down"), parts_of(layer), strict=True):
                (linear.weight.T if part == "down" else linear.weight)[gone] = 0
    assert torch.allclose(logits(model), logits(masked), atol=1e-5)
    assert [width_of(layer) for layer in decoder_layers(model)] == report.widths
    assert all(torch.equal(kept, kept.sort().values) for kept in report.kept)
    assert report.ffn_flops / report.dense_ffn_flops == 1 - report.achieved_ratio
    assert report.dense_parameters - report.parameters == 3 * 64 * (4 * 128 - sum(report.widths))


@settings(deadline=None)
@given(importances, st.floats(0.0, 0.9))
def test_shares_keep_the_budget_and_stay_below_one(importance, ratio):
    shares = keep_shares(block_scores(importance), ratio)
    assert shares.mean() == pytest.approx(1 - ratio, abs=1e-9)
    assert shares.max() < 1 or np.allclose(shares, 1 - ratio)
    order = np.argsort(importance)
    assert (np.diff(shares[order]) >= -1e-12).all(), "monotone"


@settings(deadline=None)
@given(importances, st.floats(0.05, 0.7), st.sampled_from([8, 16, 32]))
def test_widths_are_multiples_within_the_budget_and_follow_importance(importance, ratio, multiple_of):
    wanted = 256 * keep_shares(block_scores(importance), ratio)
    if wanted.min() < multiple_of / 2:
        with pytest.raises(ValueError, match="would keep no channels"):
            allocate(importance, ratio, 256, multiple_of=multiple_of)
        return
    try:
        widths = allocate(importance, ratio, 256, multiple_of=multiple_of)
    except ValueError as error:  # less than one multiple was to go, and rounding kept all: refused, and for that alone
        if "keep every channel" not in str(error) or len(importance) * 256 * ratio >= multiple_of:
            raise
        return
    assert all(width % multiple_of == 0 and multiple_of <= width <= 256 for width in widths)
    assert abs(sum(widths) - len(widths) * 256 * (1 - ratio)) < multiple_of
    ranked = [width for _, width in sorted(zip(importance, widths, strict=True))]
    assert len(set(importance)) < len(importance) or ranked == sorted(ranked)


@given(importances, st.floats(-10, 10))
def test_only_differences_of_importance_count(importance, shift):
    assert np.allclose(block_scores(importance), block_scores([each + shift for each in importance]), atol=1e-9)


def test_equal_importances_give_equal_widths():
    assert allocate([0.3] * 5, 0.5, 256, multiple_of=16) == [128] * 5


def test_the_factor_is_that_of_the_released_code_at_its_131072_tokens():
    """The released code: sums over 128 x 1,024 tokens, centred, divided by 10,000, through a sigmoid."""
    draw = np.random.default_rng(0)
    of_tokens = draw.uniform(0, 0.3, size=(6, 128 * 1024)) * draw.uniform(0.2, 1, size=(6, 1))
    sums = of_tokens.sum(axis=1)
    released = 1 / (1 + np.exp(-(sums - sums.mean()) / 1e4))
    assert np.allclose(block_scores(of_tokens.mean(axis=1)), released, rtol=1e-12)
    assert pytest.approx(13.1072) == KAPPA


def test_the_allocation_does_not_depend_on_how_much_text_was_seen():
    model = micro_lm()
    ids = torch.randint(1, 2048, (80, 250), generator=torch.Generator().manual_seed(1))
    widths = [allocate(calibrate(model, part.split(20)).block_importance, 0.5, 128, multiple_of=8) for part in (ids[:40], ids)]
    assert widths[0] == widths[1]


def test_the_released_formula_cancels_the_weights():
    """Normalised over j for each channel, as the released code does, every mean is 1 / H, whatever the weights are."""
    gate, up, down = (linear.weight.detach().double() for linear in parts_of(decoder_layers(micro_lm())[0]))
    norm = torch.rand(128, dtype=torch.float64) + 0.1
    score = torch.zeros(128, dtype=torch.float64)
    for i in range(128):
        weighted = down[:, i].abs() * norm[i]
        parts = (weighted / weighted.sum(), up[i].abs() / up[i].abs().sum(), gate[i].abs() / gate[i].abs().sum())
        score[i] = sum(part.mean() for part in parts) * norm[i]
    assert torch.allclose(score, activation_importance(64, norm), rtol=1e-6)
    mlp = decoder_layers(micro_lm())[0].mlp
    assert torch.equal(channel_importance(mlp, norm.float(), "activation").argsort(), norm.float().argsort())


@pytest.mark.parametrize(("b", "c"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.0)])
def test_relative_importance_is_equation_8_in_a_triple_loop(b, c):
    torch.manual_seed(0)
    hidden, width = 5, 7
    mlp = torch.nn.Module()
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (
        torch.nn.Linear(hidden, width),
        torch.nn.Linear(hidden, width),
        torch.nn.Linear(width, hidden),
    )
    norm = torch.rand(width)
    gate, up, down = (getattr(mlp, part).weight.detach().double().abs() for part in ("gate_proj", "up_proj", "down_proj"))
    x = norm.double()
    expected = []
    for i in range(width):
        bracket = 0.0
        for j in range(hidden):
            competitors = sum(down[j, k] * x[k] ** b for k in range(width))
            bracket += down[j, i] * x[i] ** b / competitors + up[i, j] / sum(up[k, j] for k in range(width))
            bracket += gate[i, j] / sum(gate[k, j] for k in range(width))
        expected.append(bracket * x[i] ** c)
    from fewer.language.cfsp.importance import relative_importance

    in_double = relative_importance(gate, up, down, x, b, c)
    assert torch.allclose(in_double, torch.stack(expected), rtol=1e-10)
    assert torch.allclose(channel_importance(mlp, norm, "relative", b, c).double(), in_double, rtol=1e-5)
    scaled = relative_importance(gate, up, down * torch.tensor([1.0, 9.0, 0.1, 3.0, 2.0]).double()[:, None], x, b, c)
    assert torch.allclose(scaled, in_double, rtol=1e-12), "a row of down may have any scale"


def test_angles_are_exact_near_zero_and_never_nan():
    h = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    assert angular_distance(h, 3.7 * h).max() < 1e-6
    assert torch.allclose(angular_distance(h, -h), torch.ones(50))
    right = torch.zeros(1, 64)
    right[0, 0] = 1
    other = torch.zeros(1, 64)
    other[0, 1] = 5
    assert angular_distance(right, other).item() == pytest.approx(0.5, abs=1e-6)
    assert angular_distance(torch.zeros(1, 64), right).item() == pytest.approx(0.5, abs=1e-6)
    halves = h.bfloat16()
    assert angular_distance(halves, halves).abs().max() < 1e-6
    v = h + 0.3 * torch.randn(50, 64, generator=torch.Generator().manual_seed(1))
    cosine = torch.nn.functional.cosine_similarity(h.double(), v.double(), dim=1)
    assert torch.allclose(angular_distance(h, v).double(), cosine.arccos() / math.pi, atol=1e-6)


def test_two_shards_merged_are_one_pass(stats):
    model = micro_lm()
    merged = CfspStats.merge([calibrate(model, [IDS[:1]]), calibrate(model, [IDS[1:]])])
    assert merged.tokens == stats.tokens == IDS.numel()
    assert torch.allclose(merged.channel_norm, stats.channel_norm, rtol=1e-5)
    for kind, distance in stats.distances.items():
        assert torch.allclose(merged.distances[kind], distance, rtol=1e-4), kind


def test_the_statistics_are_of_the_whole_layer_and_of_downs_input(stats):
    """Taken once more, by hand, from the hidden states that transformers hands out."""
    model = micro_lm()
    states = model.model(IDS, output_hidden_states=True).hidden_states
    for number in range(3):  # the last state is normalised and no block's output
        expected = angular_distance(states[number].flatten(0, 1), states[number + 1].flatten(0, 1)).mean()
        assert stats.block_importance[number].item() == pytest.approx(expected.item(), rel=1e-4)
    layer = decoder_layers(model)[0]
    normed = layer.post_attention_layernorm(
        states[0]
        + layer.self_attn(
            layer.input_layernorm(states[0]),
            position_embeddings=model.model.rotary_emb(states[0], torch.arange(48)[None]),
            attention_mask=None,
        )[0]
    )
    inner = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
    assert torch.allclose(stats.channel_norm[0], inner.flatten(0, 1).norm(dim=0), rtol=1e-4)


def test_padding_does_not_count(stats):
    padded = torch.cat([IDS, torch.zeros(4, 16, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(4, 48), torch.zeros(4, 16)], dim=1).long()
    with_padding = calibrate(micro_lm(), [{"input_ids": padded, "attention_mask": mask}])
    assert with_padding.tokens == stats.tokens
    assert torch.allclose(with_padding.channel_norm, stats.channel_norm, rtol=1e-4)
    assert torch.allclose(with_padding.block_importance, stats.block_importance, rtol=1e-4)


def test_the_dense_model_is_passed_once(stats):
    with counting() as counts:
        fresh = calibrate(micro_lm(), IDS.split(1))
        prune(micro_lm(), fresh, 0.5, multiple_of=16)
    assert counts["forwarded_tokens"] == IDS.numel()
    assert counts["backward_passes"] == 0


def test_silent_channels_go_first():
    model = micro_lm()
    silent = [set(torch.randperm(128, generator=torch.Generator().manual_seed(layer))[:64].tolist()) for layer in range(4)]
    with torch.no_grad():
        for layer, gone in zip(decoder_layers(model), silent, strict=True):
            parts_of(layer)[0].weight[list(gone)] = 0  # silu(0) = 0: no activation
    report = prune(model, calibrate(model, [IDS]), 0.5, global_metric="none", multiple_of=64)
    assert all(not gone & set(kept.tolist()) for gone, kept in zip(silent, report.kept, strict=True))


def test_of_twins_the_one_whose_output_is_not_read_goes_first():
    """Equation 8 does not give a channel with a zero column of down the score 0: it loses one of three terms, and so to its twin."""
    model = micro_lm()
    layer = decoder_layers(model)[0]
    with torch.no_grad():
        gate, up, down = parts_of(layer)
        gate.weight[64:], up.weight[64:] = gate.weight[:64].clone(), up.weight[:64].clone()
        down.weight[:, 64:] = 0
    score = channel_importance(layer.mlp, calibrate(model, [IDS]).channel_norm[0])
    assert (score[:64] > score[64:]).all()
    assert (score[64:] > 0).all()


def test_seeing_a_text_twice_changes_nothing():
    once, twice = (prune(micro_lm(), calibrate(micro_lm(), [IDS] * times), 0.5, multiple_of=16).kept for times in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_of_equal_channels_the_lower_number_stays():
    assert largest(torch.tensor([2.0, 1.0, 2.0, 2.0]), 2).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("config", "model"),
    [(MistralConfig, MistralForCausalLM), (Qwen2Config, Qwen2ForCausalLM)],
    ids=["mistral", "qwen2"],
)
def test_other_families_are_pruned_too(config, model):
    small = model(
        config(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            pad_token_id=0,
        )
    ).eval()
    ids = IDS % 100
    report = prune(small, calibrate(small, [ids]), 0.5, multiple_of=8)
    assert sum(report.widths) == 96
    assert torch.isfinite(logits(small, ids)).all()


def test_biases_are_sliced_with_their_rows():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, mlp_bias=True)
    ).eval()
    with torch.no_grad():
        for layer in decoder_layers(model):
            for linear in parts_of(layer):
                torch.nn.init.normal_(linear.bias)
    gate, up, down = (linear.bias.clone() for linear in parts_of(decoder_layers(model)[0]))
    kept = prune(model, calibrate(model, [IDS % 100]), 0.5, multiple_of=8).kept[0]
    for before, linear, cut in zip((gate, up, down), parts_of(decoder_layers(model)[0]), (True, True, False), strict=True):
        assert torch.equal(linear.bias, before[kept] if cut else before)


def nan_model():
    model = micro_lm()
    with torch.no_grad():
        parts_of(decoder_layers(model)[2])[1].weight[0, 0] = math.nan
    return model


def quantised_model():
    model = micro_lm()
    decoder_layers(model)[1].mlp.up_proj = torch.nn.Bilinear(1, 1, 1)
    return model


def phi3():
    return Phi3ForCausalLM(
        Phi3Config(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda s: prune(micro_lm(), s, 1.0), ValueError, "ratio is 1.0; expected at least 0 and below 1"),
        (lambda s: prune(micro_lm(), s, -0.1), ValueError, "ratio is -0.1"),
        (lambda s: prune(micro_lm(), s, 0.5, multiple_of=0), ValueError, "multiple_of is 0; expected a whole number of at least 1"),
        (lambda s: prune(micro_lm(), s, 0.5, multiple_of=256), ValueError, "multiple_of is 256; expected 1 to 128"),
        (lambda s: prune(micro_lm(), s, 0.9, multiple_of=64), ValueError, "layer 0 would keep no channels.*use a ratio of at most 0"),
        (lambda s: prune(micro_lm(), s, 0.5, global_metric="euclid"), ValueError, "global_metric is 'euclid'; expected one of angular"),
        (lambda s: prune(micro_lm(), s, 0.5, metric="best", multiple_of=16), ValueError, "metric is 'best'; expected one of relative"),
        (lambda s: allocate([0.1] * 4, 0.3, 128), ValueError, "at ratio 0.3 layer 0 would keep no channels .*358 to stay in 4 layers"),
        (lambda s: allocate([0.1] * 4, 0.02, 128, multiple_of=16), ValueError, "keep every channel; use a higher ratio"),
        (lambda s: allocate([0.1, math.nan], 0.5, 128, multiple_of=16), ValueError, "importance of block 1 is nan"),
        (lambda s: prune(micro_lm(), s, 0.3, "none"), ValueError, "layer 0 would keep no channels|keep every channel"),
        (lambda s: allocate([0.1], 0.5, 128), ValueError, "1 block; the coarse step shares out between at least two"),
        (lambda s: calibrate(micro_lm(), []), ValueError, "calibration text is empty"),
        (lambda s: calibrate(nan_model(), [IDS]), ValueError, "activations of layer 2 are not finite"),
        (lambda s: calibrate(micro_lm(), [IDS + 2000]), ValueError, "expected 0 to 2047: use the model's own tokenizer"),
        (lambda s: calibrate(phi3(), [IDS % 100]), ValueError, "Phi3MLP has no gate_proj, up_proj.*split its fused gate_up_proj"),
        (lambda s: calibrate(torch.nn.Linear(2, 2), [IDS]), ValueError, "Linear has no `model.layers`"),
        (lambda s: calibrate(quantised_model(), [IDS]), TypeError, "up_proj is a Bilinear.*without quantisation"),
        (lambda s: CfspStats.merge([]), ValueError, "no shards"),
    ],
)
def test_what_cannot_be_pruned_is_refused(stats, act, error, message):
    with pytest.raises(error, match=message):
        act(stats)


def test_a_model_is_not_pruned_twice(stats):
    model = micro_lm()
    prune(model, stats, 0.5, multiple_of=16)
    before = [width_of(layer) for layer in decoder_layers(model)]
    with pytest.raises(ValueError, match="expected the dense model that was calibrated"):
        prune(model, stats, 0.5, multiple_of=16)
    assert [width_of(layer) for layer in decoder_layers(model)] == before
