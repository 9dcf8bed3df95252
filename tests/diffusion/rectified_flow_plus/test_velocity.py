"""Diffusion models as velocities, held against closed forms."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from flows import Exact, Noise, Points, randn, rk4
from torch import nn

from fewer.diffusion import EDMPrecond
from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion.rectified_flow_plus import VelocityFromEDM, VelocityFromVP

TIMES = torch.logspace(-3, 0, 40, dtype=torch.float64).clamp(max=0.999)
TIMES = torch.cat([TIMES, 1 - TIMES])
VP = NoiseSchedule.from_diffusers(DDPMScheduler())


def exact(x, t, s):
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return x * (t - (1 - t) * s**2) / (t**2 + (1 - t) ** 2 * s**2)


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 5e-4), (torch.float16, 2e-2), (torch.bfloat16, 5e-2)]
)
def test_the_wrapper_of_a_denoiser_is_the_velocity_of_gaussian_data(s, dtype, tolerance):
    t, x = TIMES.to(torch.promote_types(dtype, torch.float32)), randn(len(TIMES), 3, 2)
    x = (x * ((1 - TIMES) ** 2 * s**2 + TIMES**2).sqrt().reshape(-1, 1, 1)).to(dtype)
    v = VelocityFromEDM(Exact(s))(x, t)
    assert v.dtype == dtype
    assert (v.double() - exact(x.double(), t.double(), s)).abs().max() < tolerance * (
        1 + (v.double().abs().max() if dtype.itemsize < 4 else 0)
    )


@pytest.mark.parametrize("s", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 5e-4), (torch.float16, 2e-2)])
def test_the_wrapper_of_a_noise_predictor_is_the_same_velocity(s, dtype, tolerance):
    """Between the network's first and last noise levels, at fractional steps."""
    ends = [float(torch.sigmoid(-VP.lambda_(torch.tensor(t, dtype=torch.float64)))) for t in (VP.t_min, VP.t_max)]
    t = torch.linspace(*ends, 30, dtype=torch.float64)
    x = (randn(30, 3, 2) * ((1 - t) ** 2 * s**2 + t**2).sqrt().reshape(-1, 1, 1)).to(dtype)
    v = VelocityFromVP(Noise(s, VP), DDPMScheduler().alphas_cumprod)(x, t)
    assert v.dtype == dtype
    wanted = exact(x.double(), t, s)
    # its alphas are float32, which shifts noise levels by 1e-7 of themselves
    assert (v.double() - wanted).abs().max() < max(tolerance, 1e-4) * (1 + wanted.abs().max())
    assert (v.double() - wanted).abs().mean() < max(tolerance, 1e-6) * (1 + wanted.abs().mean())


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_other_predictions_give_the_same_velocity(kind):
    noise, t = Noise(0.5, VP), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    class Other(nn.Module):
        def forward(self, x, timestep):
            time = VP.time(timestep)
            alpha, sigma = (value.to(x).reshape(-1, 1, 1) for value in (VP.alpha(time), VP.sigma(time)))
            eps = noise(x, timestep)
            clean = (x - sigma * eps) / alpha
            return clean if kind == "sample" else alpha * eps - sigma * clean

    levels, x = DDPMScheduler().alphas_cumprod, randn(3, 3, 2)
    assert torch.allclose(VelocityFromVP(Other(), levels, kind)(x, t), VelocityFromVP(noise, levels)(x, t), atol=1e-5)


def test_the_flow_of_the_denoiser_is_the_rectified_flow_in_other_words():
    """dx / dsigma = (x - D) / sigma, and dx_t / dt = v between the same noise levels."""
    denoiser, x = Points(), randn(6, 2, seed=1) * 3
    velocity = VelocityFromEDM(denoiser)
    high, low = 5.0, 0.3
    levels = torch.logspace(torch.log10(torch.tensor(high)), torch.log10(torch.tensor(low)), 1000, dtype=torch.float64)
    by_sigma = rk4(lambda state, sigma: (state - denoiser(state, sigma)) / sigma, x, levels)
    t = levels / (1 + levels)
    by_t = rk4(velocity, x * (1 - t[0]), t) / (1 - t[-1])
    assert (by_sigma - x).abs().max() > 1, "they went somewhere"
    assert (by_sigma - by_t).abs().max() < 1e-6


def test_above_sigma_max_the_denoiser_is_asked_at_sigma_max():
    asked = []

    class Noted(Exact):
        def forward(self, x, sigma):
            asked.append(float(sigma))
            return super().forward(x, sigma)

    velocity, t = VelocityFromEDM(Noted(0.5), sigma_max=80.0), torch.tensor(1 - 1e-5, dtype=torch.float64)
    x = randn(4, 3)
    v = velocity(x, t)
    assert asked == [pytest.approx(80.0)]
    assert torch.allclose(v, (x - Exact(0.5)(x * 81, torch.tensor(80.0).double())) / t)
    below = torch.tensor(0.9, dtype=torch.float64)
    assert torch.equal(velocity(x, below), VelocityFromEDM(Exact(0.5))(x, below))


