"""Schedules as samplers: against diffusers' solvers, a counting hook, and in diffusers' pipelines."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from exact_flows import EDM, error, flow, noise_of, randn
from hosts import drops_into_pipelines
from schedules import DATA, EMS_OF_NONE, EPS, MEAN, Counted, implicit, plain, random_schedules

from fewer.diffusion import SolverSchedule, StepDecision, USFScheduler
from fewer.diffusion._shared import NoiseSchedule
from fewer.diffusion._shared.peers import by_diffusers
from fewer.diffusion._shared.spacing import noise_levels
from fewer.diffusion.solver_search import sample
from fewer.diffusion.solver_search.solver import Solver, make_plan
from fewer.tasks.digit_sampling import follow_levels

NOISE = 20 * randn(32, 3)
VP = NoiseSchedule.from_diffusers(DDPMScheduler())
DENOISE = DATA.denoiser


def sampled(schedule: SolverSchedule, x: torch.Tensor = NOISE, eps=EPS, **words) -> torch.Tensor:
    return sample(eps, x, schedule, EDM, EMS_OF_NONE, MEAN, **words)


def vp_eps(x, t):
    alpha, sigma = (value.to(x.dtype) for value in (VP.alpha(VP.time(t)), VP.sigma(VP.time(t))))
    return (x - alpha * DATA.denoiser(x / alpha, sigma / alpha)) / sigma


def looped(scheduler, x, model=vp_eps):
    scheduler.set_timesteps(scheduler.solver_schedule.nfe)
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)[0]
    return x


def by_updates(order: int, x: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """diffusers' own updates in float64; its `step` rounds the sample to float32."""
    scheduler = DPMSolverMultistepScheduler(solver_order=2, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas, outputs = sigmas, []
    alphas = (1 + sigmas**2).rsqrt()
    state = x * alphas[0]
    for i, (sigma, alpha) in enumerate(zip(sigmas[:-1], alphas, strict=False)):
        scheduler._step_index = i
        eps = (state / alpha - DENOISE(state / alpha, sigma)) / sigma
        outputs.append(scheduler.convert_model_output(eps, sample=state))
        if order == 1 or i in (0, len(sigmas) - 2):  # lower_order_final
            state = scheduler.dpm_solver_first_order_update(outputs[-1], sample=state)
        else:
            state = scheduler.multistep_dpm_solver_second_order_update(outputs[-2:], sample=state)
    return state / alphas[-1]


@pytest.mark.parametrize(("name", "order"), [("dpm++2m", 2), ("ddim", 1)])
def test_2m_and_ddim_are_diffusers_on_the_same_lambdas(name, order):
    ours = sampled(SolverSchedule.preset(name, 7, EDM))
    assert (ours - by_updates(order, NOISE, noise_levels(20.0, 0.02, 7))).abs().max() < 1e-9
    assert (ours - by_diffusers(name, DENOISE, NOISE, noise_levels(20.0, 0.02, 7))).abs().max() < 1e-5


def test_ddim_is_diffusers_ddim_scheduler():
    ddim = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(5)
    times = [*ddim.timesteps.tolist(), 999 - 5 * 200]
    x = randn(8, 3)
    levels = [VP.time(max(t, 0)) for t in times]
    schedule = SolverSchedule(tuple(float(VP.lambda_(t)) for t in levels), (StepDecision("data", 1),) * 5)
    theirs = x
    for t in ddim.timesteps:
        theirs = ddim.step(vp_eps(theirs, t), int(t), theirs, eta=0.0).prev_sample
    ours = sample(lambda x, t: vp_eps(x, VP.timestep(t)), x, schedule, VP)
    assert (ours - theirs).abs().max() < 1e-5


def test_unipc_2_is_diffusers_without_its_corrector():
    unipc = UniPCMultistepScheduler(solver_order=2, solver_type="bh2", final_sigmas_type="sigma_min", disable_corrector=list(range(9)))
    unipc.set_timesteps(7)
    theirs = follow_levels(unipc, DENOISE, NOISE, noise_levels(20.0, 0.02, 7))
    schedule = SolverSchedule.preset("unipc-2", 7, EDM)
    bare = replace(schedule, steps=tuple(replace(step, corrector="none") for step in schedule.steps))
    assert (sampled(bare) - theirs).abs().max() < 1e-9
    assert error(sampled(schedule), theirs) > 1e-4


def test_singlestep_is_diffusers_dpm_solver_2():
    theirs = DPMSolverSinglestepScheduler(solver_order=2, algorithm_type="dpmsolver", final_sigmas_type="sigma_min")
    theirs.set_timesteps(6)
    wanted = follow_levels(theirs, DENOISE, NOISE, noise_levels(20.0, 0.02, 6))
    assert (sampled(SolverSchedule.preset("dpm-solver-2", 6, EDM)) - wanted).abs().max() < 1e-8


def test_the_presets_calls_are_their_number_and_odd_ones_end_with_order_1():
    for nfe in (1, 2, 5):
        schedule = SolverSchedule.preset("dpm-solver-2", nfe, EDM).validate()
        assert schedule.nfe == nfe
        assert schedule.steps[-1].order == (1 if nfe % 2 else 2)


def test_the_2m_preset_is_diffusers_through_the_scheduler():
    scheduler = USFScheduler(SolverSchedule.preset("dpm++2m", 6, VP))
    theirs = DPMSolverMultistepScheduler(solver_order=2, final_sigmas_type="sigma_min")
    theirs.set_timesteps(6)
    x = randn(8, 3)
    ours = looped(scheduler, x)
    sigmas = torch.exp(-torch.tensor(scheduler.solver_schedule.lambdas, dtype=torch.float64))
    state = follow_levels(theirs, DENOISE, x * (1 + sigmas[0] ** 2).sqrt(), sigmas)
    assert (ours * (1 + sigmas[-1] ** 2).sqrt() - state).abs().max() < 1e-5


def test_two_hundred_random_solvers_cost_their_nfe_and_stay_finite():
    x = NOISE[:4]
    for i, schedule in enumerate(random_schedules(200)):
        tried = implicit(schedule, 1) if i % 4 == 0 else schedule
        network = Counted()
        assert sampled(tried, x, network).isfinite().all()
        assert network.calls == tried.nfe == len(tried.steps) - (tried.afs != "none") + (i % 4 == 0)


def corrected(kind: str) -> SolverSchedule:
    schedule = plain(1, 2, 2)
    return replace(schedule, steps=tuple(replace(step, corrector=kind if i < 2 else "none") for i, step in enumerate(schedule.steps)))


def test_a_pseudo_corrector_moves_the_state_and_keeps_the_values():
    plan = make_plan(corrected("pseudo"), EDM)
    bare = make_plan(plain(1, 2, 2), EDM)
    solvers = [Solver(each) for each in (plan, bare)]
    for solver in solvers:
        state = NOISE
        for i in (0, 1):
            state = solver.step(EPS(state, plan.times[i]), state)
    assert torch.equal(solvers[0].values[1]["noise"], solvers[1].values[1]["noise"])
    assert torch.equal(solvers[0].values[1]["data"], solvers[1].values[1]["data"])
    assert (solvers[0].states[1] - solvers[1].states[1]).abs().max() > 1e-3
    assert torch.equal(solvers[0].values[1].x, solvers[1].states[1]), "the values belong to the uncorrected state"


def test_an_implicit_corrector_calls_again_at_the_corrected_state():
    network, pseudo = Counted(), Counted()
    implicit_end, pseudo_end = sampled(corrected("implicit"), NOISE, network), sampled(corrected("pseudo"), NOISE, pseudo)
    assert (network.calls, pseudo.calls) == (5, 3)
    assert network.times[1] == network.times[2]
    assert error(implicit_end, pseudo_end) > 1e-4


def test_a_better_corrected_solver_is_nearer_to_the_exact_flow():
    exact = flow(DATA, NOISE, 20.0, 0.02)
    errors = [error(sampled(SolverSchedule.preset(name, 12, EDM)), exact) for name in ("ddim", "dpm++2m", "unipc-2")]
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


def test_afs_is_a_run_whose_network_sees_nothing_at_the_first_call():
    schedule = plain(1, 2, 2)

    def blind(x, t):
        return x / t if float(t) == float(EDM.inverse(torch.tensor(-2.9, dtype=torch.float64))) else EPS(x, t)

    def average(x, t):
        return (x - MEAN) / t if float(t) == float(EDM.inverse(torch.tensor(-2.9, dtype=torch.float64))) else EPS(x, t)

    network = Counted()
    zero = sampled(replace(schedule, afs="zero_x0"), NOISE, network)
    assert network.calls == 2
    assert torch.allclose(zero, sampled(schedule, NOISE, blind), atol=1e-12)
    assert torch.allclose(sampled(replace(schedule, afs="average_x0")), sampled(schedule, NOISE, average), atol=1e-12)


def test_at_a_sigma_of_ten_thousand_afs_changes_nothing_that_counts():
    wide = NoiseSchedule.edm(0.02, 1e4)
    centred = replace(DATA, means=DATA.means - MEAN)
    x = 1e4 * randn(32, 3)
    schedule = SolverSchedule(
        tuple(float(-torch.tensor(s).double().log()) for s in (1e4, 3e3, 10, 1, 0.02)), (StepDecision("data", 1),) * 4
    )
    ends = [sample(noise_of(centred), x, replace(schedule, afs=afs), wide) for afs in ("none", "zero_x0")]
    assert error(*ends) < 1e-3


def test_json_gives_the_same_samples_bit_for_bit(tmp_path):
    for i, schedule in enumerate(random_schedules(10)):
        again = SolverSchedule.from_json(schedule.to_json())
        assert again == schedule
        assert torch.equal(sampled(again, NOISE[:4]), sampled(schedule, NOISE[:4]))
        schedule.save(tmp_path / f"{i}.json")
        assert SolverSchedule.load(tmp_path / f"{i}.json") == schedule
        assert len(schedule.table().splitlines()) == len(schedule.steps) + 1


def test_lists_and_numbers_of_numpy_are_those_of_python():
    schedule = plain(1, 2, 2)
    listed = SolverSchedule(np.array(schedule.lambdas), list(schedule.steps))
    assert listed == schedule
    assert hash(listed) == hash(schedule)
    single = SolverSchedule(tuple(np.float32(each) for each in schedule.lambdas), schedule.steps)
    assert SolverSchedule.from_json(single.to_json()) == single
    with pytest.raises(ValueError, match="no JSON can be made"):
        replace(schedule, meta={"model": object()}).to_json()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_gives_its_samples(dtype):
    schedule = replace(SolverSchedule.preset("unipc-2", 5, VP), afs="zero_x0")
    exact = sample(lambda x, t: vp_eps(x, VP.timestep(t)), randn(8, 3), schedule, VP)
    x = randn(16, 3).to(dtype)[::2]
    x.copy_(randn(8, 3))  # not contiguous
    before = x.clone()
    found = sample(lambda x, t: vp_eps(x.double(), VP.timestep(t)).to(dtype), x, schedule, VP)
    assert found.dtype == dtype
    assert torch.equal(x, before)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.5}[dtype]
    assert (found.double() - exact).abs().max() < tolerance
    assert sample(lambda x, t: 0 * x, x[:1], schedule, VP).shape == (1, 3)


