"""The study's arms on data that are small, which verdicts can turn, a user's images, the races, and the verb."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from toy_arm import Table

from fewer.diffusion.flow_mle import VelocityMLP, bench, load_finetuned, odeint, problems
from fewer.diffusion.flow_mle import study as module
from fewer.diffusion.flow_mle.problems import ImageField, Problem, Robot, Training
from fewer.diffusion.flow_mle.study import K, Task, acting, own, study
from fewer.errors import MissingExtra, UserError
from fewer.study import Results, Scale, Trial
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, NoteEvent, TrialSpec
from fewer.study.verdicts import judge
from fewer.tasks.image_judges import judges_of

ARMS = ("fm", "fm-longer", "ft-random", "ft-invert", "resft", "contracting")
OF_THE_ARM = ("precise", "success", "distance", "nfe", "milliseconds")


@pytest.fixture
def small(cache, monkeypatch):
    """Motions of 4 numbers, images of 3 x 3 and an arm without weight, seldom seen, and short training."""
    for name, value in {
        "UPDATES": 3,
        "LONGER": 3,
        "NOISES": 2,
        "CALLS": (1, 2, 4, 10),
        "TUNED": dict.fromkeys(("ft-invert", "ft-random", "resft"), ((1, 2), (4, 2))),
    }.items():
        monkeypatch.setattr(module, name, value)
    draw, training = torch.Generator().manual_seed(0), Training(3, 16, 2e-3, 0.9)
    parts = [(torch.randn(n, 4, generator=draw), torch.randn(n, 2, generator=draw)) for n in (30, 8)]
    pictures = [(torch.rand(n, 1, 3, 3, generator=draw) * 2 - 1, None) for n in (60, 20)]
    motions = Problem("motions", *parts, lambda: VelocityMLP(4, 2, 16), lambda: VelocityMLP(4, 2, 8, residual=True), training, 4)
    images = Problem("images", *pictures, lambda: ImageField((1, 3, 3), 16), lambda: ImageField((1, 3, 3), 8, 1), training, 4)
    seen = judges_of(images.train[0])
    robot = Robot(Table, count=2, episodes=1, width=16, training=training)
    return Task(motions, images, seen | {"frechet_features": seen["frechet"]}, 40, 1, robot)


def run(task, arm):
    """(rows, notes by name) of an arm on a task."""
    events = []
    study.arms[arm].run(task, Trial(TrialSpec("fewer.diffusion.flow_mle.study", study.slug, arm, 0, Scale.QUICK, {}), events.append))
    rows = [Row(arm, 0, e.name, e.coordinates, e.value) for e in events if isinstance(e, FigureEvent)]
    return rows, {e.name: e.text for e in events if isinstance(e, NoteEvent)}


def test_each_arm_logs_every_declared_figure_and_the_claims_are_judged(small):
    rows = []
    for arm in study.arms:
        logged, notes = run(small, arm)
        names = {(row.figure, tuple(sorted(row.coordinates.items()))) for row in logged}
        for figure in study.figures:
            of_images = figure.name.startswith(("frechet", "floor", "reconstruction", "latent"))
            if (arm == "contracting" and of_images) or (figure.name == "latent_std" and arm not in ("ft-invert", "resft")):
                continue
            if arm == "regression" and figure.name not in OF_THE_ARM:
                continue
            assert any(figure.name == name and (not figure.at or tuple(sorted(figure.at.items())) == at) for name, at in names), (
                arm,
                figure,
            )
        kinds = {"images"} if arm == "contracting" else {"robot"} if arm in ("fm-longer", "regression") else set()
        tuned = {"share"} if arm == "ft-random" or arm == "resft" else {"share", "the"} if arm == "contracting" else set()
        assert {note for note in notes if ":" not in note} == kinds
        assert {note.split(": ")[1].split()[0] for note in notes if ":" in note} == tuned
        rows += logged
    results = Results(rows, list(study.arms))
    judged = judge(study, results)
    assert "not testable here" not in [each.verdict for each in judged[:-1]]
    assert judged[-1].verdict == "not testable here"
    assert "of flow matching's Frechet distance" in study.summarise(results)
    assert "A robot's arm put" in study.summarise(results)


def test_a_policy_is_tuned_for_each_number_of_calls_and_rivals_are_not(small, monkeypatch):
    trained, real = [], module.further
    monkeypatch.setattr(module, "further", lambda *given: trained.append(given[2:5]) or real(*given))
    robot = dataclasses.replace(small, motions=None, images=None)
    rows = run(robot, "resft")[0] + run(robot, "fm")[0] + run(robot, "regression")[0]
    assert trained == [*(("resft", calls, 3) for calls in (1, 2, 4, 10)), ("fm", 1, 3), ("regression", 1, 3)]
    solvers = {arm: {(r.coordinates["calls"], r.coordinates["solver"]) for r in rows if r.arm == arm} for arm in ("resft", "fm")}
    assert solvers["fm"] - solvers["resft"] == {(2, "midpoint"), (4, "midpoint"), (10, "midpoint"), (4, "rk4")}
    nfe = {(r.arm, r.coordinates["calls"]): r.value for r in rows if r.figure == "nfe"}
    assert (nfe["fm", 1], nfe["resft", 10], nfe["regression", 10]) == (0.25, 2.5, 0.25)
    told = [each.verdict for each in judge(study, Results(rows, list(study.arms), {"ft-random": "was not run"}))]
    assert told == ["not testable here"] * 9


def test_where_no_arm_is_simulated_it_is_left_out_and_the_reason_says_what_to_do(small, monkeypatch):
    monkeypatch.setattr(module.problems, "images", lambda *given: small.images)
    monkeypatch.setattr(module.problems, "motions", lambda *given: small.motions)
    monkeypatch.setattr(module, "judges_of", lambda *given: small.judges)
    monkeypatch.setattr(module.problems.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="pip install gymnasium-robotics"):
        module.task(Scale.FULL, "", "manipulation")
    whole, quick = module.task(Scale.FULL, ""), module.task(Scale.QUICK, "")
    assert (whole.robot, quick.robot, quick.missing) == (None, None, "")
    assert "pip install gymnasium-robotics" in run(dataclasses.replace(whole, motions=None, images=None), "fm")[1]["manipulation"]
    assert run(quick, "regression") == ([], {"manipulation": "left out: it is judged at full scale"})
    verdict = judge(study, Results(figures(), list(study.arms)))[-2]
    assert (verdict.verdict, verdict.text[:4]) == ("not testable here", "In 1")
    assert "--full --set part=manipulation" in verdict.reason
    assert "pip install gymnasium-robotics==1.4.2 mujoco==3.3.7" in verdict.reason
    only = module.task(Scale.QUICK, "", "motions")
    assert (only.images, only.motions) == (None, small.motions)
    for words, said in ((("", "manipulation"), "add --full"), (("own.npz", "motions"), "leave part out")):
        with pytest.raises(UserError, match=said):
            module.task(Scale.QUICK, *words)


def figures(**change):
    """What the arms would log if the method worked, with some of it changed."""
    good = {"rmse": {"ft-random": 0.08, "resft": 0.11, "contracting": 0.1}, "shift": {"contracting": 0.14}}
    values = {"shift": 0.17, "rmse": 0.2, "one": {"ft-invert": 0.3}, "four": {"ft-invert": 0.3}, "back": {"ft-invert": 0.01}} | change
    for arm in ARMS:
        for seed in range(3):
            noise = 1 + 0.002 * seed

            def of(name, usual, arm=arm):
                given = values.get(name)
                return (given if isinstance(given, dict) else good.get(name, {})).get(arm, usual)

            yield Row(arm, seed, "rmse", {"steps": K}, of("rmse", 0.2) * noise)
            yield Row(arm, seed, "shift", {}, of("shift", 0.17) * noise)
            for steps, name, usual in ((1, "one", 12.0), (4, "four", 1.1)):
                yield Row(arm, seed, "frechet", own(steps), of(name, usual) * noise)
                yield Row(arm, seed, "reconstruction", {"tuned": steps}, of("back", 0.25) * noise)
            for calls, name, usual in ((1, "acts", 0.1), (2, "acts", 0.1), (10, "rival", 0.6)) if "acts" in values else ():
                yield Row(arm, seed, "precise", acting(calls), of(name, usual) * noise)


def verdicts(**change):
    return [each.verdict for each in judge(study, Results(figures(**change), list(study.arms)))][:8]


def test_every_claim_turns_where_the_method_gains_nothing():
    assert verdicts() == ["holds"] * 7 + ["not testable here"]
    assert verdicts(rmse={})[0] == "fails"
    assert verdicts(shift={})[1] == "fails"
    assert verdicts(one={})[2] == "fails"
    assert verdicts(four={})[3] == "fails"
    assert verdicts(back={})[4] == "fails"
    assert verdicts(four={"ft-invert": 0.3, "fm-longer": 0.5})[5] == "fails"
    assert verdicts(one={"ft-invert": 0.3, "ft-random": 6.0})[6] == "fails"
    assert verdicts(acts={"ft-random": 0.57})[7] == "holds"
    assert verdicts(acts={"ft-random": 0.5})[7] == "fails"
    assert verdicts(acts={"ft-random": 0.57, "fm": 0.62}, rival=0.5)[7] == "fails"


def test_base_fields_are_trained_once_a_seed(small, monkeypatch):
    count, real = [0], problems.fit_flow
    monkeypatch.setattr(problems, "fit_flow", lambda *given: count.__setitem__(0, count[0] + 1) or real(*given))
    first, again, other = (dataclasses.replace(small.motions).kept(seed) for seed in (11, 11, 12))
    assert count[0] == 2
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    x0, cond = first[1], small.motions.train[1]
    assert torch.allclose(odeint(first[0], x0, 40, method="rk4", cond=cond), small.motions.train[0], atol=1e-2)


@pytest.mark.parametrize("shape", [(3, 5, 6), (9, 10)])
def test_a_users_images_are_learnt_and_judged(shape, tmp_path, small):
    file, x = tmp_path / "own.npz", np.random.default_rng(0).integers(0, 256, size=(200, *shape), dtype=np.uint8)
    np.savez(file, x=x)
    job = study.build_task(Scale.QUICK, study.choose_options({"data": str(file)}))
    assert job.images.train[0].shape == (160, *(shape if len(shape) == 3 else (1, *shape)))
    quick = dataclasses.replace(job.images, training=Training(2, 16, 1e-3, 0.9), latents=3)
    rows, notes = run(dataclasses.replace(job, images=quick, samples=70), "ft-invert")
    assert set(notes) == {"motions"}
    assert {row.figure for row in rows} == {"floor", "frechet", "reconstruction", "latent_std"}
    both = rows + run(dataclasses.replace(job, images=quick, samples=70), "fm")[0]
    told = [
        each.verdict for each in judge(study, Results(both, list(study.arms), {"ft-random": "was not run", "fm-longer": "was not run"}))
    ]
    assert told[:2] == ["not testable here"] * 2
    np.savez(file, x=(x / 127.5 - 1).astype(np.float32))
    assert torch.allclose(problems.images(str(file)).train[0], job.images.train[0], atol=1e-6)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((250, 4), np.uint8), r"x is \(250, 4\) uint8; expected images"),
        (np.zeros((10, 4, 4), np.uint8), "N >= 200"),
        (np.zeros((250, 4, 4), np.int64), "int64; expected images"),
        (np.full((250, 4, 4), np.nan), r"values outside \[-1, 1\]"),
        (None, "no array 'x'"),
    ],
)
def test_files_that_cannot_be_learnt_are_refused(x, words, tmp_path):
    np.savez(tmp_path / "own.npz", **({"y": np.zeros(3)} if x is None else {"x": x}))
    with pytest.raises(UserError, match=words):
        module.task(Scale.QUICK, str(tmp_path / "own.npz"))


def test_races_compare_like_with_like(monkeypatch):
    monkeypatch.setattr(bench, "B", 4)
    ours, theirs = bench.norms()
    assert torch.allclose(ours(), theirs(), atol=1e-3)
    field, x0, x1, cond = bench.made(8)
    monkeypatch.setattr(bench, "made", lambda: (field, x0, x1, cond))
    grads = []
    for each in bench.step():
        each()
        grads.append([weight.grad.clone() for weight in field.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))
    assert bench.calls() == (1, 25)
    kept, plain = bench.memory()
    assert kept < plain
    assert bench.contraction()[1] < 1
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    for race in (bench.solve, bench.pretraining):
        with pytest.raises(MissingExtra, match="is not installed; install it with: pip install (--no-deps )?torch"):
            race()


# The verb


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    field = VelocityMLP(3, 2, 8).eval()
    field.save_pretrained(tmp_path / "model")
    x = torch.randn(40, 3).numpy()
    np.savez(tmp_path / "data.npz", x=x, cond=x[:, :2])
    return field, tmp_path


WORDS = ("finetune-flow", "model", "data.npz", "--updates", "3", "--out", "made")


def test_the_verb_writes_what_is_loaded_again(fewer, files):
    field, folder = files
    told = json.loads(fewer(*WORDS, "--steps", "3", "--json").stdout)
    assert (told["steps"], told["mode"], told["updates"]) == (3, "residual", 3)
    made = load_finetuned(folder / "made", VelocityMLP.from_pretrained(folder / "model"))
    x0, cond = torch.randn(5, 3), torch.randn(5, 2)
    assert not torch.equal(made.sample(x0, cond), odeint(field, x0, 3, cond=cond))
    assert "is not empty" in fewer(*WORDS, status=2).stderr
    for mode in ("full", "contracting"):
        assert "parameters tuned for 4 steps" in fewer(*WORDS, "--overwrite", "--mode", mode, "--pairing", "mixed").stdout
        assert load_finetuned(folder / "made", field).steps == 4


@pytest.mark.parametrize(
    ("arrays", "words", "said"),
    [
        ({"x": np.zeros((9, 4)), "cond": np.zeros((9, 2))}, (), "x is (9, 4) float64; expected numbers [N, 3]"),
        ({"x": np.zeros((9, 3))}, (), "cond is missing; expected numbers [N, 2]"),
        ({"x": np.full((9, 3), np.nan), "cond": np.zeros((9, 2))}, (), "data has a NaN or infinite number in row 0"),
        ({"x": np.zeros((9, 3)), "cond": np.zeros((8, 2))}, (), "expected one row each"),
        ({"y": np.zeros(3)}, (), "no array 'x'"),
        (None, ("--steps", "0"), "--steps"),
        (None, ("--out", "model"), "is model, which is read here"),
    ],
)
def test_what_the_verb_cannot_do_is_one_error_and_writes_nothing(fewer, files, arrays, words, said):
    _, folder = files
    if arrays is not None:
        np.savez(folder / "data.npz", **arrays)
    before = sorted(folder.rglob("*"))
    told = fewer(*WORDS, *words, status=2).stderr
    assert said in " ".join(told.split())
    assert sorted(folder.rglob("*")) == before


def test_models_that_are_none_are_refused(fewer, files):
    _, folder = files
    (folder / "model" / "config.json").write_text('{"model": "Other"}')
    assert "expected a VelocityMLP" in fewer(*WORDS, status=2).stderr
    (folder / "model" / "config.json").write_text('{"model": "VelocityMLP", "sizes": {"dim": 4}}')
    assert "does not fit its own sizes" in fewer(*WORDS, status=2).stderr
