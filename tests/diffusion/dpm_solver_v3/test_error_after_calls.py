"""What the study holds the solver against: statistics made once, a user's own pipeline, and that the racers do the same work."""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from small_mixture import ENDS, typical

from fewer.diffusion import sample
from fewer.diffusion._shared.peers import by_diffusers
from fewer.diffusion._shared.pipelines import Pipeline
from fewer.diffusion._shared.problems import Flow
from fewer.diffusion._shared.spacing import noise_levels
from fewer.diffusion.dpm_solver_v3 import bench, problems
from fewer.diffusion.dpm_solver_v3.problems import statistics_of
from fewer.diffusion.dpm_solver_v3.study import CALLS, corrected, study
from fewer.errors import UserError
from fewer.study import Scale, Trial
from fewer.study.trial import FigureEvent, TrialSpec

pytestmark = pytest.mark.usefixtures("cache")


def test_statistics_are_estimated_once_and_leave_less_error_than_order_one(mixture, flow, noise, monkeypatch):
    data = mixture.draw(128, torch.Generator().manual_seed(2))
    ems = statistics_of("small-mixture", flow, data, 60, 128)
    exact = flow.reference(noise)
    ours = sample(flow.epsilon, noise, flow.schedule, ems, 10, **corrected(10))
    ddim = by_diffusers("ddim", flow.denoise, noise, noise_levels(*ENDS, 10))
    assert typical(ours, exact) < 0.3 * typical(ddim, exact)
    blind = Flow(lambda x, sigma: pytest.fail("estimated twice"), flow.schedule, flow.reference)
    again = statistics_of("small-mixture", blind, data, 60, 128)
    assert torch.equal(again.l, ems.l)


def test_both_schedulers_of_the_race_run_from_the_start_each_time():
    for racer in bench.steps():
        first, second = racer(), racer()
        assert first.shape == (16, 3, 64, 64)
        assert first.isfinite().all()
        assert torch.equal(first, second)


def test_the_study_runs_on_a_users_own_pipeline(unet, tmp_path, monkeypatch):
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "mine")
    monkeypatch.setitem(problems.GRIDS, "full", (24, 8))
    monkeypatch.setattr(Pipeline.samples, "__defaults__", (8,))
    options = study.choose_options({"pipeline": str(tmp_path / "mine")})
    job = study.build_task(Scale.QUICK, options)
    for arm in ("dpm++2m", "v3"):
        events = []
        spec = TrialSpec(study.slug, study.slug, arm, 0, Scale.QUICK, options)
        study.arms[arm].run(job, Trial(spec, events.append))
        figures = [event for event in events if isinstance(event, FigureEvent) and event.name == "error"]
        assert [event.coordinates for event in figures] == [{"data": "images", "calls": calls} for calls in CALLS]
        assert all(event.value for event in figures)


def test_a_pipeline_that_cannot_be_used_is_the_users_mistake(unet, tmp_path):
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "mine")
    for options, words in (
        ({"pipeline": str(tmp_path / "nowhere")}, "expected a diffusers pipeline"),
        ({"pipeline": str(tmp_path / "mine"), "data": str(tmp_path / "mine")}, "no pictures"),
    ):
        with pytest.raises(UserError, match=words):
            study.build_task(Scale.QUICK, study.choose_options(options))