@pytest.mark.parametrize("which", ["plain", "afs", "implicit", "both", "average"])
def test_the_scheduler_is_the_loop(which):
    schedule = SolverSchedule.preset("unipc-2", 5, VP)
    if which in ("afs", "both", "average"):
        schedule = replace(schedule, afs="average_x0" if which == "average" else "zero_x0")
    if which in ("implicit", "both"):
        schedule = implicit(schedule, 1)
    x = randn(8, 3)
    scheduler = USFScheduler(schedule, mean_x0=MEAN)
    ours = looped(scheduler, x)
    assert torch.equal(ours, sample(lambda x, t: vp_eps(x, VP.timestep(t)), x, schedule, VP, mean_x0=MEAN))
    assert torch.equal(looped(copy.deepcopy(scheduler), x), ours)
    assert torch.equal(looped(pickle.loads(pickle.dumps(scheduler)), x), ours)
    assert len(scheduler.timesteps) == schedule.nfe
    doubled = torch.cat([x, x])
    scheduler.set_timesteps()
    assert torch.equal(
        scheduler.scale_model_input(doubled, scheduler.timesteps[0])[:8], scheduler.scale_model_input(x, scheduler.timesteps[0])
    )


def test_pipelines_of_diffusers_run_with_it_and_it_is_saved(unet, tmp_path):
    for afs in ("none", "zero_x0"):
        schedule = replace(SolverSchedule.preset("dpm++2m", 4, VP), afs=afs)
        pipeline = DDPMPipeline(unet, USFScheduler.from_config(DDPMScheduler().config, solver_schedule=schedule))
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(
            batch_size=2, num_inference_steps=schedule.nfe, output_type="np", generator=torch.Generator().manual_seed(0)
        ).images
        pipeline.scheduler.save_pretrained(tmp_path / afs)
        again = DDPMPipeline(unet, USFScheduler.from_pretrained(tmp_path / afs))
        again.set_progress_bar_config(disable=True)
        same = again(batch_size=2, num_inference_steps=schedule.nfe, output_type="np", generator=torch.Generator().manual_seed(0)).images
        assert images.shape == (2, 8, 8, 1)
        assert (images == same).all()


