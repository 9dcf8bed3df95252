"""Noise schedules against diffusers, predictions against each other, the mixture's denoiser and flow against what is known of them."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from fewer.diffusion._shared import PREDICTIONS, GaussianMixture, NoiseSchedule, as_epsilon, to_epsilon

SCHEDULES = {
    "discrete": NoiseSchedule.from_diffusers(DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
    "linear": NoiseSchedule.linear(),
    "edm": NoiseSchedule.edm(),
}
ONE = GaussianMixture(
    torch.tensor([[-1.0], [0.5], [2.0]]).double(), torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([[0.01], [0.04], [0.02]]).double()
)


def mixture(components: int = 3, dim: int = 2) -> GaussianMixture:
    draw = torch.Generator().manual_seed(1)
    weights = torch.softmax(torch.randn(components, generator=draw, dtype=torch.float64), 0)
    means = torch.randn(components, dim, generator=draw, dtype=torch.float64)
    return GaussianMixture(means, weights, 0.05 + 0.2 * torch.rand(components, dim, generator=draw, dtype=torch.float64))


@pytest.mark.parametrize("kind", SCHEDULES)
@given(share=st.floats(0, 1))
def test_the_inverse_gives_the_time_back(kind, share):
    schedule = SCHEDULES[kind]
    t = torch.tensor(schedule.t_min + share * (schedule.t_max - schedule.t_min), dtype=torch.float64)
    assert schedule.inverse(schedule.lambda_(t)).item() == pytest.approx(t.item(), rel=1e-9)
    assert schedule.time(schedule.timestep(t)).item() == pytest.approx(t.item(), rel=1e-12)
    assert schedule.lambda_(t).item() == pytest.approx((schedule.alpha(t) / schedule.sigma(t)).log().item(), abs=1e-9)
    if kind != "edm":
        assert (schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2).item() == pytest.approx(1, abs=1e-12)


def test_the_discrete_schedule_is_diffusers_own_at_its_time_steps():
    scheduler = DDIMScheduler()
    schedule = NoiseSchedule.from_diffusers(scheduler)
    steps = torch.arange(1000)
    assert torch.allclose(schedule.alpha(schedule.time(steps)) ** 2, scheduler.alphas_cumprod.double(), rtol=2e-5)
    halfway = schedule.log_alpha(schedule.time(10.5))
    assert halfway.item() == pytest.approx(float(schedule.log_alphas[10:12].mean()), rel=1e-12)


def test_the_linear_schedule_is_the_integral_of_its_beta():
    t = torch.linspace(0, 0.7, 100_001, dtype=torch.float64)
    integral = torch.trapezoid(0.1 + t * 19.9, t)
    assert SCHEDULES["linear"].log_alpha(torch.tensor(0.7, dtype=torch.float64)).item() == pytest.approx(-integral.item() / 2, rel=1e-9)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_every_prediction_of_the_same_network_gives_the_same_noise(kind):
    schedule, t = SCHEDULES["discrete"], torch.tensor(0.4).double()
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    clean, noise = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    x = alpha * clean + sigma * noise
    said = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean, "score": -noise / sigma}[kind]
    assert torch.allclose(as_epsilon(lambda x, timestep: said, schedule, kind)(x, t), noise, atol=1e-12)


def test_a_network_is_called_with_its_own_time_and_further_arguments():
    seen = []

    class Output:
        sample = torch.zeros(1)

    def network(x, timestep, class_labels):
        seen.append((float(timestep), class_labels))
        return Output()

    as_epsilon(network, SCHEDULES["discrete"], class_labels=7)(torch.zeros(1), SCHEDULES["discrete"].time(321))
    assert seen == [(pytest.approx(321), 7)]


@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_the_denoiser_is_tweedies_formula_on_the_density(sigma):
    m = mixture()
    x = m.draw(5, torch.Generator().manual_seed(0)) + sigma * torch.randn(5, 2, dtype=torch.float64)

    def log_density(at):
        total = m.variances + sigma**2
        return torch.logsumexp(m.weights.log() - (((at[:, None] - m.means) ** 2 / total + total.log()).sum(-1)) / 2, dim=1).sum()

    score = torch.func.grad(log_density)(x)
    assert torch.allclose(m.denoiser(x, sigma), x + sigma**2 * score, rtol=1e-9, atol=1e-12)
    assert torch.allclose(m.denoiser(x, torch.full((5,), sigma).double()), m.denoiser(x, sigma))


def test_noise_and_denoised_point_add_up_in_every_scaling():
    m, x, lambda_ = mixture(), torch.randn(4, 2, dtype=torch.float64), 0.7
    alpha = math.sqrt(1 / (1 + math.exp(-2 * lambda_)))
    sigma = alpha * math.exp(-lambda_)
    assert torch.allclose(alpha * m.denoiser(x / alpha, sigma / alpha) + sigma * m.epsilon(x, lambda_), x)
    assert torch.allclose(m.denoiser(x, math.exp(-lambda_)) + math.exp(-lambda_) * m.epsilon(x, lambda_, alpha=1.0), x)


def test_in_one_dimension_the_flow_keeps_quantiles_and_equals_its_integration():
    x = 20 * torch.randn(50, 1, dtype=torch.float64)
    end = ONE.transport(x, 20.0, 0.02)
    for before, after in zip(ONE.tails(x, 20.0), ONE.tails(end, 0.02), strict=True):
        assert torch.allclose(before, after, atol=1e-9)
    twice = GaussianMixture(ONE.means.repeat(1, 2), ONE.weights, ONE.variances.repeat(1, 2))
    assert twice.dim == 2
    step = (math.log(0.02) - math.log(20.0)) / 2000
    for i in range(2000):  # the same flow, integrated by Heun's rule
        s = math.log(20.0) + i * step
        k = x - ONE.denoiser(x, math.exp(s))
        ahead = x + step * k
        x = x + step / 2 * (k + ahead - ONE.denoiser(ahead, math.exp(s + step)))
    assert torch.allclose(x, end, atol=2e-4)


def test_the_flow_of_a_gaussian_is_closed_and_equals_the_integrated_one():
    means, variances = torch.tensor([[0.3, -1.0]]).double(), torch.tensor([[0.04, 0.5]]).double()
    gaussian = GaussianMixture(means, torch.ones(1).double(), variances)
    doubled = GaussianMixture(means.repeat(2, 1), torch.tensor([0.4, 0.6]).double(), variances.repeat(2, 1))  # the same, not in closed form
    x = 20 * torch.randn(10, 2, dtype=torch.float64)
    assert torch.allclose(doubled.transport(x, 20.0, 0.02), gaussian.transport(x, 20.0, 0.02), atol=1e-9)


def test_draws_have_the_mixtures_moments():
    m = mixture()
    x = m.draw(200_000, torch.Generator().manual_seed(3))
    mean = (m.weights[:, None] * m.means).sum(0)
    variance = (m.weights[:, None] * (m.variances + m.means**2)).sum(0) - mean**2
    assert torch.allclose(x.mean(0), mean, atol=0.02)
    assert torch.allclose(x.var(0), variance, rtol=0.02)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda: to_epsilon(torch.zeros(1), torch.zeros(1), torch.ones(()), torch.ones(()), "flow"),
            "prediction_type 'flow'; expected one of epsilon",
        ),
        (lambda: as_epsilon(lambda x, t: x, SCHEDULES["edm"], "flow"), "expected one of epsilon"),
        (lambda: NoiseSchedule.from_diffusers(3), "got int"),
        (lambda: NoiseSchedule.from_diffusers({"rescale_betas_zero_snr": True}), "makes lambda infinite"),
        (lambda: SCHEDULES["discrete"].from_betas([0.1, 1.0]), "between 0 and 1"),
        (lambda: GaussianMixture(torch.zeros(2, 3), torch.ones(3), torch.ones(2, 3)), r"expected \[K, D\], \[K\], \[K, D\]"),
        (lambda: GaussianMixture(torch.zeros(2, 3), torch.tensor([0.5, 0.6]), torch.ones(2, 3)), "sum 1"),
    ],
)
def test_what_is_given_wrongly_is_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