def test_beyond_its_levels_a_noise_predictor_is_asked_at_their_ends_and_stays_finite():
    velocity = VelocityFromVP(Noise(0.5, VP), DDPMScheduler().alphas_cumprod)
    x = randn(2, 3, 2)
    for t in (1e-5, 1 - 1e-5):
        time = torch.tensor(t, dtype=torch.float64)
        assert (velocity(x, time) - exact(x, time, 0.5)).abs().max() < 0.2, "near the velocity of the Gaussian"
        assert velocity(x.half(), time.float()).isfinite().all()


def test_one_sample_one_time_and_strides_change_nothing():
    velocity, x = VelocityFromEDM(Exact(0.5)), randn(6, 4, 3)[::2].transpose(1, 2)
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    whole = velocity(x, t)
    assert torch.equal(whole[1:2], velocity(x[1:2], t[1:2]))
    assert torch.equal(whole[2:], velocity(x[2:], t[2]))
    assert torch.equal(whole, velocity(x.contiguous(), t))


def test_a_raw_network_becomes_a_denoiser_as_diffusers_does_it(unet):
    """EDM's preconditioning is diffusers' own, at a level of the scheduler."""
    scheduler = EDMEulerScheduler(sigma_data=0.5)
    scheduler.set_timesteps(5)
    sigma, x = scheduler.sigmas[2], randn(2, 1, 8, 8).float()
    c_noise = scheduler.precondition_noise(sigma)
    wanted = scheduler.precondition_outputs(x, unet(scheduler.precondition_inputs(x, sigma), c_noise).sample, sigma)
    denoiser = EDMPrecond(unet, 0.5)
    assert torch.allclose(denoiser(x, sigma), wanted, atol=1e-5)
    velocity = VelocityFromEDM(denoiser, 80.0)
    for twin in (copy.deepcopy(velocity), pickle.loads(pickle.dumps(velocity))):
        assert torch.equal(twin(x, torch.tensor(0.5)), velocity(x, torch.tensor(0.5)))
    again = VelocityFromEDM(EDMPrecond(copy.deepcopy(unet)), 80.0)
    again.load_state_dict(velocity.state_dict())
    half = copy.deepcopy(velocity).half()
    near = half(x.half(), torch.tensor([0.9, 0.99999]))
    assert (near.float() - velocity(x, torch.tensor([0.9, 0.99999]))).abs().max() < 0.05


def test_augment_labels_are_zeros():
    class Augmented(nn.Module):
        def forward(self, x, sigma, augment_labels):
            assert augment_labels.shape == (len(x), 9)
            assert not augment_labels.any()
            return x / (1 + sigma**2)

    VelocityFromEDM(Augmented(), augment_dim=9)(torch.ones(2, 3), torch.tensor(0.5))


@pytest.mark.parametrize("t", [0.0, 1.0, -0.1, float("nan")])
def test_times_outside_are_refused(t):
    for velocity in (VelocityFromEDM(Exact(0.5)), VelocityFromVP(Noise(0.5, VP), DDPMScheduler().alphas_cumprod)):
        with pytest.raises(ValueError, match="expected times strictly between 0"):
            velocity(torch.ones(2, 3), torch.tensor([0.5, t]))


def test_answers_of_another_shape_are_refused_and_none_of_no_states():
    class Mean(nn.Module):
        def forward(self, x, sigma):
            return x.mean(1, keepdim=True)

    with pytest.raises(ValueError, match=r"answers \(2, 1\); expected \(2, 3\)"):
        VelocityFromEDM(Mean())(torch.ones(2, 3), torch.tensor(0.5))
    with pytest.raises(ValueError, match="x is .*int64; expected floats"):
        VelocityFromEDM(Exact(0.5))(torch.ones(2, 3, dtype=torch.int64), torch.tensor(0.5))
    assert VelocityFromEDM(Exact(0.5))(torch.ones(0, 3), torch.ones(0)).shape == (0, 3)


def test_teachers_that_are_no_denoisers_are_refused(unet):
    with pytest.raises(ValueError, match="has no sigma_data; .* EDMPrecond"):
        VelocityFromEDM(unet)
    with pytest.raises(ValueError, match="falling numbers between 0 and 1"):
        VelocityFromVP(unet, torch.tensor([0.9, 0.0]))
    with pytest.raises(ValueError, match="sigma_max"):
        VelocityFromEDM(Exact(1.0), sigma_max=0.0)

    class Weighted(Exact):
        def __init__(self):
            super().__init__(0.5)
            self.weight = nn.Parameter(torch.ones(1, dtype=torch.float16))

    with pytest.raises(ValueError, match="weights are torch.float16"):
        VelocityFromEDM(Weighted())(torch.ones(1, 2), torch.tensor(0.5))
