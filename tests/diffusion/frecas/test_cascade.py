"""Guidance by bands, and the cascade: exact on a Gaussian field, its calls, seeds and cost."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewer.diffusion import FreCaSConfig, Stage, band_guidance, cascade, split_bands, stage_times
from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion.frecas import cost, enlarge
from fewer.diffusion.frecas.cascade import guided
from fewer.meters import count_flops

SCALED = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
SIZE = (5, 9)


def pair(dtype=torch.float64):
    return torch.randn(3, 2, 10, 14, dtype=dtype), torch.randn(3, 2, 10, 14, dtype=dtype)


def test_bands_sum_to_the_input_and_are_linear_and_each_sample_its_own():
    v, other = pair()
    high, low = split_bands(v, SIZE)
    torch.testing.assert_close(high + low, v, atol=1e-12, rtol=0)
    back = F.interpolate(F.interpolate(v, size=SIZE, mode="bilinear"), size=v.shape[-2:], mode="bilinear")
    assert torch.equal(low, back)
    for one, a, b in zip(split_bands(2 * v - 3 * other, SIZE), (high, low), split_bands(other, SIZE), strict=True):
        torch.testing.assert_close(one, 2 * a - 3 * b)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(split_bands(v[order], SIZE)[1], low[order])
    constant = torch.full((1, 1, 10, 14), 0.7)
    torch.testing.assert_close(split_bands(constant, SIZE)[1], constant)
    assert (split_bands(low, SIZE)[1] - low).abs().max() > 0.01, "low is no projection"


def test_guidance_by_bands_agrees_with_plain_guidance_where_both_weights_do():
    uncond, cond = pair()
    torch.testing.assert_close(band_guidance(uncond, cond, 7.5, 7.5, SIZE), uncond + 7.5 * (cond - uncond), atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(band_guidance(uncond, cond, 1, 1, SIZE), cond)
    torch.testing.assert_close(band_guidance(cond, cond, 7.5, 35, SIZE), cond)
    more = band_guidance(uncond, cond, 7.5, 37, SIZE) - band_guidance(uncond, cond, 7.5, 35, SIZE)
    torch.testing.assert_close(more, 2 * split_bands(cond - uncond, SIZE)[0])
    config = FreCaSConfig((Stage(8, 4, 100), Stage(16, 3, 0)), guidance=3.0)
    torch.testing.assert_close(guided(config, 0, uncond, cond, SIZE), uncond + 3 * (cond - uncond))
    torch.testing.assert_close(guided(config, 1, uncond, cond, SIZE), band_guidance(uncond, cond, 3, 35, SIZE))


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 2.0), (torch.float16, 0.3)])
def test_guidance_in_every_precision_and_from_strided_tensors(dtype, near):
    uncond, cond = (each.to(dtype) for each in pair())
    given = uncond.clone()
    exact = band_guidance(uncond.double(), cond.double(), 7.5, 35, SIZE)
    found = band_guidance(uncond.mT.contiguous().mT, cond, 7.5, 35, SIZE)
    assert found.dtype == dtype
    assert (found.double() - exact).abs().max() < near
    assert torch.equal(uncond, given)


# A Gaussian field whose cascade is known


def field_covariance() -> torch.Tensor:
    """Of a periodic field of 32 x 32, [1024, 1024]."""
    k = torch.fft.fftfreq(32, dtype=torch.float64) * 32
    power = (1 + (k[:, None] ** 2 + k**2) / 9) ** -1.5
    row, at = torch.fft.ifft2(power).real, torch.arange(32)
    shift = (at[:, None] - at) % 32
    return row[shift[:, None, :, None], shift[None, :, None, :]].reshape(1024, 1024)


def enlarging(how: str) -> torch.Tensor:
    """[1024, 256], written by hand: a pixel's halves take 3/4 of it and 1/4 of the neighbour there, clamped at the border."""
    one = torch.zeros(32, 16, dtype=torch.float64)
    for i in range(32):
        m, neighbour = i // 2, min(max(i // 2 + (1 if i % 2 else -1), 0), 15)
        for column, share in ((m, 1.0),) if how == "nearest" else ((m, 0.75), (neighbour, 0.25)):
            one[i, column] += share
    return torch.kron(one, one)


