"""Samplers, inversion and the scheduler, on flows that are known, and in diffusers' pipelines."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from flows import EPS, bent, end_of_bent, randn
from hosts import drops_into_pipelines, write_pipelines
from torch import nn

from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion.rectified_flow_plus import ReflowScheduler, VelocityFromVP, invert, sample, slerp, straightness

WAYS = list(itertools.product(["euler", "heun"], ["default", "new"]))


@pytest.mark.parametrize(("solver", "update"), WAYS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_straight_paths_end_right_after_any_number_of_steps(solver, update, steps):
    z, c = randn(4, 3), randn(4, 3, seed=1) * 5
    end = sample(lambda x, t: c, z, steps, solver, update)
    assert (end - (1 - EPS) * (z - c)).abs().max() < 2e-5 * c.abs().max()


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_updates_agree_for_one_and_two_steps_and_not_for_four(solver):
    z = randn(50, 2)
    gaps = [float((sample(bent, z, steps, solver) - sample(bent, z, steps, solver, "new")).abs().max()) for steps in (1, 2, 4)]
    assert gaps[0] < 1e-4
    assert gaps[1] < 1e-4
    assert gaps[2] > 1e-2


@pytest.mark.parametrize(("solver", "low", "high"), [("euler", 0.95, 1.05), ("heun", 1.95, 2.15)])
def test_the_default_update_converges_at_its_order(solver, low, high):
    z = randn(40, 1)
    exact = end_of_bent((1 - EPS) * z)
    errors = [float((sample(bent, z, steps, solver) - exact).square().mean().sqrt()) for steps in (16, 32, 64, 128)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(low <= slope <= high for slope in slopes), slopes


def test_the_new_update_does_not_come_to_the_flows_end():
    z = randn(40, 1)
    exact = end_of_bent((1 - EPS) * z)
    gaps = [float((sample(bent, z, steps, "euler", "new") - exact).abs().max()) for steps in (16, 128)]
    assert gaps[1] > 0.05
    assert gaps[1] > gaps[0]


def test_calls_are_n_and_two_n_minus_one_and_never_at_the_ends():
    for solver, steps in itertools.product(["euler", "heun"], [1, 2, 5]):
        asked = []

        def noted(x, t, asked=asked):
            asked.append(float(t))
            return bent(x, t)

        sample(noted, randn(2, 3), steps, solver)
        assert len(asked) == (steps if solver == "euler" else 2 * steps - 1)
        assert asked[0] == 1 - EPS
        assert min(asked) > 0
        del asked[:]
        invert(noted, randn(2, 3), steps, solver)
        assert len(asked) == (steps if solver == "euler" else 2 * steps - 1)
        assert asked[0] == 1e-3
        assert max(asked) < 1


def test_a_round_trip_comes_back():
    x = randn(60, 1)

    def error(**words):
        return float((sample(bent, invert(bent, x, 200, "heun", noise=0.0, **words), 200, "heun") - x).square().mean().sqrt())

    assert error(t_start=1e-5) < 1e-4
    assert 5e-4 < error() < 2e-3


def test_the_noise_of_an_inversion_is_drawn_from_its_generator():
    x = randn(4, 2)
    ends = [invert(bent, x, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(ends[0], ends[1])
    assert 1e-5 < float((ends[0] - ends[2]).abs().max()) < 0.05


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_an_inversion_on_straight_paths_begins_beside_the_image(solver):
    x, c = randn(4, 3), randn(4, 3, seed=1)
    for steps in (1, 5):
        assert torch.allclose(invert(lambda x, t: c, x, steps, solver, noise=0.0), (1 - 1e-3) * (x + c), atol=1e-12)


def test_straightness_is_the_mean_square_of_the_velocity_beside_the_chord():
    def turns(x, t):  # 1, then 3; the chord is 2
        return torch.full_like(x, 1.0 if t > 0.6 else 3.0)

    assert straightness(turns, randn(5, 3), 2) == pytest.approx(1, abs=1e-3)


def test_straightness_is_0_for_one_step_and_for_straight_paths():
    z = randn(20, 3)
    assert straightness(bent, z, 1) < 1e-20
    assert straightness(lambda x, t: torch.ones_like(x), z, 8) < 1e-9
    assert straightness(bent, z, 8) > 1e-3


def test_every_type_keeps_its_precision_and_nothing_is_changed():
    z = randn(8, 3)
    exact = sample(bent, z, 4)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        given = z.to(dtype)
        kept = given.clone()
        end = sample(lambda x, t: bent(x.double(), t.double()).to(x.dtype), given, 4)
        assert end.dtype == dtype
        assert (end.double() - exact).abs().max() < tolerance
        assert torch.equal(given, kept)
    assert torch.equal(sample(bent, z[::2], 4), exact[::2])
    assert torch.equal(sample(bent, z[:1], 4), exact[:1])


def test_a_model_samples_in_eval_mode_and_gets_its_mode_back():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x, t):
            return self.drop(bent(x, t))

    model, z = Dropped().train(), randn(6, 3)
    assert torch.equal(sample(model, z, 3), sample(bent, z, 3))
    assert torch.equal(invert(model, z, 3, noise=0.0), invert(bent, z, 3, noise=0.0))
    assert straightness(model, z, 3) == straightness(bent, z, 3)
    assert model.training
    assert model.drop.training


def test_the_arc_between_noises_keeps_their_norm():
    a, b = randn(5, 3, 4), randn(5, 3, 4, seed=1)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).reshape(-1, 1, 1)
    for share in (0.0, 0.3, 1.0):
        assert torch.allclose(slerp(a, b, share).flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    assert torch.allclose(slerp(a, b, 0.0), a)
    assert torch.allclose(slerp(a, b, 1.0), b)
    assert torch.allclose(slerp(a, a, 0.4), a)


# The scheduler


def looped(scheduler, model, x, steps):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("update", ["default", "new"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_schedulers_loop_is_the_function(update, steps):
    z = randn(6, 3)
    scheduler = ReflowScheduler(update=update, num_train_timesteps=1)
    assert torch.allclose(
        looped(scheduler, bent, z * scheduler.init_noise_sigma, steps), sample(bent, z, steps, "euler", update), atol=1e-12
    )
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(looped(twin, bent, z, steps), looped(scheduler, bent, z, steps))


@pytest.mark.parametrize("update", ["default", "new"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_network_with_betas_samples_as_its_velocity_does(unet, update, kind):
    """In diffusers' loop and pipeline, which know nothing of flows."""
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    exact = (2 * NoiseSchedule.from_diffusers(DDPMScheduler()).log_alphas).exp()  # diffusers' own are float32, and alpha is near 0 at first
    wanted = sample(VelocityFromVP(unet, exact, kind), noise, 4, "euler", update)
    scheduler = ReflowScheduler.from_config(DDPMScheduler(prediction_type=kind).config, update=update)
    end = looped(scheduler, lambda x, t: unet(x, t).sample, noise, 4)
    assert (end - wanted).abs().max() < 1e-3 * wanted.abs().max()
    pipeline = DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=4, output_type="pt").images
    assert torch.equal(images, (end / 2 + 0.5).clamp(0, 1))


