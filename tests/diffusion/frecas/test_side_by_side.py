"""The study's arms and claims, a user's own pipeline, the verb and the races."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from hosts import SCALED, stable_diffusion, stable_diffusion_xl
from PIL import Image

from fewer.diffusion import FreCaSConfig, MapStore, Stage
from fewer.diffusion.frecas import bench, cost
from fewer.diffusion.frecas import study as study_module
from fewer.diffusion.frecas.problems import STEPS, Digits, doubled, gaussian_field, high_energy, open_diffusers, plan, two_stages
from fewer.diffusion.frecas.study import study
from fewer.errors import UserError
from fewer.study import Results, Scale, Trial
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, NoteEvent, TrialSpec
from fewer.study.verdicts import judge
from fewer.tasks.digit_features import DigitFeatures
from fewer.tasks.tile_denoiser import TileDenoiser, TileRecipe

QUICK = ("direct", "enlarged", "frecas", "frecas-bands", "frecas-late", "frecas-maps")
JUDGED = {"accuracy", "frechet", "energy"}
COSTS = {"flops", "calls", "sample.seconds", "sample.cpu_seconds"}


class Untrained:
    """What the study asks of a model of digits, with random weights."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.denoiser, self._features = TileDenoiser(TileRecipe()).eval().requires_grad_(False), DigitFeatures(32).eval()
        torch.nn.init.normal_(self.denoiser.leave.weight, std=0.1)
        torch.nn.init.normal_(self.denoiser.attention.leave.weight, std=0.5)

    def features(self, x):
        with torch.no_grad():
            return self._features.features(x)

    def data(self, split):
        return torch.rand(40, 1, 32, 32) * 2 - 1, torch.arange(40) % 10


@pytest.fixture(autouse=True)
def few_fields(monkeypatch):
    monkeypatch.setattr(study_module, "FIELDS", 2)


@pytest.fixture(scope="module")
def made():
    model = Untrained()
    return Digits(model, model.data("test")[0], 10)


def events_of(arm: str, job, scale: Scale = Scale.QUICK) -> list:
    events: list = []
    study.arms[arm].run(job, Trial(TrialSpec(study.slug, study.slug, arm, 0, scale, {}), events.append))
    return events


def figures(arm: str, job, scale: Scale = Scale.QUICK) -> dict[str, list[FigureEvent]]:
    found: dict[str, list[FigureEvent]] = {}
    for event in events_of(arm, job, scale):
        if isinstance(event, FigureEvent):
            found.setdefault(event.name, []).append(event)
    return found


@pytest.fixture(scope="module")
def logged(made):
    """arm -> what it logs; each arm runs once."""
    return functools.cache(lambda arm: figures(arm, made))


@pytest.mark.parametrize("arm", QUICK)
def test_each_arm_logs_every_figure(logged, arm):
    found = logged(arm)
    assert set(found) >= JUDGED | COSTS
    if arm != "enlarged":
        assert [each.coordinates["band"] for each in found["spectrum"]] == [1, 2, 3, 4]
    wanted = {"direct": STEPS, "enlarged": STEPS / 4}.get(arm) or cost(plan(0.6 if arm == "frecas-late" else 1.0))
    assert found["calls"][0].value == wanted


def test_operations_are_those_of_the_calls(logged):
    one, other = (logged(arm)["flops"][0].value for arm in ("frecas", "direct"))
    assert one / other == pytest.approx(cost(plan()) / STEPS, rel=0.02)


def test_real_digits_are_judged_and_full_arms_wait_for_the_full_scale(made):
    assert set(figures("real", made)) == JUDGED
    assert [type(event) for event in events_of("sdedit", made)] == [NoteEvent]
    assert set(figures("frecas-flat", made, Scale.FULL)) > JUDGED


def test_two_stages_take_the_grid_above_the_end_and_the_matched_start(made):
    seen, config = [], plan(1.0, map_weight=0.6)

    def denoiser(stage, maps):
        assert isinstance(maps, MapStore)

        def denoise(x, sigma):
            if stage == 0:
                maps.keep(torch.ones(len(x), 4, 3) / 3, (2, 2))
            seen.append((stage, x.shape[-1], round(float(sigma), 3), maps.collecting, maps.mixing))
            return 0 * x

        return denoise

    two_stages(denoiser, config, torch.randn(2, 1, 16, 16), torch.Generator().manual_seed(0))
    first = [row for row in seen if row[0] == 0]
    assert len(first) == config.stages[0].steps
    assert [row[2] for row in (first[0], first[-1])] == [80, 1]
    assert [row[3] for row in first] == [False] * (len(first) - 1) + [True]
    last = [row for row in seen if row[0] == 1]
    assert (len(last), last[0]) == (8, (1, 32, 2.0, False, True))


def test_the_fields_truth_and_its_folding():
    field, draw = gaussian_field(), torch.Generator().manual_seed(0)
    large = torch.fft.ifft2(torch.fft.fft2(torch.randn(4000, 1, 32, 32, generator=draw, dtype=torch.float64)) * field.powers[1].sqrt()).real
    assert field.bands(large) == pytest.approx([1] * 4, abs=0.02)
    small = torch.nn.functional.avg_pool2d(large, 2)
    power = torch.fft.fft2(small).abs().square().mean((0, 1)) / 256
    assert ((power / field.powers[0]).log().abs() < 0.12).all()


def test_energy_is_that_above_the_small_band():
    x = torch.arange(32)
    waves = {k: torch.cos(2 * torch.pi * k * x / 32)[None, None, None].expand(1, 1, 32, 32) for k in (3, 8, 9, 15)}
    energies = {k: high_energy(wave) for k, wave in waves.items()}
    assert max(energies[3], energies[8]) < 1e-9 < min(energies[9], energies[15])