@pytest.mark.parametrize("afs", ["none", "zero_x0"])
def test_it_stands_in_for_the_schedulers_of_diffusers_pipelines(pipelines, afs):
    def of_config(config):
        schedule = SolverSchedule.preset("unipc-2", 6 + (afs != "none"), NoiseSchedule.from_diffusers(config))
        return USFScheduler.from_config(config, solver_schedule=replace(schedule, afs=afs))

    drops_into_pipelines(pipelines, of_config)


def test_image_to_image_begins_in_the_middle():
    schedule = implicit(SolverSchedule.preset("unipc-2", 6, VP), 3)
    scheduler, x = USFScheduler(schedule), randn(8, 3)
    scheduler.set_timesteps(schedule.nfe)
    scheduler.set_begin_index(2)
    state = x
    for t in scheduler.timesteps[2:]:
        state = scheduler.step(vp_eps(state, t), t, state).prev_sample
    assert torch.allclose(state, sample(lambda x, t: vp_eps(x, VP.timestep(t)), x, schedule.from_step(2), VP), atol=1e-12)


def test_image_to_image_may_begin_before_an_implicit_corrector():
    schedule = implicit(SolverSchedule.preset("ddim", 5, VP), 1)
    scheduler, x = USFScheduler(schedule), randn(8, 3)
    scheduler.set_timesteps()
    state = x
    for t in scheduler.timesteps[2:]:  # the call that the corrector would move, and the one at what it moved
        state = scheduler.step(vp_eps(state, t), t, state).prev_sample
    assert torch.allclose(state, sample(lambda x, t: vp_eps(x, VP.timestep(t)), x, schedule.from_step(2), VP), atol=1e-12)


