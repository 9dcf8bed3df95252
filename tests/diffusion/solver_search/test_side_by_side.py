"""The study on a tiny task and on a user's pipeline, the verbs in process, and the races' parts."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from exact_flows import EDM, flow
from schedules import DATA, EMS_OF_NONE, MEAN

from fewer.diffusion import SolverSchedule, USFScheduler
from fewer.diffusion._shared.problems import Flow
from fewer.diffusion.solver_search import bench, command, problems, search
from fewer.diffusion.solver_search import study as declared
from fewer.diffusion.solver_search.problems import Problem, finer
from fewer.diffusion.solver_search.study import study
from fewer.errors import UserError
from fewer.study import Scale, Trial
from fewer.study.results import Results, Row
from fewer.study.trial import FigureEvent, NoteEvent, TrialSpec

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def small(monkeypatch):
    """Searches of a few evaluations."""
    monkeypatch.setattr(search, "CANDIDATES", 20)
    monkeypatch.setattr(search, "EPOCHS", 2)
    monkeypatch.setattr(declared, "SETTING", {Scale.QUICK: ((5, 70),), Scale.FULL: ((5, 70),)})
    monkeypatch.setattr(declared, "PART", 60)
    monkeypatch.setattr(declared, "LONGER", (6,))


def figures_of(arm: str, job: Problem, seed: int = 0) -> list[FigureEvent | NoteEvent]:
    events: list = []
    study.arms[arm].run(job, Trial(TrialSpec(study.slug, study.slug, arm, seed, Scale.QUICK, {}), events.append))
    return [event for event in events if isinstance(event, FigureEvent | NoteEvent)]


def test_every_arm_logs_its_figures_and_the_claims_are_judged(small):
    def reference(x: torch.Tensor) -> torch.Tensor:
        return flow(DATA, x.double(), 20.0, 0.02, 20).float()

    job = Problem(Flow(DATA.denoiser, EDM, reference), EDM, (3,), EMS_OF_NONE, MEAN.float(), 8, 8)
    rows = []
    for arm in study.arms:
        events = figures_of(arm, job)
        rows += [Row(arm, 0, e.name, e.coordinates, e.value) for e in events if isinstance(e, FigureEvent)]
    logged = {row.figure for row in rows}
    assert {figure.name for figure in study.figures} - logged <= {"frechet"}, "those need digits"
    results = Results(rows, list(study.arms))
    for claim in study.claims[:1] + study.claims[2:4]:
        assert claim.test(results).outcome in ("holds", "fails", "undecided")
    assert "S3" in study.summarise(results)


def test_statistics_are_drawn_by_lines():
    fine = finer(EMS_OF_NONE, 480)
    assert fine.num_timesteps == 480
    assert torch.allclose(fine.l[::2], EMS_OF_NONE.l, atol=1e-6)
    assert torch.allclose(fine.l[1::2], (EMS_OF_NONE.l[1:] + EMS_OF_NONE.l[:-1]) / 2, atol=1e-5)


@pytest.fixture
def pipeline(unet, tmp_path, monkeypatch):
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "mine")
    monkeypatch.setattr("fewer.diffusion._shared.pipelines.REFERENCE_STEPS", 5)
    return tmp_path / "mine"


def test_the_study_runs_on_a_users_own_pipeline(small, pipeline):
    job = study.build_task(Scale.QUICK, study.choose_options({"pipeline": str(pipeline)}))
    errors = [event for event in figures_of("dpm++2m", job) if isinstance(event, FigureEvent) and event.name == "error"]
    assert errors[0].value > 0
    assert [event.name for event in figures_of("v3-3", job)] == ["left out"]
    with pytest.raises(UserError, match="expected a diffusers pipeline"):
        study.build_task(Scale.QUICK, study.choose_options({"pipeline": str(pipeline / "nowhere")}))


def test_the_verbs_search_and_show(small, pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(problems, "FRESH", 1)
    out, journal = tmp_path / "found", tmp_path / "scores.jsonl"
    command.schedule_search(pipeline, out, nfe=[2], budget=80, predictor=False, journal=journal, as_json=True)
    told = json.loads(capsys.readouterr().out)
    schedule = SolverSchedule.load(out / "schedule-2.json")
    assert schedule.nfe == told["schedules"][0]["nfe"] == 2
    scheduler = USFScheduler.from_config(DDPMScheduler().config, solver_schedule=schedule)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps[0] == pytest.approx(999, abs=1e-6) or schedule.afs != "none"
    assert told["schedules"][0]["found"] <= told["schedules"][0]["best_preset"]
    assert 50 < len(journal.read_text().splitlines()) <= 60 + 5, "some presets are the same in two calls"
    command.schedule_show(out / "schedule-2.json")
    assert "2 network calls" in capsys.readouterr().out
    with pytest.raises(FileExistsError):
        command.schedule_search(pipeline, out, nfe=[2], budget=80)
    with pytest.raises(ValueError, match="budget is 3"):
        command.schedule_search(pipeline, tmp_path / "other", nfe=[2], budget=3)
    assert not (tmp_path / "other").exists()


def test_both_solvers_of_the_race_end_alike_each_time():
    for racer in bench.steps():
        first = racer()
        assert first.isfinite().all()
        assert torch.equal(first, racer())
