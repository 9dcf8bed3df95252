"""The scheduler against the function and diffusers' own, in its pipelines, and without diffusers."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from hosts import text_unet
from torch import nn

from fewer.diffusion.pfgmpp import EDMPrecond, PFGMPPHeunScheduler, sample, student_t_noise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Net(nn.Module):
    """A raw network F(c_in x, c_noise)."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer = nn.Linear(6, 6, dtype=dtype)

    def forward(self, x, t):
        return torch.tanh(self.layer(x)) + 0.1 * t.to(x.dtype)[:, None]


def looped(scheduler, net, x, steps=9, dtype=torch.float32):
    """The loop of a pipeline."""
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = net(scheduler.scale_model_input(x.to(dtype), t), t.expand(len(x)))
            x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [0.7, 16, math.inf])
def test_its_loop_is_the_function_bit_for_bit(D, dtype):
    net, words = Net(dtype), {"sigma_min": 0.02, "sigma_max": 20.0}
    scheduler = PFGMPPHeunScheduler(D, **words)
    found = looped(scheduler, net, scheduler.init_noise((5, 6), generator()), dtype=dtype)
    assert torch.equal(found, sample(EDMPrecond(net), (5, 6), D, 9, generator=generator(), **words))


def test_at_D_inf_it_is_edms_heun_written_out():
    net, n, low, high = Net(torch.float64), 7, 0.01, 10.0
    sigmas = [(high ** (1 / 7) + i / (n - 1) * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(n)] + [0.0]

    def denoiser(x, s):
        total = s**2 + 0.25
        c_noise = torch.full((len(x),), math.log(s) / 4)
        return 0.25 / total * x + s * 0.5 / math.sqrt(total) * net(x / math.sqrt(total), c_noise)

    x = high * torch.randn(4, 6, generator=generator(), dtype=torch.float64)
    scheduler = PFGMPPHeunScheduler(math.inf, low, high)
    found = looped(scheduler, net, scheduler.init_noise((4, 6), generator()), n, torch.float64)
    with torch.no_grad():
        for i in range(n):
            now, then = sigmas[i], sigmas[i + 1]
            d = (x - denoiser(x, now)) / now
            ahead = x + (then - now) * d
            x = x + (then - now) * (d + (ahead - denoiser(ahead, then)) / then) / 2 if then else ahead
    assert torch.allclose(found, x, atol=1e-7)  # times are float32


def test_its_times_levels_and_outputs_are_those_of_edm_euler():
    ours, theirs = PFGMPPHeunScheduler(math.inf), EDMEulerScheduler()
    ours.set_timesteps(12)
    theirs.set_timesteps(12)
    assert len(ours.timesteps) == 23
    assert torch.allclose(ours.sigmas.float(), theirs.sigmas)
    assert torch.allclose(ours.timesteps[::2], theirs.timesteps)
    x, output = torch.randn(3, 6), torch.randn(3, 6)
    t = ours.timesteps[0]
    assert torch.allclose(ours.scale_model_input(x, t), theirs.scale_model_input(x, theirs.timesteps[0]))
    mine, step = ours.step(output, t, x), theirs.step(output, theirs.timesteps[0], x)
    assert torch.allclose(mine.pred_original_sample, step.pred_original_sample)
    assert torch.allclose(mine.prev_sample, step.prev_sample, rtol=1e-5)  # Heun's first call is Euler's
    noise = student_t_noise((3, 6), 4, generator())
    times = ours.timesteps[[0, 5, 22]]
    assert torch.allclose(ours.add_noise(x, noise, times), x + (4 * times).exp()[:, None] * noise)
    negative = PFGMPPHeunScheduler(math.inf, prediction_type="v_prediction")
    negative.set_timesteps(12)
    assert torch.equal(negative.step(-output, t, x).prev_sample, mine.prev_sample)


def test_the_prior_is_its_own():
    scheduler = PFGMPPHeunScheduler(D=3, sigma_max=12.0)
    noise = scheduler.init_noise((4, 6), generator())
    assert torch.equal(noise, 12 * student_t_noise((4, 6), 3, generator(), torch.float64))
    assert scheduler.init_noise_sigma == 12.0
    assert scheduler.init_noise((4, 6), generator(), torch.float16).dtype == torch.float16


def test_it_takes_edm_eulers_config_and_keeps_its_own(tmp_path):
    theirs = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, sigma_data=1.0, rho=5.0, prediction_type="v_prediction")
    ours = PFGMPPHeunScheduler.from_config(theirs.config, D=64)
    assert (ours.D, ours.sigma_min, ours.sigma_max, ours.sigma_data, ours.rho, ours.sign) == (64, 0.01, 50.0, 1.0, 5.0, -1)
    for D in (64, 2.5, math.inf):
        kept = PFGMPPHeunScheduler(D, sigma_max=30.0)
        kept.save_pretrained(tmp_path / str(D))
        again = PFGMPPHeunScheduler.from_pretrained(tmp_path / str(D))
        assert (again.D, again.sigma_max) == (D, 30.0)
    assert json.loads((tmp_path / "64" / "scheduler_config.json").read_text())["D"] == 64


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (EDMEulerScheduler(sigma_schedule="exponential").config, "sigma_schedule='exponential'"),
        (EDMEulerScheduler(final_sigmas_type="sigma_min").config, "final_sigmas_type='sigma_min'"),
        (DDIMScheduler().config, "beta_start"),
        ({}, "no sigma_data"),
        (EDMEulerScheduler().config, "no D; expected"),
    ],
)
def test_configs_that_mean_something_else_are_refused_by_name(config, name):
    with pytest.raises(ValueError, match=name):
        PFGMPPHeunScheduler.from_config(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_samples_of_every_dtype_come_back_in_it(dtype):
    net = Net().to(dtype)
    exact = looped(PFGMPPHeunScheduler(16, 0.02, 20.0), net.float(), PFGMPPHeunScheduler(16, 0.02, 20.0).init_noise((4, 6), generator()))
    scheduler = PFGMPPHeunScheduler(16, 0.02, 20.0)
    x = scheduler.init_noise((4, 6), generator(), dtype)
    kept = x.clone()
    found = looped(scheduler, net.to(dtype), x, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(x, kept)
    assert torch.allclose(found.double(), exact, atol=100 * torch.finfo(dtype).eps)
    spread = torch.empty(6, 4, dtype=dtype).copy_(kept.T).T  # not contiguous
    ends = [looped(scheduler, net, each, dtype=dtype) for each in (spread[:1], kept[:1].clone())]
    assert torch.allclose(*ends, atol=10 * torch.finfo(dtype).eps)


def test_it_can_be_copied_in_the_middle_and_used_again():
    net, scheduler = Net(), PFGMPPHeunScheduler(16)
    x = scheduler.init_noise((2, 6), generator())
    first = looped(scheduler, net, x)
    assert torch.equal(looped(scheduler, net, x), first)
    scheduler.set_timesteps(9)
    times = list(scheduler.timesteps)
    state = x
    with torch.no_grad():
        for t in times[:5]:  # between the two calls of a step
            state = scheduler.step(net(scheduler.scale_model_input(state.float(), t), t.expand(2)), t, state).prev_sample
        for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
            end = state
            for t in times[5:]:
                end = twin.step(net(twin.scale_model_input(end.float(), t), t.expand(2)), t, end).prev_sample
            assert torch.equal(end, first)


def pipeline(kind, scheduler):
    torch.manual_seed(0)
    net = text_unet()
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    made = kind(
        vae=vae, text_encoder=None, tokenizer=None, unet=net, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


WORDS = {"num_inference_steps": 4, "height": 8, "width": 8, "output_type": "latent"}


def test_a_guided_pipeline_of_diffusers_samples_with_it():
    """Guidance, images a prompt, a callback, and two pipelines that share a config: all as the loop by hand."""
    made = pipeline(StableDiffusionPipeline, PFGMPPHeunScheduler(D=16, sigma_max=20.0))
    twin = StableDiffusionPipeline(
        **made.components | {"scheduler": PFGMPPHeunScheduler.from_config(made.scheduler.config)}, requires_safety_checker=False
    )
    twin.set_progress_bar_config(disable=True)
    prompt, nothing = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    latents = student_t_noise((2, 4, 8, 8), 16, generator())
    seen = []

    def callback(pipe, index, t, kept):
        seen.append(float(t))
        return kept

    words = WORDS | {"prompt_embeds": prompt, "negative_prompt_embeds": nothing, "num_images_per_prompt": 2, "guidance_scale": 3.0}
    found = made(latents=latents.clone(), callback_on_step_end=callback, **words).images
    again = twin(latents=latents.clone(), **words).images
    assert torch.equal(found, again)
    assert len(seen) == 7

    def guided(x, t):
        embeds = torch.cat([nothing.expand(2, -1, -1), prompt.expand(2, -1, -1)])
        plain, towards = made.unet(torch.cat([x, x]), t[0], encoder_hidden_states=embeds).sample.chunk(2)
        return plain + 3 * (towards - plain)

    by_hand = looped(PFGMPPHeunScheduler(D=16, sigma_max=20.0), guided, 20 * latents, 4)
    assert torch.allclose(found, by_hand, atol=1e-4)
    half = made.to(torch.bfloat16)
    embeds = {name: words[name].bfloat16() for name in ("prompt_embeds", "negative_prompt_embeds")}
    assert half(latents=latents.bfloat16(), **words | embeds).images.isfinite().all()


def test_image_to_image_begins_in_the_middle():
    made = pipeline(StableDiffusionImg2ImgPipeline, PFGMPPHeunScheduler(D=16, sigma_max=20.0))
    words = {name: value for name, value in WORDS.items() if name not in ("height", "width")}
    embeds = {"prompt_embeds": torch.randn(1, 4, 8), "negative_prompt_embeds": torch.randn(1, 4, 8)}
    for strength in (0.5, 1.0):
        found = made(image=torch.rand(1, 3, 8, 8), strength=strength, generator=generator(), **words | embeds).images
        assert found.isfinite().all()
    net, fresh = Net(torch.float64), PFGMPPHeunScheduler(16)
    fresh.set_timesteps(9)
    x = torch.randn(2, 6, dtype=torch.float64)
    ends = []
    for begin in (None, 6):  # found by the time, or told
        fresh.set_timesteps(9)
        if begin:
            fresh.set_begin_index(begin)
        state = x
        for t in fresh.timesteps[6:]:
            state = fresh.step(net(fresh.scale_model_input(state, t), t.expand(2)).detach(), t, state).prev_sample
        ends.append(state)
    assert torch.equal(*ends)
    with pytest.raises(ValueError, match="begin_index is 3; expected an even number below 17"):
        fresh.set_begin_index(3)
    with pytest.raises(ValueError, match="begin_index is -2; expected a whole number"):
        fresh.set_begin_index(-2)


def test_steps_out_of_turn_and_states_without_end_are_refused():
    scheduler, x = PFGMPPHeunScheduler(16), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 1.0, x)
    scheduler.set_timesteps(3)
    times = scheduler.timesteps
    with pytest.raises(ValueError, match=r"model_output is \(2, 1\); expected the sample's shape \(2, 3\)"):
        scheduler.step(x[:, :1], times[0], x)
    with pytest.raises(ValueError, match="sample is .*int64; expected floating-point"):
        scheduler.step(x, times[0], x.long())
    scheduler.step(x, times[0], x)
    with pytest.raises(ValueError, match="expected 0."):
        scheduler.step(x, times[4], x)
    for t in times[1:]:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="all steps are taken"):
        scheduler.step(x, times[4], x)
    scheduler.restart()
    with pytest.raises(FloatingPointError, match="not finite after step 1 .sigma = "):
        scheduler.step(x / 0, times[0], x)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"D": 0}, "D is 0"),
        ({"sigma_min": 90.0}, "sigma_min is 90.0"),
        ({"sigma_data": 0}, "sigma_data is 0"),
        ({"prediction_type": "sample"}, "prediction_type is 'sample'"),
    ],
)
def test_settings_that_cannot_be_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        PFGMPPHeunScheduler(**words)
    with pytest.raises(ValueError, match="steps is 1; expected a whole number of at least 2"):
        PFGMPPHeunScheduler().set_timesteps(1)


def test_it_works_without_diffusers():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import torch; from fewer.diffusion.pfgmpp import PFGMPPHeunScheduler\n"
        "s = PFGMPPHeunScheduler(D=4); s.set_timesteps(3); x = s.init_noise((2, 3))\n"
        "for t in s.timesteps: x = s.step(0 * s.scale_model_input(x, t), t, x).prev_sample\n"
        "assert x.isfinite().all() and not [m for m in sys.modules if m.startswith('diffusers.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
