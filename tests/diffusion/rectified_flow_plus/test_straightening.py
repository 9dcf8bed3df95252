"""The study, the bench and the verb, on tiny tasks; and a user's own images and pipeline."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import typer
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from hosts import write_pipelines
from typer.testing import CliRunner

from fewer.diffusion.rectified_flow_plus import (
    EDMSampler,
    ReflowScheduler,
    VelocityFromEDM,
    VelocityFromVP,
    classifier_distance,
    generate_pairs,
    sample,
)
from fewer.diffusion.rectified_flow_plus import problems as problems_of
from fewer.diffusion.rectified_flow_plus import study as study_of
from fewer.diffusion.rectified_flow_plus.command import reflow
from fewer.diffusion.rectified_flow_plus.study import study
from fewer.errors import UserError
from fewer.study import Results, Scale, Trial, judge
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, TrialSpec
from fewer.tasks import frechet_distance
from fewer.tasks.digit_denoiser import DenoiserRecipe, DigitDenoiser
from fewer.tasks.digit_features import DigitFeatures

pytestmark = pytest.mark.usefixtures("cache")
RECIPE = DenoiserRecipe(side=8, width=16)


@pytest.fixture
def job(tmp_path):
    images = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    labels = torch.arange(60) % 3
    teacher = VelocityFromEDM(DigitDenoiser(RECIPE).eval().requires_grad_(False), 80.0)
    pairs = generate_pairs(teacher, 40, EDMSampler(3), tmp_path / "pairs", (1, 8, 8))
    distance = classifier_distance(images, labels, steps=2, batch_size=8)
    judge_of = DigitFeatures(8).eval().requires_grad_(False)
    return problems_of.Task(teacher, RECIPE, pairs, distance, images, images[:20], judge_of)


def logged(job, arm, scale=Scale.QUICK):
    events = []
    study.arms[arm].run(job, Trial(TrialSpec(study.slug, study.slug, arm, 0, scale, {}), events.append))
    return [event for event in events if isinstance(event, FigureEvent)]


def test_every_arm_logs_every_figure_that_is_declared(job, monkeypatch):
    monkeypatch.setattr(study_of, "QUICK", replace(study_of.QUICK, steps=2, batch_size=8))
    monkeypatch.setattr(study_of, "JUDGED", 70)
    rows = []
    for arm in study.arms:
        figures = logged(job, arm)
        rows += [Row(arm, seed, each.name, each.coordinates, each.value) for each in figures for seed in (0, 1)]
        names = {(each.name, tuple(sorted(each.coordinates.items()))) for each in figures}
        if arm in ("d", "e", "f-two-rounds"):
            assert not figures, "these run at the full scale alone"
            continue
        for figure in study.figures:
            if figure.name != "floor" and not (arm == "teacher" and figure.name in ("calls", "train.cpu_seconds")):
                assert (figure.name, tuple(sorted(figure.at.items()))) in names, (arm, figure)
    verdicts = judge(study, Results(rows, list(study.arms)))
    assert len(verdicts) == len(study.claims)
    assert "Frechet distance" in study.summarise(Results(rows, list(study.arms)))


def test_arms_of_the_full_scale_run_there(job, monkeypatch):
    monkeypatch.setattr(study_of, "replace", lambda config, **words: replace(config, **words | {"steps": 2, "batch_size": 8}))
    monkeypatch.setattr(study_of, "JUDGED", 70)
    given, train = [], study_of.train_reflow
    monkeypatch.setattr(study_of, "train_reflow", lambda *words, draw_times, **more: given.append(draw_times) or train(*words, **more))
    for arm, trainings in (("d", 1), ("f-two-rounds", 2), ("direct", 1)):
        del given[:]
        assert {each.name for each in logged(job, arm, Scale.FULL)} >= {"frechet", "inversion", "straightness"}
        assert len(given) == trainings
        assert [draw(3, None).tolist() for draw in given if draw] == ([[pytest.approx(1 - 1e-5)] * 3] if arm == "direct" else [])


def test_arms_begin_where_they_say(job):
    """B at the teacher, A nowhere; the seed draws A's weights."""
    weight = "denoiser.enter.weight"
    assert torch.equal(job.scratch(1).state_dict()[weight], job.scratch(1).state_dict()[weight])
    assert not torch.equal(job.scratch(1).state_dict()[weight], job.scratch(2).state_dict()[weight])
    assert not torch.equal(job.scratch(1).state_dict()[weight], job.teacher.state_dict()[weight])
    assert frechet_distance(job.features(job.images, "pixels"), job.features(job.images, "pixels")) < 1e-6
    assert job.features(job.images, "features").shape == (60, 64)


def test_the_judge_is_no_network_of_the_premetric(job):
    assert not isinstance(job.distance.backbone, DigitFeatures)


