"""Plans of cascades: matched starts, times, settings and cost, and what is refused."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import warnings

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.diffusion import FreCaSConfig, Stage, matched_start, stage_times
from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion.frecas import cost, matched_flow_time, matched_sigma
from fewer.diffusion.frecas.schedules import next_times, on_betas
from fewer.diffusion.frecas.stages import PRESETS

LINEAR = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
SCALED = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
TWO = (Stage(8, 4, 100), Stage(16, 3, 0))


def snr(abar: torch.Tensor) -> torch.Tensor:
    return abar / (1 - abar)


@pytest.mark.parametrize("levels", [LINEAR, SCALED], ids=["linear", "scaled"])
def test_a_matched_start_is_the_first_time_with_so_much_noise(levels):
    draw = random.Random(0)
    for _ in range(200):
        end, ratio, gamma = draw.randrange(1000), draw.uniform(1, 4), draw.uniform(0, 3)
        target, start = float(snr(levels[end])) * ratio**-gamma, matched_start(levels, end, ratio, gamma)
        if target < snr(levels[-1]):
            assert start == 999
            continue
        slack = 1 + 1e-12
        assert snr(levels[start]) <= target * slack
        assert start == 0 or target < snr(levels[start - 1]) * slack


@given(st.integers(0, 999), st.floats(1, 8), st.floats(0, 3), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_a_matched_start_rises_with_ratio_and_gamma_and_stays_where_nothing_grows(end, ratio, gamma, more):
    start = matched_start(SCALED, end, ratio, gamma)
    assert matched_start(SCALED, end, 1, gamma) == matched_start(SCALED, end, ratio, 0) == end
    assert end <= start <= matched_start(SCALED, end, ratio + more, gamma)
    assert start <= matched_start(SCALED, end, ratio, gamma + more)


def test_with_gamma_2_averaged_noise_stands_to_the_signal_as_at_the_former_end():
    def noise_to_signal(t):
        return float((1 / snr(SCALED[t])).sqrt())

    halved = float(torch.nn.functional.avg_pool2d(torch.randn(1, 1, 512, 512), 2).std())  # what a mean of 2 x 2 leaves of noise
    assert halved == pytest.approx(0.5, rel=0.01)
    for end in (50, 200, 500):
        start = matched_start(SCALED, end, 2, 2)
        assert noise_to_signal(start - 1) / 2 < noise_to_signal(end) <= noise_to_signal(start) / 2


def test_flow_matching_and_edm_are_matched_by_the_same_law():
    end, k = 50, 2**0.5
    assert matched_flow_time(end, 2) == int(1000 * k * end / (1000 + (k - 1) * end)) == 69
    sigma, matched = end / 1000, 1000 * k * end / (1000 + (k - 1) * end) / 1000
    assert ((1 - matched) / matched) ** 2 == pytest.approx(((1 - sigma) / sigma) ** 2 / 2)
    assert matched_sigma(1.0, 2, 2) == 2
    assert matched_sigma(0.6, 2, 1) ** -2 == pytest.approx(0.6**-2 / 2)


@pytest.mark.parametrize("name", ["sd21-1024", "sd21-2048", "sdxl-2048", "sdxl-4096"])
def test_times_fall_from_the_matched_start_to_the_end(name):
    config = FreCaSConfig.preset(name)
    start = 999
    for j, (times, stage) in enumerate(zip(stage_times(config, SCALED), config.stages, strict=True)):
        if j:
            start = matched_start(SCALED, int(config.stages[j - 1].end_time), config.ratio(j), config.gamma)
        exact = [int(start + i * (stage.end_time - start) / (stage.steps - 1) + 1e-9) for i in range(stage.steps)]
        assert times == exact
        assert (times[0], times[-1], len(times)) == (start, stage.end_time, stage.steps)
        assert all(now > after for now, after in itertools.pairwise(times))


def test_flow_matching_begins_at_noise_alone_and_edm_visits_karras_levels():
    times = stage_times(FreCaSConfig.preset("sd3-2048"), FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert (times[0][0], times[0][-1], times[1][0], times[1][-1]) == (1000, 50, 69, 0)
    levels = stage_times(FreCaSConfig((Stage(8, 4, 1.0), Stage(16, 3, 0))), NoiseSchedule.edm(0.02, 80.0))
    assert [each[i] for each in levels for i in (0, -1)] == pytest.approx([80, 1, 2, 0.02])


def test_released_stepping_guesses_and_exact_stepping_goes_to_the_next_call():
    times = [float(999 - 799 * i // 7) for i in range(8)]
    assert next_times(times) == [*times[1:], -1]
    assert next_times(times, "released") == [t - 125 for t in times]  # 1000 // 8, where the next call is 114 below
    forty = [999.0] * 39 + [200.0]
    assert next_times(forty, "released")[0] == 999 - 1000 // int(1000 * 39 / 799)


def test_presets_are_the_released_settings():
    said = {
        "sd21-1024": ((512, 1024), (100, 0), (40, 10), 3, 45, 7.5, 0.6),
        "sd21-2048": ((512, 1024, 2048), (200, 200, 0), (30, 10, 10), 3, 35, 7.5, 0.4),
        "sdxl-2048": ((1024, 2048), (200, 0), (40, 10), 1.5, 35, 7.5, 0.6),
        "sdxl-4096": ((1024, 2048, 4096), (400, 200, 0), (30, 5, 15), 2, 35, 7.5, 0.6),
        "sd3-2048": ((1024, 2048), (50, 0), (20, 8), 1, 35, 7.5, 0.5),
    }
    assert set(said) == set(PRESETS)
    for name, rest in said.items():
        c = FreCaSConfig.preset(name)
        columns = [tuple(getattr(stage, field) for stage in c.stages) for field in ("size", "end_time", "steps")]
        assert (*columns, c.gamma, c.high_guidance, c.low, c.map_weight) == rest


def test_settings_travel_as_json_pickle_and_copies():
    config = FreCaSConfig((Stage((8, 12), 4, 100), Stage((16, 20), 3, 0)), low_guidance=3.0, stepping="released")
    assert FreCaSConfig.from_json(config.to_json()) == config == pickle.loads(pickle.dumps(config)) == copy.deepcopy(config)
    counted = FreCaSConfig(tuple(Stage(np.int64(s.grid[0]), s.steps, np.float32(s.end_time)) for s in TWO))
    assert FreCaSConfig.from_json(counted.to_json()) == FreCaSConfig(TWO)
    assert config.ratio(1) == 2, "the larger of 2 and 5 / 3"
    for text, message in (("[]", "expected JSON"), ("{", "expected JSON"), ('{"stages": [], "gama": 1}', "gama")):
        with pytest.raises(ValueError, match=message):
            FreCaSConfig.from_json(text)


def test_cost_counts_calls_by_area():
    assert cost(FreCaSConfig.preset("sdxl-2048")) == 40 / 4 + 10
    assert cost(FreCaSConfig(TWO), 100.0) == (4 / 4 + 3) * 100


@pytest.mark.parametrize(
    ("stages", "words", "message"),
    [
        ((Stage(16, 4, 100), Stage(8, 3, 0)), {}, r"stages\[1\].size is 8; expected larger"),
        ((Stage(16, 4, 100), Stage(16, 3, 0)), {}, r"stages\[1\].size"),
        ((Stage((8, 16), 4, 100), Stage((16, 12), 3, 0)), {}, r"stages\[1\].size"),
        ((Stage(8.5, 4, 100), Stage(16, 3, 0)), {}, r"stages\[0\].size is 8.5"),
        ((Stage(8, 1, 100), Stage(16, 3, 0)), {}, r"stages\[0\].steps is 1; expected a whole number of at least 2"),
        ((Stage(8, 4, 100), Stage(16, 3, 5)), {}, r"stages\[1\].end_time is 5; expected 0"),
        ((Stage(8, 4, 0), Stage(16, 3, 0)), {}, r"stages\[0\].end_time"),
        ((), {}, "stages is empty"),
        (TWO, {"gamma": -1}, "gamma is -1"),
        (TWO, {"guidance": 1.0}, "guidance is 1.0; expected a number above 1"),
        (TWO, {"map_weight": 1.2}, "map_weight is 1.2"),
        (TWO, {"upsample": "bicubic"}, "upsample"),
        (TWO, {"map_resize": "3d"}, "map_resize"),
        (TWO, {"stepping": "guess"}, "stepping"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name(stages, words, message):
    with pytest.raises(ValueError, match=message):
        FreCaSConfig(stages, **words)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((Stage(8, 4, 999), Stage(16, 3, 0)), r"stages\[0\].end_time is 999; expected a time below 999"),
        ((Stage(8, 4, 100), Stage(16, 400, 0)), r"stages\[1\].steps is 400; expected at most \d+"),
        ((Stage(8, 4, 10.5), Stage(16, 4, 0)), r"stages\[0\].end_time is 10.5; expected a whole"),
    ],
)
def test_a_plan_that_the_schedule_cannot_do_is_refused_by_name(stages, message):
    with pytest.raises(ValueError, match=message):
        stage_times(FreCaSConfig(stages), SCALED)


def test_an_end_below_edms_last_level_is_refused():
    for end in (0.001, 0.015):
        with pytest.raises(ValueError, match=rf"stages\[0\].end_time is {end}; expected at least 0.02, where the schedule ends"):
            stage_times(FreCaSConfig((Stage(8, 4, end), Stage(16, 3, 0))), NoiseSchedule.edm(0.02, 80.0))


def test_every_prediction_gives_the_same_estimates_to_the_dtypes_precision():
    clean, eps, t = torch.randn(50).double(), torch.randn(50).double(), 500
    for dtype in (torch.float64, torch.float32):
        alpha, sigma = on_betas(SCALED).level(t)
        x = (alpha * clean + sigma * eps).to(dtype)
        for prediction, output in (("epsilon", eps), ("sample", clean), ("v_prediction", alpha * eps - sigma * clean)):
            found = on_betas(SCALED, prediction=prediction).estimates(output.to(dtype), x, t)
            for one, other in zip(found, (clean, eps), strict=True):
                torch.testing.assert_close(one.double(), other, atol=50 * torch.finfo(dtype).eps, rtol=0)


def test_a_schedule_without_betas_is_refused_and_a_large_ratio_is_warned_of():
    with pytest.raises(ValueError, match="no alphas_cumprod"):
        stage_times(FreCaSConfig(TWO), object())
    with pytest.warns(UserWarning, match=r"stages\[1\].size is 5 times"):
        FreCaSConfig((Stage(8, 4, 100), Stage(40, 3, 0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FreCaSConfig((Stage(8, 4, 100), Stage(32, 3, 0)))
    for matched in (matched_flow_time, matched_sigma, lambda *given: matched_start(SCALED, *given)):
        with pytest.raises(ValueError, match="ratio is 0.5"):
            matched(10, 0.5)
        with pytest.raises(ValueError, match="end is -1"):
            matched(-1, 2)
    with pytest.raises(ValueError, match="end is 1000; expected a time below 1000"):
        matched_start(SCALED, 1000, 2)
