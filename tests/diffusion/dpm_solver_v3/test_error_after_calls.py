"""What the study holds the solver against, on exact mixtures, and that the racers do the same work."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion.dpm_solver_v3 import bench
from fewer.diffusion.dpm_solver_v3.comparison import Flow, by_diffusers, by_heun, exact_ends, noise_levels, random_mixture, statistics_of
from fewer.diffusion.dpm_solver_v3.study import PEERS, corrected, v3

ENDS = 20.0, 0.02


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def mixture():
    return random_mixture(4, 3)


@pytest.fixture
def noise():
    return ENDS[0] * torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def flow(mixture):
    return Flow(mixture.denoiser, NoiseSchedule.edm(ENDS[1], ENDS[0]), lambda x: exact_ends(mixture, x, *ENDS))


class Counted:
    """A denoiser that counts its calls."""

    def __init__(self, denoise):
        self.denoise, self.calls = denoise, 0

    def __call__(self, x, sigma):
        self.calls += 1
        return self.denoise(x, sigma)


def rmse(a, b) -> float:
    return float((a - b).square().mean().sqrt())


def typical(a, b) -> float:
    """The median point's error: the mean is that of the few points near the border of two components."""
    return float((a - b).norm(dim=1).median())


@pytest.mark.parametrize("name", [*PEERS, "ddim"])
def test_a_peer_follows_the_exact_flow_with_one_call_a_step(name, flow, noise):
    exact, counted = flow.reference(noise), Counted(flow.denoise)
    few, many = (typical(by_diffusers(name, counted, noise, noise_levels(*ENDS, steps)), exact) for steps in (20, 160))
    assert counted.calls == 180
    order = 1 if name == "ddim" else 2
    assert many < few / (0.6 * 8**order)
    assert many < 0.02


def test_ddim_is_the_exact_step_for_a_constant_answer(flow, noise):
    levels = noise_levels(*ENDS, 7)
    x = noise
    for sigma, following in itertools.pairwise(levels.tolist()):
        clean = flow.denoise(x, sigma)
        x = clean + following / sigma * (x - clean)
    torch.testing.assert_close(by_diffusers("ddim", flow.denoise, noise, levels), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("calls", [9, 10, 40])
def test_heun_makes_the_calls_it_is_given(calls, flow, noise):
    counted = Counted(flow.denoise)
    end = by_heun(counted, noise, *ENDS, calls)
    assert counted.calls == calls
    if calls == 40:
        assert typical(end, flow.reference(noise)) < typical(by_heun(flow.denoise, noise, *ENDS, 20), flow.reference(noise)) / 3


def test_exact_ends_are_those_of_the_flow_and_are_made_once(mixture, noise, monkeypatch):
    ends = exact_ends(mixture, noise, *ENDS)
    torch.testing.assert_close(ends, mixture.transport(noise, *ENDS))
    monkeypatch.setattr(type(mixture), "transport", lambda *_: pytest.fail("made twice"))
    assert torch.equal(exact_ends(mixture, noise, *ENDS), ends)


def test_statistics_are_estimated_once_and_leave_less_error_than_order_one(mixture, flow, noise, monkeypatch):
    data = mixture.draw(128, torch.Generator().manual_seed(2))
    ems = statistics_of("small-mixture", flow, data, 60, 128, mode="double-backward")
    exact = flow.reference(noise)
    ours = v3(corrected)(flow, noise, 10, ems)
    ddim = by_diffusers("ddim", flow.denoise, noise, noise_levels(*ENDS, 10))
    assert typical(ours, exact) < 0.3 * typical(ddim, exact)
    assert math.isfinite(rmse(ours, exact))
    blind = Flow(lambda x, sigma: pytest.fail("estimated twice"), flow.schedule, flow.reference)
    again = statistics_of("small-mixture", blind, data, 60, 128, mode="double-backward")
    assert torch.equal(again.l, ems.l)


def test_both_schedulers_of_the_race_run_from_the_start_each_time():
    for racer in bench.steps():
        first, second = racer(), racer()
        assert first.shape == (16, 3, 64, 64)
        assert first.isfinite().all()
        assert torch.equal(first, second)