def test_it_drops_into_pipelines_with_text_guidance_and_labels(tmp_path):
    write_pipelines(tmp_path)
    drops_into_pipelines(tmp_path, lambda config: ReflowScheduler.from_config(config, update="new"), steps=3)


def test_on_a_flow_it_takes_the_steps_of_flow_matching():
    theirs, ours = FlowMatchEulerDiscreteScheduler(), ReflowScheduler.from_config(FlowMatchEulerDiscreteScheduler().config)
    theirs.set_timesteps(sigmas=[1 - EPS, 0.75, 0.5, 0.25])
    ours.set_timesteps(4)
    assert torch.allclose(ours.timesteps.float(), theirs.timesteps, atol=1e-3)
    x = y = randn(2, 1, 4, 4).float()
    for t, s in zip(ours.timesteps, theirs.timesteps, strict=True):
        x, y = ours.step(bent(x, t / 1000), t, x).prev_sample, theirs.step(bent(y, s / 1000), s, y).prev_sample
    assert torch.allclose(x, y, atol=1e-5)
    noise, clean, times = randn(3, 2), randn(3, 2, seed=1), torch.tensor([100.0, 500.0, 900.0])
    t = times[:, None].double() / 1000
    assert torch.allclose(ours.add_noise(clean, noise, times), (1 - t) * clean + t * noise)


def test_begun_in_the_middle_it_takes_its_own_guess_for_the_noise():
    scheduler = ReflowScheduler(update="new", num_train_timesteps=1)
    c, z = randn(3, 2), randn(3, 2, seed=1)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    x = z - 0.5 * c  # at t = 0.5 on a straight path
    for t in scheduler.timesteps[2:]:
        x = scheduler.step(c, t, x).prev_sample
    assert torch.allclose(x, z - c, atol=1e-9)


def test_it_is_saved_and_opened_in_a_pipeline(unet, tmp_path):
    scheduler = ReflowScheduler(update="new", prediction_type="epsilon", trained_betas=DDPMScheduler().betas.tolist())
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert all(again.scheduler.config[name] == scheduler.config[name] for name in ("update", "prediction_type", "trained_betas"))
    twin = ReflowScheduler.from_config(scheduler.config)
    z = randn(1, 1, 8, 8).float()
    assert torch.equal(looped(twin, lambda x, t: 0.1 * x, z, 3), looped(again.scheduler, lambda x, t: 0.1 * x, z, 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sample(bent, randn(2, 2), 0), "steps is 0"),
        (lambda: sample(bent, randn(2, 2), 2, "rk4"), "solver is 'rk4'"),
        (lambda: sample(bent, randn(2, 2), 2, "euler", "newer"), "did you mean 'new'"),
        (lambda: sample(lambda x, t: x[:, :1], randn(2, 2), 2), r"answers \(2, 1\); expected \(2, 2\)"),
        (lambda: invert(bent, randn(2, 2), 2, update="new"), 'expected update="default"'),
        (lambda: invert(bent, torch.zeros(2, 2, dtype=torch.uint8), 2), "scale bytes"),
        (lambda: invert(bent, randn(2, 2), 2, t_start=0.5), "t_start is 0.5"),
        (lambda: invert(bent, randn(2, 2), 2, noise=-1.0), "noise is -1"),
        (lambda: ReflowScheduler(update="x"), "update is 'x'"),
        (lambda: ReflowScheduler(prediction_type="score"), "prediction_type"),
        (lambda: ReflowScheduler().set_timesteps(0), "num_inference_steps is 0"),
        (lambda: ReflowScheduler().step(randn(1, 2), 1.0, randn(1, 2)), "call set_timesteps"),
        (lambda: ReflowScheduler.from_config(EDMEulerScheduler().config), "EDM"),
        (lambda: ReflowScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config), "shift=3.0"),
        (lambda: ReflowScheduler.from_config(dict(DDPMScheduler(thresholding=True).config)), "thresholding"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_flows_own_schedule_is_one():
    schedule = ReflowScheduler(num_train_timesteps=10).schedule
    assert isinstance(schedule, NoiseSchedule)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert torch.allclose(schedule.alpha(t) + schedule.sigma(t), torch.ones(3).double())
    assert torch.allclose(schedule.inverse(schedule.lambda_(t)), t)
    assert torch.allclose(schedule.time(schedule.timestep(t)), t)