def test_what_was_painted_over_between_two_steps_stays():
    schedule = SolverSchedule.preset("unipc-2", 5, VP)
    scheduler, x = USFScheduler(schedule), randn(8, 3)
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps[:2]:
        x = scheduler.step(vp_eps(x, t), t, x).prev_sample
    painted = x.clone()
    painted[:, 0] = 0.25
    scheduler.step(vp_eps(painted, scheduler.timesteps[2]), scheduler.timesteps[2], painted)
    assert torch.allclose(scheduler._solver.states[2][:, 0], torch.full((8,), 0.25).double(), atol=1e-12)
    assert not torch.equal(scheduler._solver.states[2][:, 1], painted[:, 1])


BAD = {
    "step 1: lambdas go from": replace(plain(1, 1, 1), lambdas=(-3.0, -1.0, -1.0, 2.0)),
    "step 0: lambdas go from": replace(plain(1, 1, 1), lambdas=(-3.0, -4.0, 0.0, 2.0)),
    "step 0: order is 2": plain(2, 2),
    "step 1: order is 5": plain(1, 5),
    r"step 1: points of F\^\(1\)": replace(plain(1, 2), steps=(StepDecision("data", 1), StepDecision("data", 2, points=((-1,),)))),
    r"step 1: points of F\^\(1\) are \[-3\]": replace(plain(1, 2), steps=(StepDecision("data", 1), StepDecision("data", 2, points=((-3,),)))),
    r"step 2: points of F\^\(2\)": replace(
        plain(1, 1, 3), steps=(*plain(1, 1).steps, StepDecision("data", 3, points=((-2,), (-2,))))
    ),
    "step 1: start is -3": replace(plain(1, 1), steps=(StepDecision("data", 1), StepDecision("data", 1, start=-3))),
    "step 1: corrector is 'pseudo'": replace(plain(1, 1), steps=(StepDecision("data", 1), StepDecision("data", 1, corrector="pseudo"))),
    "step 0: prediction is 'velocity'": plain(1, prediction="velocity"),
    "step 0: relaxation is 'bh9'": SolverSchedule((0.0, 1.0), (StepDecision("data", 1, relaxation="bh9"),)),
    "step 2: points: .* condition": plain(1, 1, 3, lambdas=(-3.0, -3 + 1e-12, 2.0, 3.0)),
    "afs is 'zero_x0' with one step": plain(1, afs="zero_x0"),
    "lambdas has 2 numbers": replace(plain(1), steps=()),
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_what_is_no_solver_is_refused_by_step_and_field(words):
    with pytest.raises(ValueError, match=words):
        sample(EPS, NOISE, BAD[words], EDM)


def test_what_a_schedule_needs_is_asked_for():
    v3 = SolverSchedule.preset("v3-3", 5, EDM)
    for schedule, ems, words in (
        (v3, None, "step 0: prediction is 'v3' without EMS"),
        (replace(v3, lambdas=tuple(each + 9 for each in v3.lambdas)), EMS_OF_NONE, "where the EMS are"),
        (plain(1, 1, afs="average_x0"), None, "'average_x0' without a mean"),
        (plain(1, 1, lambdas=(-9.0, 0.0, 1.0)), None, "take a schedule of this noise schedule"),
    ):
        with pytest.raises(ValueError, match=words):
            sample(EPS, NOISE, schedule, EDM, ems)
    with pytest.raises(ValueError, match=r"mean_x0 is \(2,\) for samples of \(3,\)"):
        sample(EPS, NOISE, plain(1, 1, afs="average_x0"), EDM, mean_x0=MEAN[:2])
    scheduler = USFScheduler(SolverSchedule.preset("ddim", 4, VP))
    with pytest.raises(ValueError, match="from_config without a schedule"):
        USFScheduler.from_config(DDPMScheduler().config)
    with pytest.raises(ValueError, match="expected 4"):
        scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="set_timesteps first|set_timesteps"):
        scheduler.step(NOISE, 3, NOISE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("[]", "a schedule is list"),
        ('{"lambdas": [0, 1], "steps": [{"prediction": "data", "order": 1}], "meta": 3}', "lambdas, steps or meta"),
        ('{"lambdas": [0, 1]}', "lacks steps"),
        ('{"lambdas": [0, 1], "steps": [{"prediction": "data", "order": 1, "skip": 0.5}]}', "step 0 has 'skip'"),
        ('{"lambdas": [0, 1], "steps": [{"prediction": "data", "order": 1, "points": 3}]}', "step 0: points"),
        ('{"lambdas": ["a", 1], "steps": [{"prediction": "data", "order": 1}]}', "step 0: lambdas"),
    ],
)
def test_files_that_are_no_schedules_are_told(tmp_path, text, words):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        SolverSchedule.from_json(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        SolverSchedule.load(tmp_path / "bad.json")