# A user's own pipeline, and the verb


@pytest.fixture(scope="module")
def directory(pipelines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "sd"
    stable_diffusion(pipelines / "text" / "tokenizer", DDIMScheduler(**SCALED, clip_sample=False, set_alpha_to_one=False)).save_pretrained(
        folder
    )
    return folder


def test_arms_run_on_a_users_pipeline(directory):
    job = study.build_task(Scale.QUICK, study.choose_options({"pipeline": str(directory), "steps": "6"}))
    for arm in ("direct", "enlarged", "frecas-bands", "frecas-maps"):
        assert {"energy", "calls", "sample.cpu_seconds"} <= set(figures(arm, job)), arm
    assert [stage.size for stage in job.plan.stages] == [16, 32]
    assert "energy" not in figures("real", job)


def test_twice_a_pipelines_size_keeps_the_number_of_calls(pipelines):
    config = doubled(stable_diffusion_xl(pipelines / "text" / "tokenizer"), 20)
    assert [(stage.size, stage.steps) for stage in config.stages] == [(16, 16), (32, 4)]


def test_a_directory_that_is_no_pipeline_is_the_users_mistake(tmp_path, directory):
    with pytest.raises(UserError, match="model_index"):
        study.build_task(Scale.QUICK, study.choose_options({"pipeline": str(tmp_path)}))
    index = json.loads((directory / "model_index.json").read_text())
    for change, message in (({"_class_name": "DDPMPipeline"}, "DDPMPipeline"), ({"unet": ["evil", "Net"]}, "evil")):
        (tmp_path / "model_index.json").write_text(json.dumps(index | change))
        with pytest.raises(ValueError, match=message):
            open_diffusers(tmp_path)


def test_the_verb_writes_pictures_and_their_plan(fewer, directory, tmp_path):
    config = FreCaSConfig((Stage(16, 3, 300), Stage(32, 2, 0)))
    (tmp_path / "plan.json").write_text(config.to_json())
    words = (
        "frecas",
        str(directory),
        "--prompt",
        "a cat",
        "--out",
        "made",
        "--config",
        "plan.json",
        "--images",
        "2",
        "--device",
        "cpu",
        "--json",
    )
    told = json.loads(fewer(*words).stdout)
    assert (told["images"], told["full_size_calls"]) == (2, 3 / 4 + 2)
    assert 0 < told["lift_share"] < 1
    assert Image.open(tmp_path / "made" / "image-1.png").size == (32, 32)
    assert FreCaSConfig.from_json((tmp_path / "made" / "frecas.json").read_text()) == config
    assert "made" in fewer(*words, status=2).stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preset", "sdxl-2084"), "did you mean 'sdxl-2048'"),
        (("--config", "none.json"), "none.json"),
        (("--config", "bad.json"), "expected JSON"),
    ],
)
def test_what_the_verb_cannot_do_is_one_error_and_writes_nothing(fewer, directory, tmp_path, words, message):
    (tmp_path / "bad.json").write_text("{}")
    told = fewer("frecas", str(directory), "--prompt", "a cat", "--out", "made", *words, status=2)
    assert message in told.stderr
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "made").exists()


# Claims and races

GOOD = {
    "accuracy": {"direct": 0.1, "frecas": 0.95}, "frechet": {"direct": 100, "enlarged": 40, "frecas": 28, "frecas-bands": 24},
    "flops": {"direct": 20, "frecas": 11}, "sample.cpu_seconds": {"direct": 14, "frecas": 9}, "energy": {"frecas": 1.2, "enlarged": 0.07},
}  # fmt: skip
BAD = {
    "accuracy": {"direct": 0.1, "frecas": 0.5}, "frechet": {"direct": 40, "enlarged": 40, "frecas": 41, "frecas-bands": 44},
    "flops": {"direct": 20, "frecas": 20}, "sample.cpu_seconds": {"direct": 14, "frecas": 14}, "energy": {"frecas": 2.6, "enlarged": 1.7},
}  # fmt: skip


def test_the_claims_turn_when_the_method_gains_nothing():
    for values, wanted in ((GOOD, "holds"), (BAD, "fails")):
        rows = [Row(arm, s, name, {}, v * (1 + 0.001 * s)) for name, arms in values.items() for arm, v in arms.items() for s in range(3)]
        verdicts = judge(study, Results(rows, list(study.arms)))
        assert [verdict.verdict for verdict in verdicts[:-1]] == [wanted] * 8
        assert verdicts[-1].verdict == "not testable here"


def test_a_pipelines_claims_about_digits_are_not_testable():
    rows = [Row(arm, 0, "sample.cpu_seconds", {}, v) for arm, v in (("direct", 2.0), ("frecas", 1.0))]
    results = Results(rows, list(study.arms))
    assert {verdict.verdict for verdict in judge(study, results)} == {"holds", "not testable here"}
    assert study.summarise(results) == ""


def test_the_racers_give_pictures_of_one_size(monkeypatch):
    monkeypatch.setattr(bench, "STEPS", (2, 2))
    monkeypatch.setattr(bench, "PLAN", FreCaSConfig((Stage(bench.SIDE, 2, 200), Stage(2 * bench.SIDE, 2, 0))))
    ours, theirs = bench.cascade()
    assert ours().shape == theirs().shape == (1, 2 * bench.SIDE, 2 * bench.SIDE, 3)
    assert bench.calls() == (20, 50)
