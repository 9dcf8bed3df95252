"""Where and when to skip: means held against a loop, cold regions and threshold against all that could be chosen."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from skip_models import LAYERS, logits, planted, settings, text

from fewer.language.ffn_skip import calibrate, teacher_forced
from fewer.language.ffn_skip.calibration import cold_regions, find_threshold, layer_means, skipped_ratio, widened
from fewer.language.ffn_skip.tokens import similarity

similarities = st.lists(st.floats(-1, 1), min_size=3, max_size=12)


@torch.no_grad()
def test_means_are_those_of_the_states_of_transformers():
    model, ids = planted(), text(3, 12)
    of_ffn, of_layers = layer_means(model.model, ids, 4)
    h = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
    for number, layer in enumerate(model.model.layers):
        kept = []
        hook = layer.mlp.register_forward_hook(lambda _, args, output, kept=kept: kept.append(output))
        before = layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        logits(model, ids)
        hook.remove(), before.remove()
        a, b = kept[0][:, 4:].double(), (kept[0] + kept[1])[:, 4:].double()
        cosines = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        assert of_ffn[number].item() == pytest.approx(cosines.mean().item(), abs=1e-6)
        if number < LAYERS - 1:  # the last of transformers' states is behind the norm
            turned = 1 - similarity(h[number][:, 4:], h[number + 1][:, 4:]).double()
            assert of_layers[number].item() == pytest.approx(turned.mean().item(), abs=1e-6)


@given(similarities)
def test_the_window_is_the_longest_run_around_the_most_similar_inner_layer(found):
    start, end = cold_regions(found)
    mean, last = sum(found) / len(found), len(found) - 1
    best = max(range(1, last), key=lambda layer: found[layer])
    assert 1 <= start <= best < end <= last
    assert all(found[layer] >= mean for layer in range(start, end) if layer != best)
    assert start == 1 or found[start - 1] < mean
    assert end == last or found[end] < mean


@given(similarities, st.floats(0, 0.99))
def test_the_window_grows_until_it_can_reach_the_target_and_no_further(found, target):
    window, layers = cold_regions(found), len(found)
    start, end = widened(window, found, target)
    assert 1 <= start <= window[0]
    assert window[1] <= end <= layers - 1
    assert (end - start - 1) / layers >= target or (start, end) == (1, layers - 1)
    assert (start, end) == window or (end - start - 2) / layers < target, "one layer less is too few"


@pytest.mark.parametrize("target", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_the_ratio_that_was_asked_for_is_reached_within_a_fiftieth(target):
    model, ids = planted(), text(6, 60)
    config, report = calibrate(model, ids, target, tokens=48)
    _, stats = teacher_forced(model, ids, config, 12)
    assert report.achieved_ratio == stats.ratio
    assert report.reached
    assert target <= stats.ratio <= target + 0.02
    assert report.tokens == stats.tokens == 6 * 48
    assert (config.cold_start, config.cold_end) == report.window
    assert config.num_layers == LAYERS


def test_the_threshold_is_the_largest_of_a_grid_that_reaches_the_target():
    model, ids, config = planted(), text(4, 40), settings(threshold=-1.0)
    theta, ratio = find_threshold(model.model, ids, config, 0.2, 8)
    assert ratio >= 0.2
    for more in (1e-6, 1e-3, 0.01, 0.05):
        higher = dataclasses.replace(config, threshold=theta + more)
        assert skipped_ratio(model.model, ids, higher, 8) <= 0.2 + 0.01, "later keys make it not quite monotone"
    assert skipped_ratio(model.model, ids, dataclasses.replace(config, threshold=theta + 1e-8), 8) < 0.2


def test_a_target_out_of_reach_is_told():
    config, report = calibrate(planted(), text(2, 30), 0.9, tokens=20)
    assert not report.reached
    assert (config.threshold, report.window) == (-1.0, (1, 5))
    assert report.achieved_ratio == 3 / LAYERS
    assert report.widened > 0


def test_it_is_the_same_each_time_and_on_more_rows_at_once(monkeypatch):
    model, ids = planted(), text(6, 40)
    first = calibrate(model, ids, 0.2, tokens=30)[1]
    monkeypatch.setattr("fewer.language.ffn_skip.calibration.AT_ONCE", 80)
    again = calibrate(model, ids, 0.2, tokens=30)[1]
    assert torch.allclose(first.similarity, again.similarity, atol=1e-7)
    assert first.window == again.window
    assert first.achieved_ratio == pytest.approx(again.achieved_ratio, abs=0.002)


def test_modes_are_given_back():
    model = planted().train()
    model.model.layers[2].eval()
    modes = [module.training for module in model.modules()]
    calibrate(model, text(2, 20), 0.1, tokens=10)
    assert [module.training for module in model.modules()] == modes


@hypothesis_settings(deadline=None, max_examples=6)
@given(st.integers(1, 4), st.integers(2, 30), st.integers(1, 40))
def test_short_texts_are_calibrated_on_whole(rows, columns, tokens):
    _, report = calibrate(MODEL, text(rows, columns), 0.1, tokens=tokens)
    assert report.tokens == rows * min(columns, tokens)


MODEL = planted()
