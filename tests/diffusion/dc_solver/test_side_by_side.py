"""The verb, the study's arms on a user's own pipelines, the races, and diffusers' pipelines as hosts."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from hosts import drops_into_pipelines

from fewer.diffusion import CascadePolynomial, DCSolverMultistepScheduler, Ratios, reference_trajectory
from fewer.diffusion.dc_solver import bench, problems
from fewer.diffusion.dc_solver.problems import CALLS, UNSEEN
from fewer.diffusion.dc_solver.study import study
from fewer.errors import UserError
from fewer.files import read_json
from fewer.study import Results, Scale, Trial
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, TrialSpec
from fewer.study.verdicts import judge
from fewer.tasks.digits_diffusion import EpsilonOutput

pytestmark = pytest.mark.usefixtures("cache")
RATIOS = [1.0, 1.0, 1.16, 1.15, 1.1, 1.59]


def test_it_takes_the_place_of_a_pipelines_scheduler(pipelines):
    drops_into_pipelines(pipelines, lambda config: DCSolverMultistepScheduler.from_config(config, ratios=RATIOS))


@pytest.fixture
def quick_references(monkeypatch):
    monkeypatch.setattr(problems, "reference_trajectory", functools.partial(reference_trajectory, fine_steps=40))


def figures(arm: str, pipeline: str) -> list[FigureEvent]:
    options = study.choose_options({"pipeline": pipeline})
    job, events = study.build_task(Scale.QUICK, options), []
    study.arms[arm].run(job, Trial(TrialSpec(study.slug, study.slug, arm, 0, Scale.QUICK, options), events.append))
    return [event for event in events if isinstance(event, FigureEvent)]


@pytest.mark.parametrize("arm", ["unipc", "unipc-karras", "dc", "dc-static", "dc-oracle"])
@pytest.mark.usefixtures("quick_references")
def test_arms_run_on_a_users_pipeline(pipelines, arm):
    found = figures(arm, str(pipelines / "plain"))
    errors = [each for each in found if each.name == "error"]
    assert [each.coordinates for each in errors] == [{"scale": 1.0, "calls": calls} for calls in CALLS]
    assert all(each.value > 0 for each in errors)
    if arm in ("dc", "dc-oracle"):
        assert {"calls", "cpu_seconds", "ratio", "removed"} <= {each.name for each in found}


@pytest.mark.usefixtures("quick_references")
def test_digits_are_judged_by_a_classifier_too_beside_real_ones(monkeypatch):
    torch.manual_seed(0)
    data, net = torch.rand(80, 1, 4, 4), torch.nn.Linear(16, 3)

    class Source:
        """Stands for the digits: a model, images and a classifier's features."""

        def epsilon(self, schedule):
            return lambda x, t, label: EpsilonOutput(0.9 * x)

        def data(self, split):
            return data, torch.arange(80) % 10

        def features(self, x):
            return net(x.flatten(1)).detach()

    network = problems.Network("test", dict(DCSolverMultistepScheduler().config), (1, 4, 4), 20, (1.0, 4.0), Source())
    found = {}
    for arm in ("converged", "unipc", "dc-static"):
        events = []
        study.arms[arm].run(network, Trial(TrialSpec(study.slug, study.slug, arm, 0, Scale.QUICK, {}), events.append))
        found[arm] = [each for each in events if isinstance(each, FigureEvent)]
        assert [each.coordinates["calls"] for each in found[arm] if each.name == "frechet"] == list(CALLS)
    assert [each.name for each in found["converged"]] == ["frechet"] * len(CALLS) + ["floor"]
    assert {each.coordinates["scale"] for each in found["unipc"] if each.name == "frechet"} == {1.0}


@pytest.mark.usefixtures("quick_references")
def test_a_guided_pipeline_is_searched_at_every_scale_and_the_polynomial_judged_on_others(pipelines):
    errors = [each for each in figures("dc-cpr", str(pipelines / "dit")) if each.name == "error"]
    assert [(each.coordinates["calls"], each.coordinates["scale"]) for each in errors] == list(UNSEEN)


def test_a_directory_that_is_no_pipeline_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="expected a diffusers pipeline"):
        study.build_task(Scale.QUICK, study.choose_options({"pipeline": str(tmp_path)}))


# The verb

SMALL = ("--noises", "2", "--fine-steps", "20")


def test_the_verb_writes_ratios_and_a_polynomial_that_are_read_back(fewer, pipelines, tmp_path):
    words = ("dc-search", str(pipelines / "dit"), "--out", "found", "--steps", "5,6,7", "--scale", "1,2,3", *SMALL, "--json")
    told = json.loads(fewer(*words).stdout)
    assert (told["settings"], told["polynomial"]) == (9, True)
    found = [Ratios.of_json(each, "here") for each in read_json(tmp_path / "found" / "ratios.json")["ratios"]]
    assert {(each.steps, each.guidance_scale) for each in found} == {(n, s) for n in (5, 6, 7) for s in (1.0, 2.0, 3.0)}
    assert told["calls"] == sum(each.calls for each in found)
    scheduler = DCSolverMultistepScheduler.from_config(
        read_json(pipelines / "dit" / "scheduler" / "scheduler_config.json"), ratios=found[0]
    )
    scheduler.set_timesteps(5)
    assert len(CascadePolynomial.load(tmp_path / "found" / "polynomial.npz").predict(6, 2.0)) == 6
    again = fewer(*words, status=2)
    assert "found" in again.stderr
    fewer(*words, "--overwrite")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--steps", "5;6"), "expected whole numbers"),
        (("--steps", "2"), "expected more than 2"),
        (("--scale", "4"), "expected --scale 1"),
        (("--noises", "0"), "noises"),
    ],
)
def test_what_the_verb_cannot_do_is_one_error_and_writes_nothing(fewer, pipelines, tmp_path, words, message):
    told = fewer("dc-search", str(pipelines / "plain"), "--out", "found", "--scale", "1", *SMALL, *words, status=2)
    assert message in told.stderr
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "found").exists()


# Claims and races


def results_of(error) -> Results:
    """Results whose errors are `error(arm, calls, scale)`, three seeds apart by little."""
    settings = [(calls, scale) for scale in (1.0, 4.0, 7.5) for calls in CALLS] + list(UNSEEN)
    rows = [
        Row(arm, seed, "error", {"calls": calls, "scale": scale}, error(arm, calls, scale) * (1 + 0.001 * seed))
        for arm in study.arms
        for seed in range(3)
        for calls, scale in settings
    ]
    return Results(rows, list(study.arms))


def test_the_claims_turn_when_the_method_gains_nothing():
    gain = {"dc": 0.6, "dc-2m": 0.55, "dc-cpr": 0.62, "dc-40-noises": 0.6, "dc-k1": 0.65}
    good = results_of(lambda arm, calls, scale: gain.get(arm, 1.0))
    none = results_of(lambda arm, calls, scale: 1.0 + 0.1 * (arm in gain) - 0.2 * (arm in ("dc-40-noises", "dc-k1")))
    for results, wanted in ((good, "holds"), (none, "fails")):
        for verdict in judge(study, results)[:6]:
            assert verdict.verdict == wanted, verdict
    assert judge(study, good)[6].verdict == "holds", "the polynomial keeps the search's gain"


def test_the_racers_do_the_same_work():
    ours, theirs = (each() for each in bench.steps())
    assert ours.shape == theirs.shape == bench.SHAPE
    kept, allowed = bench.kept()
    assert kept <= allowed
    assert torch.isfinite(ours).all()