def spectrum(covariance: torch.Tensor) -> torch.Tensor:
    """The expected |X_k|^2 of a field of this covariance."""
    side = torch.fft.fft(torch.eye(32, dtype=torch.complex128))
    dft = torch.kron(side, side)
    return ((dft @ covariance.to(dft)) * dft.conj()).sum(1).real.reshape(32, 32)


@pytest.mark.parametrize("how", ["bilinear", "nearest"])
def test_a_gaussian_field_comes_out_as_the_linear_recursion_says(how):
    large = field_covariance()
    mean = torch.zeros(16, 32, dtype=torch.float64)
    mean[torch.arange(32) // 2, torch.arange(32)] = 0.5
    mean = torch.kron(mean, mean)
    covariances = [mean @ large @ mean.T, large]
    powers = [torch.fft.fft2(each[0].reshape(side, side)).real for each, side in zip(covariances, (16, 32), strict=True)]
    config = FreCaSConfig((Stage(16, 4, 300), Stage(32, 3, 0)), map_weight=0, upsample=how)
    plan = stage_times(config, SCALED)

    def denoise(x, t, stage, maps):
        abar = SCALED[int(t)]
        clean = torch.fft.ifft2(torch.fft.fft2(x) * (abar.sqrt() * powers[stage] / (abar * powers[stage] + 1 - abar))).real
        return (x - abar.sqrt() * clean) / (1 - abar).sqrt()

    draw, count = torch.Generator().manual_seed(1), 2000
    noise = torch.randn(count, 1, 16, 16, generator=draw, dtype=torch.float64)
    found = cascade(denoise, config, SCALED, lambda z, size: enlarge(z, size, how), draw, noise)

    state = torch.eye(256, dtype=torch.float64)
    for stage, times in enumerate(plan):
        unit = torch.eye(len(state), dtype=torch.float64)
        for t, to in zip(times, [*times[1:], None], strict=True):
            abar = SCALED[int(t)]
            clean = torch.linalg.solve(abar * covariances[stage] + (1 - abar) * unit, abar.sqrt() * covariances[stage])
            if to is None and stage == 0:
                after = SCALED[int(plan[1][0])]
                lifted = enlarging(how) @ clean
                state = after * lifted @ state @ lifted.T + (1 - after) * torch.eye(1024, dtype=torch.float64)
                continue
            after = torch.ones(()) if to is None else SCALED[int(to)]
            step = after.sqrt() * clean + (1 - after).sqrt() / (1 - abar).sqrt() * (unit - abar.sqrt() * clean)
            state = step @ state @ step.T
    power = torch.fft.fft2(found[:, 0]).abs().square()
    k = torch.fft.fftfreq(32) * 32
    radius = (k[:, None] ** 2 + k**2).sqrt().round()
    exact = spectrum(state)
    for band in range(20):
        mine = power[:, radius == band].mean(1)
        deviation = float(mine.std()) / count**0.5
        assert abs(float(mine.mean()) - float(exact[radius == band].mean())) < 4 * deviation, f"|k| = {band}"


# Calls, cost, seeds

CONFIG = FreCaSConfig((Stage(8, 5, 300), Stage((12, 16), 3, 100), Stage(32, 4, 0)), map_weight=0)


def test_every_stage_calls_as_often_as_configured_at_its_own_size_and_costs_what_was_said():
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 1, 3, padding=1))
    calls = []

    @torch.no_grad()
    def denoise(x, t, stage, maps):
        calls.append((stage, tuple(x.shape[-2:]), t))
        return net(x)

    noise = torch.randn(1, 1, 8, 8)
    with count_flops() as flops:
        cascade(denoise, CONFIG, SCALED, enlarge, torch.Generator().manual_seed(0), noise)
    assert [call[:2] for call in calls] == [(0, (8, 8))] * 5 + [(1, (12, 16))] * 3 + [(2, (32, 32))] * 4
    assert [call[2] for call in calls] == [t for times in stage_times(CONFIG, SCALED) for t in times]
    with count_flops() as unit, torch.no_grad():
        net(torch.randn(1, 1, 32, 32))
    assert flops.total == pytest.approx(cost(CONFIG, unit.total), rel=0.02)


