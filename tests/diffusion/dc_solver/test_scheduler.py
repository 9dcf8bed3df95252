"""The scheduler against diffusers' own, by hand, and in its pipelines."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from dc_models import RATIOS, guided_model, noise_model, noises, sampled, states
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from fewer.diffusion import DCSolverMultistepScheduler, compensate
from fewer.diffusion.dc_solver.unipc import combination


@pytest.mark.parametrize("scale", [None, 4.0])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("words", [{}, {"predict_x0": False}, {"lower_order_final": False}, {"disable_corrector": [0, 3]}], ids=str)
def test_with_all_ratios_1_it_is_diffusers_unipc(scale, kind, order, words):
    words = {"solver_order": order, "solver_type": kind} | words
    model, x = (noise_model() if scale is None else guided_model(scale)), noises().float()
    theirs = UniPCMultistepScheduler(**words, final_sigmas_type="sigma_min")
    ours = DCSolverMultistepScheduler(**words, ratios=[1] * 6)
    wanted = sampled(theirs, 6, x, model)
    hard = {"predict_x0", "lower_order_final"} & set(words)  # where float32 is amplified: by the ratio of the alphas, by the last step
    assert (sampled(ours, 6, x, model) - wanted).abs().max() < (1e-4 if hard else 1e-5) * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_it_is_unipc_on_every_spacing_and_to_the_clean_image(spacing):
    for end in ("sigma_min", "zero"):
        words = {"timestep_spacing": spacing, "final_sigmas_type": end}
        x = noises().float()
        ours, theirs = (sampled(kind(**words), 7, x) for kind in (DCSolverMultistepScheduler, UniPCMultistepScheduler))
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_without_the_corrector_it_is_dpm_solver_plus_plus(order):
    theirs = DPMSolverMultistepScheduler(solver_order=order, solver_type="midpoint", final_sigmas_type="sigma_min")
    ours = DCSolverMultistepScheduler(solver_order=order, use_corrector=False)
    assert torch.allclose(sampled(ours, 6, noises().float()), sampled(theirs, 6, noises().float()), atol=1e-5)


@pytest.mark.parametrize("grid", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_its_own_grids_end_without_a_step_of_length_0(grid):
    scheduler = DCSolverMultistepScheduler(**{grid: True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        end = sampled(scheduler, 6, noises())
    assert len(scheduler.timesteps) == 6
    assert end.isfinite().all()
    assert float(scheduler.sigmas[-1]) == pytest.approx(float(UniPCMultistepScheduler().sigmas[0]), rel=1e-4)


def test_a_ratio_changes_nothing_before_the_end_of_its_step():
    for i in (2, 3, 5):
        shifted = [1.0] * 6
        shifted[i] += 0.3
        plain, moved = (states(DCSolverMultistepScheduler(ratios=ratios), 6, noises()) for ratios in (None, shifted))
        assert all(torch.equal(a, b) for a, b in zip(plain[: i + 1], moved[: i + 1], strict=True))
        assert not torch.allclose(plain[i + 1], moved[i + 1], atol=1e-4)


@pytest.mark.parametrize(("k", "early"), [(1, 1), (2, 1), (3, 2)])
def test_a_ratio_before_there_are_outputs_enough_is_refused(k, early):
    with pytest.raises(ValueError, match=rf"not 1 at the steps \[{early}\]"):
        DCSolverMultistepScheduler(dc_order=k, ratios=[1.0] * early + [1.1] + [1.0] * 5)


def test_the_compensated_output_stays_in_the_buffer():
    """A corrector by hand, from the compensated output and from the raw one."""
    scheduler, model = DCSolverMultistepScheduler(ratios=[1, 1, 1.4, 1, 1, 1]), noise_model()
    scheduler.set_timesteps(6)
    x, raw = noises(), []
    for i, t in enumerate(scheduler.timesteps[:3]):
        raw.append(scheduler.converted(model(x, t), x, i))
        x = scheduler.step(model(x, t), t, x).prev_sample
    solver, before = scheduler.solver, scheduler._state
    newest = compensate(raw[::-1], [float(t) for t in scheduler.timesteps[:3]][::-1], 1.4)
    t = scheduler.timesteps[3]
    output = scheduler.converted(model(x, t), x, 3)
    scheduler.step(model(x, t), t, x)
    of_x, of_outputs = combination(solver.levels[2], solver.levels[3], [solver.levels[1]], corrects=True)

    def corrected(m):
        return of_x * before.x + of_outputs[0] * m + of_outputs[1] * raw[1] + of_outputs[2] * output

    assert torch.allclose(scheduler._state.x, corrected(newest), atol=1e-6)
    assert not torch.allclose(scheduler._state.x, corrected(raw[2]), atol=1e-3)
    assert torch.equal(before.outputs[0], newest)


def test_a_call_a_step_and_the_same_images_again():
    calls = []

    def counted(x, t):
        calls.append(int(t))
        return noise_model()(x, t)

    scheduler = DCSolverMultistepScheduler(ratios=RATIOS)
    first = sampled(scheduler, 6, noises(), counted)
    assert len(calls) == 6
    assert torch.equal(sampled(scheduler, 6, noises()), first)
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert torch.equal(sampled(twin, 6, noises()), first)


@pytest.mark.parametrize("order", [2, 3])
def test_every_dtype_gives_its_samples(order):
    scheduler = DCSolverMultistepScheduler(solver_order=order, ratios=RATIOS)
    exact = sampled(scheduler, 6, noises())
    assert exact.dtype == torch.float64
    assert {each.dtype for each in (scheduler._state.x, *scheduler._state.outputs)} == {torch.float64}, "kept as finely as given"
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 2e-1)):

        def model(x, t):
            return noise_model()(x.double(), t).to(x.dtype)

        found = sampled(scheduler, 6, noises().to(dtype), model)
        assert found.dtype == dtype
        assert torch.allclose(found.double(), exact, atol=tolerance), dtype
    x = noises(32)[::2]  # not contiguous
    assert torch.allclose(sampled(scheduler, 6, x)[:1], sampled(scheduler, 6, x[:1]), atol=1e-12)


def test_it_is_saved_and_loaded_with_its_ratios(tmp_path):
    scheduler = DCSolverMultistepScheduler(ratios=RATIOS, solver_order=3, use_corrector=False)
    scheduler.save_pretrained(tmp_path)
    again = DCSolverMultistepScheduler.from_pretrained(tmp_path)
    assert torch.equal(sampled(again, 6, noises()), sampled(scheduler, 6, noises()))
    assert again.config["ratios"] == RATIOS


def test_other_configs_end_where_ratios_are_searched_unless_told_otherwise():
    config = UniPCMultistepScheduler(beta_schedule="scaled_linear", timestep_spacing="leading").config
    scheduler = DCSolverMultistepScheduler.from_config(config)
    assert (scheduler.config["final_sigmas_type"], scheduler.config["timestep_spacing"]) == ("sigma_min", "leading")
    assert DCSolverMultistepScheduler.from_config(config, final_sigmas_type="zero").config["final_sigmas_type"] == "zero"
    own = DCSolverMultistepScheduler(final_sigmas_type="zero")
    assert DCSolverMultistepScheduler.from_config(own.config).config["final_sigmas_type"] == "zero"
    with pytest.warns(UserWarning, match="solver_type 'midpoint' is DPM-Solver's; 'bh2' is taken"):
        assert DCSolverMultistepScheduler(solver_type="midpoint").config["solver_type"] == "bh2"
    assert DCSolverMultistepScheduler.from_config(DPMSolverMultistepScheduler().config).config["solver_type"] == "bh2"


def test_pipelines_of_diffusers_run_with_it(unet):
    steps = 6
    for scheduler, same in ((DCSolverMultistepScheduler(), True), (DCSolverMultistepScheduler(ratios=RATIOS), False)):
        pipeline = DDPMPipeline(unet, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        theirs = DDPMPipeline(unet, UniPCMultistepScheduler(final_sigmas_type="sigma_min"))
        theirs.set_progress_bar_config(disable=True)

        def end(which):
            """The state after the last step, before the pipeline cuts it to pixels."""
            step, ends = which.scheduler.step, []

            def kept(*args, generator=None, **words):  # DDPM's pipeline hands its generator on, which UniPC does not take
                ends.append(step(*args, **words))
                return ends[-1]

            which.scheduler.step = kept
            which(batch_size=2, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))
            return ends[-1].prev_sample

        ours, wanted = end(pipeline), end(theirs)
        assert bool((ours - wanted).abs().max() < 1e-5 * wanted.abs().max()) is same
    plain = DDPMPipeline(unet, DCSolverMultistepScheduler())
    plain.set_progress_bar_config(disable=True)
    assert plain(batch_size=1, num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 1)


def test_image_to_image_begins_in_the_middle():
    """As UniPC does there; ratios wait until there are outputs enough."""
    x, model = noises().float(), noise_model()
    ends = []
    for scheduler in (
        DCSolverMultistepScheduler(),
        UniPCMultistepScheduler(final_sigmas_type="sigma_min"),
        DCSolverMultistepScheduler(ratios=RATIOS),
    ):
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(2)
        state = x
        for t in scheduler.timesteps[2:]:
            state = scheduler.step(model(state, t), t, state, return_dict=False)[0]
        ends.append(state)
    assert torch.allclose(ends[0], ends[1], atol=1e-5)
    assert ends[2].isfinite().all()
    assert not torch.allclose(ends[0], ends[2], atol=1e-4)


@pytest.mark.parametrize(
    ("words", "steps", "message"),
    [
        ({"dc_order": 0}, 6, "dc_order"),
        ({"dc_order": 4}, 6, "dc_order"),
        ({"ratios": [1, 1, 1.1]}, 3 + 3, "3 ratios for 6 steps"),
        ({"ratios": [1, 1, float("nan"), 1, 1, 1]}, 6, "expected finite numbers"),
        ({"ratios": [1, 1]}, 2, None),
        ({"ratios": [1, 1, 1.2], "dc_order": 3}, 3, "not 1 at the steps"),
        ({"solver_type": "bh3"}, 6, "solver_type"),
        ({"solver_order": 0}, 6, "solver_order"),
        ({"final_sigmas_type": "zero", "lower_order_final": False}, 6, "expected 'sigma_min'"),
    ],
)
def test_settings_that_cannot_be_are_refused(words, steps, message):
    if message is None:
        DCSolverMultistepScheduler(**words).set_timesteps(steps)
        return
    with pytest.raises(ValueError, match=message):
        DCSolverMultistepScheduler(**words).set_timesteps(steps)


def test_too_few_steps_for_a_ratio_and_steps_out_of_turn_are_refused():
    scheduler = DCSolverMultistepScheduler(dc_order=1, ratios=[1, 1, 1.3])
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="3 ratios for 2 steps"):
        scheduler.set_timesteps(2)
    x = noises()
    with pytest.raises(ValueError, match="call set_timesteps"):
        DCSolverMultistepScheduler().step(x, 999, x)
    plain = DCSolverMultistepScheduler()
    sampled(plain, 2, x)
    with pytest.raises(ValueError, match="step after the last of 2"):
        plain.step(x, 0, x)


@pytest.mark.parametrize("config", [{"use_flow_sigmas": True}, {"prediction_type": "flow_prediction"}, {"use_dynamic_shifting": True}])
def test_configs_of_flow_matching_are_refused_by_name(config):
    with pytest.raises(ValueError, match="flow_prediction|use_"):
        DCSolverMultistepScheduler.from_config(dict(UniPCMultistepScheduler().config) | config)
