"""The scheduler in diffusers: its loop, its pipelines, half precision, files, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import StableDiffusionImg2ImgPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from exact_flows import error, flow, grid
from hosts import text_unet

from fewer.diffusion import EMS, DPMSolverV3Scheduler, SolverConfig, estimate_ems, model_hash, sample
from fewer.diffusion._shared import GaussianMixture, NoiseSchedule, as_epsilon
from fewer.diffusion.dpm_solver_v3.multistep import Multistep, make_plan

VP = NoiseSchedule.from_diffusers(DDPMScheduler())


def test_the_schedulers_loop_is_the_function_bit_for_bit(unet, ems):
    options = {"corrector": "full", "pseudo_predictor": True}
    scheduler = DPMSolverV3Scheduler.from_config(DDPMScheduler().config, ems=ems, **options)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(2):  # set_timesteps forgets all of the sample before
        scheduler.set_timesteps(6)
        x = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(unet(scheduler.scale_model_input(x, t), t).sample, t, x).prev_sample
        assert torch.equal(x, sample(as_epsilon(unet, VP), noise, VP, ems, 6, **options))
    scheduler.set_timesteps(6)
    scheduler.step(noise, scheduler.timesteps[0], noise)  # broken off
    scheduler.set_timesteps(6)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t).sample, t, x, return_dict=False)[0]
    assert torch.equal(x, sample(as_epsilon(unet, VP), noise, VP, ems, 6, **options))


@pytest.mark.parametrize("kind", ["sample", "v_prediction"])
def test_other_predictions_give_the_same_sample(ems, kind):
    data_noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def run(prediction: str) -> torch.Tensor:
        scheduler = DPMSolverV3Scheduler(ems, prediction_type=prediction)
        scheduler.set_timesteps(5)
        x = data_noise
        for t in scheduler.timesteps:
            time = VP.time(t)
            alpha, sigma = VP.alpha(time), VP.sigma(time)
            eps = torch.tanh(x)
            output = {"epsilon": eps, "sample": (x - sigma * eps) / alpha, "v_prediction": alpha * eps - sigma * (x - sigma * eps) / alpha}
            x = scheduler.step(output[prediction], t, x).prev_sample
        return x

    assert torch.allclose(run(kind), run("epsilon"), atol=1e-9)


def test_it_samples_in_a_pipeline_of_diffusers(unet, ems):
    pipeline = DDPMPipeline(unet, DDPMScheduler())
    pipeline.scheduler = DPMSolverV3Scheduler.from_config(pipeline.scheduler.config, ems=ems)
    pipeline.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(3)
    images = pipeline(batch_size=2, generator=draw, num_inference_steps=5, output_type="pt").images
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = (sample(as_epsilon(unet, VP), noise, VP, ems, 5) / 2 + 0.5).clamp(0, 1)
    assert torch.equal(images, expected)


def test_added_noise_is_that_of_ddpm(ems):
    x, noise, t = torch.ones(3, 1, 8, 8), torch.randn(3, 1, 8, 8), torch.tensor([0, 500, 999])
    assert torch.allclose(DPMSolverV3Scheduler(ems).add_noise(x, noise, t), DDPMScheduler().add_noise(x, noise, t), atol=1e-5)


def test_statistics_and_scheduler_survive_their_files(tmp_path, unet, ems):
    scheduler = DPMSolverV3Scheduler(ems, corrector="half", spacing="time_uniform")
    scheduler.save_pretrained(tmp_path)
    again = DPMSolverV3Scheduler.from_pretrained(str(tmp_path))
    assert again.config["corrector"] == "half"
    read = EMS.from_pretrained(tmp_path, model=unet)
    for name in ("lambdas", "l", "s", "b"):
        assert torch.equal(getattr(again.ems, name), getattr(ems, name))
        assert torch.equal(getattr(read, name), getattr(ems, name))
    assert read.meta == ems.meta
    assert read.meta["model"] == model_hash(unet)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ems.json", "ems.safetensors", "scheduler_config.json"]


def test_steps_out_of_turn_are_refused(ems):
    scheduler, x = DPMSolverV3Scheduler(ems), torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 999.0, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="expected 999"):
        scheduler.step(x, 10.0, x)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="all steps are taken"):
        scheduler.step(x, 0.0, x)
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="the EMS are for"):
        scheduler.step(torch.zeros(1, 1, 16, 16), scheduler.timesteps[0], torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="from_config without EMS"):
        DPMSolverV3Scheduler.from_config(DDPMScheduler().config)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        DPMSolverV3Scheduler.from_config(DDPMScheduler(rescale_betas_zero_snr=True).config, ems=ems)
    with pytest.raises(ValueError, match="prediction_type 'flow'"):
        DPMSolverV3Scheduler(ems, prediction_type="flow")


def test_another_schedules_statistics_are_refused_by_the_scheduler(ems):
    with pytest.raises(ValueError, match="use the schedule that they were estimated on"):
        DPMSolverV3Scheduler(ems, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).set_timesteps(5)


# Other numbers of training steps, other configs


@pytest.mark.parametrize("steps", [100, 1000, 4000])
def test_times_and_noise_are_those_of_the_schedules_own_number_of_steps(steps):
    theirs = DDPMScheduler(num_train_timesteps=steps, beta_end=20 / steps)
    schedule = NoiseSchedule.from_diffusers(theirs)
    scheduler = DPMSolverV3Scheduler.from_config(theirs.config, ems=EMS.data_prediction(grid(120, schedule)))
    scheduler.set_timesteps(4)
    assert scheduler.timesteps[0] == pytest.approx(steps - 1)
    assert scheduler.timesteps.min() >= 0
    t = torch.tensor([0, steps // 2, steps - 1])
    assert torch.allclose(schedule.alpha(schedule.time(t)) ** 2, theirs.alphas_cumprod[t].double(), rtol=1e-4)
    assert torch.allclose(schedule.timestep(schedule.inverse(schedule.lambda_(schedule.time(t)))), t.double(), atol=1e-6)
    x, noise = torch.ones(3, 1, 8, 8), torch.randn(3, 1, 8, 8)
    assert torch.allclose(scheduler.add_noise(x, noise, t), theirs.add_noise(x, noise, t), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (FlowMatchEulerDiscreteScheduler(), "flow matching"),
        (FlowMatchEulerDiscreteScheduler().config, "flow matching"),
        (EDMEulerScheduler().config, "preconditioned as EDM's"),
        ({"_class_name": "ScoreSdeVeScheduler", "sigma_max": 1348.0}, "variance-exploding"),
        (DPMSolverMultistepScheduler(use_karras_sigmas=True).config, "use_karras_sigmas=True"),
        (DPMSolverMultistepScheduler(thresholding=True).config, "thresholding=True"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction").config, "use_flow_sigmas=True"),
        (DDPMScheduler().config | {"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction' is flow matching"),
        ({"num_train_timesteps": 1000}, "has no betas"),
    ],
)
def test_a_config_that_means_something_else_is_refused_by_name(ems, config, words):
    for act in (
        lambda: NoiseSchedule.from_diffusers(config),
        lambda: DPMSolverV3Scheduler.from_config(getattr(config, "config", config), ems=ems),
    ):
        with pytest.raises(ValueError, match=words):
            act()


# In the middle of its times


def test_from_the_middle_of_its_times_it_is_a_fresh_start_there(unet, ems):
    """Image-to-image begins at a later time: with order 1, and with what the later times alone would give."""
    options = {"corrector": "full"}
    scheduler = DPMSolverV3Scheduler(ems, **options)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    ends = []
    for says in (False, True):
        scheduler.set_timesteps(8)
        x, later = noise, scheduler.timesteps[4:]
        if says:
            scheduler.set_begin_index(4)
        for t in later:
            x = scheduler.step(unet(x, t).sample, t, x).prev_sample
        ends.append(x)
    plan = make_plan(ems, VP, 8, SolverConfig(**options), first=4)
    solver, x = Multistep(plan.to(noise)), noise
    for t in plan.times[:-1]:
        x = solver.step(unet(x, VP.timestep(t)).sample, x)
    assert [len(each.of_f) for each in plan.predictors] == [1, 2, 2, 1]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], x)
    scheduler.set_timesteps(8)
    with pytest.raises(ValueError, match="begin_index is 8; expected 0 to 7"):
        scheduler.set_begin_index(8)


@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
def test_diffusers_own_pipelines_that_begin_in_the_middle_run_with_it(kind):
    torch.manual_seed(0)
    net = text_unet()
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    base = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, clip_sample=False)
    schedule = NoiseSchedule.from_diffusers(base)
    scheduler = DPMSolverV3Scheduler.from_config(base.config, ems=EMS.data_prediction(grid(120, schedule)), corrector="full")
    make = {"img2img": StableDiffusionImg2ImgPipeline, "inpaint": StableDiffusionInpaintPipeline}[kind]
    pipeline = make(
        vae=vae, text_encoder=None, tokenizer=None, unet=net, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    words = {"prompt_embeds": torch.randn(1, 4, 8), "negative_prompt_embeds": torch.randn(1, 4, 8)}
    more = {"mask_image": torch.ones(1, 1, 8, 8), "height": 8, "width": 8} if kind == "inpaint" else {}
    draw = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 8, 8)
    for strength in (0.5, 1.0):
        found = pipeline(image=image, strength=strength, num_inference_steps=8, generator=draw, output_type="pt", **words, **more).images
        assert found.isfinite().all()
        assert found.shape == (1, 3, 8, 8)


def test_what_is_painted_over_between_steps_stays_so_under_the_corrector(ems):
    scheduler = DPMSolverV3Scheduler(ems, corrector="full")
    scheduler.set_timesteps(6)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
    painted = x.clone()
    painted[..., :4] += 100
    scheduler.step(torch.tanh(x), scheduler.timesteps[2], painted)
    assert scheduler._solver.x is not None
    assert torch.equal(scheduler._solver.x[..., :4], painted[..., :4])
    assert not torch.isclose(scheduler._solver.x[..., 4:], x[..., 4:]).any(), "the rest is corrected"


def test_a_pipeline_is_saved_with_it_and_opened_again(unet, tmp_path):
    schedule = NoiseSchedule.from_diffusers(DDPMScheduler())
    scheduler = DPMSolverV3Scheduler.from_config(DDPMScheduler().config, ems=EMS.data_prediction(grid(120, schedule)))
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is DPMSolverV3Scheduler
    assert torch.equal(again.scheduler.ems.l, scheduler.ems.l)


# Half precision


HARD = GaussianMixture(
    torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 2,
    torch.full((8,), 1 / 8).double(),
    torch.full((8, 8), 0.04).double(),
)


@pytest.fixture(scope="module")
def hard_ems() -> EMS:
    draw = torch.Generator().manual_seed(0)
    return estimate_ems(
        lambda x, t: HARD.epsilon(x, VP.lambda_(t)), VP, HARD.draw(64, draw), 60, 64, generator=draw, progress=False, mode="forward"
    )


def run_in(dtype: torch.dtype, answers_in: torch.dtype, ems: EMS, calls: int = 5, **options) -> float:
    """The error against the exact flow of a pipeline in `dtype` whose network answers in another type."""
    noise = torch.randn(128, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, last = (torch.tensor(each, dtype=torch.float64) for each in (VP.t_max, VP.t_min))
    (alpha, sigma), (alpha_end, sigma_end) = ((float(VP.alpha(t)), float(VP.sigma(t))) for t in (first, last))
    exact = alpha_end * flow(HARD, noise / alpha, sigma / alpha, sigma_end / alpha_end)
    scheduler = DPMSolverV3Scheduler(ems, **options)
    scheduler.set_timesteps(calls)
    x = noise.to(dtype)
    for t in scheduler.timesteps:
        eps = HARD.epsilon(x.double(), VP.lambda_(VP.time(t))).to(answers_in)
        x = scheduler.step(eps, t, x).prev_sample
        assert x.dtype == dtype
    return error(x.double(), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_costs_nothing_where_the_network_answers_in_single(dtype, hard_ems):
    for options in ({}, {"corrector": "full", "pseudo_predictor": True}):
        exact = run_in(torch.float64, torch.float64, hard_ems, **options)
        assert run_in(torch.float32, torch.float32, hard_ems, **options) == pytest.approx(exact, rel=1e-2)
        assert run_in(dtype, torch.float32, hard_ems, **options) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_that_costs_more_than_it_gains_is_told(dtype, hard_ems):
    exact = run_in(torch.float64, torch.float64, hard_ems)
    with pytest.warns(UserWarning, match=r"answers in b?float16, whose rounding alone moves a step by"):
        assert run_in(dtype, dtype, hard_ems) > 1.5 * exact
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"solver_order": 1}, {"calls": 20}):
            exact = run_in(torch.float64, torch.float64, hard_ems, **options)
            assert run_in(dtype, dtype, hard_ems, **options) < 1.2 * exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_function_in_half_precision_is_the_scheduler(dtype, hard_ems):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return HARD.epsilon(x.float(), VP.lambda_(t))

    scheduler = DPMSolverV3Scheduler(hard_ems, corrector="full")
    scheduler.set_timesteps(5)
    state = x
    for t in scheduler.timesteps:
        state = scheduler.step(eps(state, VP.time(t)), t, state).prev_sample
    assert torch.equal(state, sample(eps, x, VP, hard_ems, 5, corrector="full"))


def test_a_scheduler_and_its_statistics_can_be_copied(ems):
    scheduler = DPMSolverV3Scheduler(ems, corrector="full")
    scheduler.set_timesteps(3)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        first, second = (each.step(x, scheduler.timesteps[0], x).prev_sample for each in (scheduler, twin))
        assert torch.equal(first, second)
        scheduler.restart()