def begins_of(stages, consume: bool = False, seed: int = 0) -> dict[int, torch.Tensor]:
    """The first x of each stage where lifted images are nought: its fresh noise."""
    generator, seen = torch.Generator().manual_seed(seed), {}

    def denoise(x, t, stage, maps):
        seen.setdefault(stage, x)
        if consume:
            torch.randn(3, generator=generator)
        return 0 * x

    cascade(
        denoise,
        FreCaSConfig(stages, map_weight=0),
        SCALED,
        lambda z, size: z.new_zeros(*z.shape[:2], *size),
        generator,
        torch.ones(2, 1, 8, 8),
    )
    return seen


def test_a_seed_gives_the_same_image_and_a_stages_noise_hangs_on_nothing_before_it():
    first = begins_of(CONFIG.stages)
    for other in (begins_of(CONFIG.stages), begins_of(CONFIG.stages, consume=True), begins_of((Stage(8, 9, 300), *CONFIG.stages[1:]))):
        assert all(torch.equal(first[j], other[j]) for j in (1, 2))
    wider = begins_of((CONFIG.stages[0], Stage((12, 20), 3, 100), CONFIG.stages[2]))  # draws more, and leaves at the same level
    assert torch.equal(first[2], wider[2])
    assert not torch.equal(begins_of(CONFIG.stages, seed=1)[1], first[1])
    assert not torch.equal(first[1][0], first[1][1])
    sigma = (1 - float(SCALED[int(stage_times(CONFIG, SCALED)[2][0])])) ** 0.5
    assert float(first[2].std()) == pytest.approx(sigma, rel=0.1), "noised to the matched start"


def test_the_predicted_clean_sample_is_lifted_and_not_the_state():
    lifted = []

    def lift(z, size):
        lifted.append(z)
        return enlarge(z, size)

    clean = torch.full((1, 1, 8, 8), 0.3)

    def denoise(x, t, stage, maps):  # one that knows the image
        abar = float(SCALED[int(t)])
        return (x - abar**0.5 * 0.3) / (1 - abar) ** 0.5

    found = cascade(denoise, CONFIG, SCALED, lift, torch.Generator().manual_seed(0), torch.randn(1, 1, 8, 8))
    torch.testing.assert_close(lifted[0], clean, atol=1e-4, rtol=0)
    torch.testing.assert_close(found, torch.full((1, 1, 32, 32), 0.3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_samples_keep_their_dtype_on_edms_schedule_too(dtype):
    config = FreCaSConfig((Stage(8, 4, 1.0), Stage(16, 3, 0)), map_weight=0)
    found = cascade(
        lambda x, s, *_: x / (1 + s**2), config, NoiseSchedule.edm(0.02, 80.0), enlarge, None, torch.randn(1, 1, 8, 8).to(dtype)
    )
    assert found.dtype == dtype
    assert found.isfinite().all()


def test_what_cascade_cannot_do_is_refused():
    with pytest.raises(ValueError, match="initial is None"):
        cascade(lambda *_: None, CONFIG, SCALED, enlarge)
    for initial in (torch.zeros(1, 1, 8, 8, dtype=torch.int64), torch.zeros(1, 8, 8)):
        with pytest.raises(ValueError, match=r"initial is \(1, .*expected unit noise"):
            cascade(lambda *_: None, CONFIG, SCALED, enlarge, None, initial)
    for lift, side in ((enlarge, 12), (lambda z, size: z, 8)):  # a cascade that does not grow
        with pytest.raises(ValueError, match=r"lift made .* expected as stages\[1\].size \(12, 16\) stands to \(8, 8\)"):
            cascade(lambda x, *_: x, CONFIG, SCALED, lift, None, torch.zeros(1, 1, side, side))
    with pytest.raises(ValueError, match="generator is a list of 1 for 2 images"):
        cascade(lambda *_: None, CONFIG, SCALED, enlarge, [torch.Generator()], torch.zeros(2, 1, 8, 8))
    edm = FreCaSConfig((Stage(8, 4, 1.0), Stage(16, 3, 0)), map_weight=0, stepping="released")
    with pytest.raises(ValueError, match="expected 'exact'"):
        cascade(lambda *_: None, edm, NoiseSchedule.edm(0.02, 80.0), enlarge, None, torch.zeros(1, 1, 8, 8))
    maps = FreCaSConfig((Stage(8, 4, 300), Stage(16, 3, 0)), map_weight=0.5)
    with pytest.raises(ValueError, match="map_weight=0"):
        cascade(lambda x, *_: x, maps, SCALED, enlarge, None, torch.zeros(1, 1, 8, 8))