def test_a_users_own_images_get_a_teacher_once(tmp_path, monkeypatch):
    calls = []

    def quick(recipe, images, labels, tell):
        calls.append(tuple(images.shape))
        torch.manual_seed(0)
        return DigitDenoiser(recipe).eval()

    monkeypatch.setattr(problems_of, "train_denoiser", quick)
    monkeypatch.setattr(problems_of, "train_features", lambda images, labels: DigitFeatures(images.shape[-1]))
    monkeypatch.setattr(problems_of, "classifier_distance", functools.partial(classifier_distance, steps=2, batch_size=8))
    monkeypatch.setattr(problems_of, "SAMPLER", EDMSampler(2))
    x = np.random.default_rng(0).integers(0, 256, size=(60, 3, 20, 24), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(60) % 4)
    for _ in range(2):
        job = problems_of.of_file(str(tmp_path / "mine.npz"), 30)
    assert calls == [(48, 1, 16, 16)], "trained once"
    assert (len(job.pairs), job.pairs.shape, len(job.test)) == (30, (1, 16, 16), 12)
    assert float(job.images.min()) >= -1
    assert float(job.images.max()) <= 1
    np.savez(tmp_path / "other.npz", x=x, y=np.arange(60) % 3)
    other = problems_of.of_file(str(tmp_path / "other.npz"), 30)
    assert not torch.equal(other.distance.backbone[0].weight, job.distance.backbone[0].weight), "what was learnt of other labels"
    np.savez(tmp_path / "many.npz", x=x, y=np.arange(60))
    for name, words in (("many.npz", "at most 10 classes"), ("nowhere.npz", "no file")):
        with pytest.raises(UserError, match=words):
            study.build_task(Scale.QUICK, study.choose_options({"data": str(tmp_path / name)}))


# The verb


@pytest.fixture
def run():
    app = typer.Typer()
    app.command()(reflow)

    def invoke(*words):
        return CliRunner().invoke(app, [*map(str, words), "--pairs", "6", "--steps", "2", "--batch", "3", "--sampler-steps", "2"])

    return invoke


@pytest.mark.parametrize("kind", ["plain", "labels"])
def test_the_verb_makes_a_pipeline_that_samples_as_the_student(run, tmp_path, kind):
    write_pipelines(tmp_path)
    done = run(tmp_path / kind, tmp_path / "out", "--json", "--update", "new")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["calls"] == 6 * 3 + 2 * 3
    assert "teacher's encoder" in told["premetric"]
    scheduler = ReflowScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    theirs = DDPMScheduler.from_pretrained(tmp_path / kind / "scheduler")
    assert scheduler.config["update"] == "new"
    assert scheduler.config["prediction_type"] == theirs.config["prediction_type"]
    assert scheduler.config["beta_end"] == theirs.config["beta_end"]
    unet = UNet2DModel.from_pretrained(tmp_path / "out" / "unet")
    before = UNet2DModel.from_pretrained(tmp_path / kind / "unet")
    assert not torch.equal(unet.conv_in.weight, before.conv_in.weight), "trained"
    assert torch.allclose(unet.conv_in.weight, before.conv_in.weight, atol=0.01), "from the teacher on"
    if kind == "plain":
        pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
        images = pipeline(batch_size=2, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        z = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        velocity = VelocityFromVP(unet, (2 * scheduler.schedule.log_alphas).exp())
        assert torch.allclose(images, (sample(velocity, z, 2, "euler", "new") / 2 + 0.5).clamp(0, 1), atol=1e-3)


def test_the_verb_keeps_pairs_where_it_is_told_and_overwrites_only_when_told(run, tmp_path):
    write_pipelines(tmp_path)
    assert run(tmp_path / "plain", tmp_path / "out", "--pairs-dir", tmp_path / "pairs").exit_code == 0
    assert sorted(each.name for each in (tmp_path / "pairs").iterdir()) == ["pairs.json", "part-00000.npz"]
    assert not (tmp_path / "out" / "pairs").exists()
    again = run(tmp_path / "plain", tmp_path / "out", "--pairs-dir", tmp_path / "pairs")
    assert isinstance(again.exception, FileExistsError)
    assert run(tmp_path / "plain", tmp_path / "out", "--pairs-dir", tmp_path / "pairs", "--overwrite").exit_code == 0


def test_a_rate_that_cannot_be_is_refused_before_pairs_are_made(run, tmp_path):
    write_pipelines(tmp_path)
    done = run(tmp_path / "plain", tmp_path / "out", "--lr", "0", "--pairs-dir", tmp_path / "pairs")
    assert "lr is 0" in str(done.exception)
    assert not (tmp_path / "pairs").exists()


@pytest.mark.parametrize(
    ("kind", "words"), [("text", "takes text or latents"), ("dit", "takes text or latents"), ("nowhere", "diffusers pipeline")]
)
def test_pipelines_that_the_verb_cannot_take_are_refused_and_nothing_is_written(run, tmp_path, kind, words):
    write_pipelines(tmp_path)
    done = run(tmp_path / kind, tmp_path / "out")
    assert isinstance(done.exception, OSError | ValueError)
    assert words in str(done.exception)
    assert not (tmp_path / "out").exists()
