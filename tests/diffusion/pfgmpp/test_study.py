"""The study on tasks that are small: what each arm logs, a user's images, and which verdicts can turn."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from fewer.diffusion.pfgmpp import problems, quantize_weights
from fewer.diffusion.pfgmpp import study as module
from fewer.diffusion.pfgmpp.problems import Task, make_task, train
from fewer.diffusion.pfgmpp.study import COARSE, NOISY, NOT_ON_A_GRID, PLAIN, SHORT, study
from fewer.study import Scale, Trial
from fewer.study.results import Results, Row
from fewer.study.trial import FigureEvent, NoteEvent, TrialSpec
from fewer.study.verdicts import judge
from fewer.tasks import image_judges
from fewer.tasks.digit_features import DigitFeatures


@pytest.fixture
def small(monkeypatch) -> Task:
    """Digits that are seldom seen, and a judge that learnt nothing."""
    monkeypatch.setattr(problems, "BATCH", 16)
    monkeypatch.setattr(module, "BATCH", 16)
    monkeypatch.setattr(image_judges, "load_features", lambda kind: DigitFeatures(8).eval().requires_grad_(False))
    whole = make_task("", 4, large=False)
    return dataclasses.replace(whole, train=whole.train[:300], test=whole.test[:100], samples=80)


def run(task: Task, arm: str, seed: int = 0, scale: Scale = Scale.QUICK):
    """(figures, notes) of an arm on a task."""
    events = []
    spec = TrialSpec("fewer.diffusion.pfgmpp.study", "pfgmpp", arm, seed, scale, {})
    study.arms[arm].run(task, Trial(spec, events.append))
    rows = [Row(arm, seed, e.name, e.coordinates, e.value) for e in events if isinstance(e, FigureEvent)]
    return rows, [e for e in events if isinstance(e, NoteEvent)]


def test_each_arm_logs_every_declared_figure_and_the_claims_are_judged(small, monkeypatch):
    rows, grids = [], []
    monkeypatch.setattr(module, "quantize_weights", lambda *words: grids.append(words[1:]) or quantize_weights(*words))
    for arm in ("edm", "d16", "d64"):
        logged, _ = run(small, arm)
        for figure in study.figures:
            assert [row for row in logged if row.figure == figure.name and (not figure.at or row.coordinates == figure.at)], figure
        assert {row.coordinates["steps"]: row.value for row in logged if row.figure == "calls"} == {18: 35, 6: 11}
        rows += logged
    ways = PLAIN, NOISY, COARSE, SHORT
    values = {next(r.value for r in rows if r.figure == "frechet" and r.coordinates == how) for how in ways}
    assert len(values) == 4  # noise was added, the weights were put on a grid
    assert grids == 3 * [(4, NOT_ON_A_GRID)]
    verdicts = judge(study, Results(rows, list(study.arms)))
    assert len(verdicts) == 8
    assert "Frechet distance" in study.summarise(Results(rows, list(study.arms)))


def test_further_arms_wait_for_full_scale(small):
    for arm in ("d4", "d256", "d2048"):
        rows, notes = run(small, arm)
        assert not rows
        assert "full scale alone" in notes[0].text
    logged, _ = run(small, "d4", scale=Scale.FULL)
    ways = {tuple(row.coordinates.values()) for row in logged if row.figure == "frechet"}
    assert len(ways) == 11
    assert {bits for _, bits, _ in ways} == {32, 6, 5, 4, 3}


def test_a_method_that_gains_nothing_fails_its_claims():
    def rows(finite):
        values = {("d16", "alpha"): 0.39 * finite, ("d64", "alpha"): 0.53, ("edm", "alpha"): 0.6}
        for seed in range(3):
            for arm in ("edm", "d16", "d64"):
                for how in (PLAIN, NOISY, COARSE, SHORT):
                    value = values[arm, "alpha"] if how == NOISY else 0.18
                    yield Row(arm, seed, "frechet", how, value + 0.001 * seed)
                    yield Row(arm, seed, "frechet_features", how, value + 0.001 * seed)

    good, bad = ([each.verdict for each in judge(study, Results(rows(by), list(study.arms)))] for by in (1.0, 1.6))
    assert good[:4] == ["holds"] * 4
    assert good[4:7] == ["fails"] * 3  # no effect where all are alike
    assert bad[1:4] == ["fails"] * 3


def test_arms_share_initial_weights_and_the_order_of_the_images(small, monkeypatch):
    given, keep = [], []
    original = problems.PFGMPPLoss.forward

    def watched(self, denoiser, y, **words):
        given.append(y)
        keep.append(next(denoiser.parameters()).detach().clone())
        return original(self, denoiser, y, **words)

    monkeypatch.setattr(problems.PFGMPPLoss, "forward", watched)
    models = [train(small, D, 5) for D in (16, math.inf)]
    assert all(torch.equal(a, b) for a, b in zip(given[:4], given[4:], strict=True))
    assert torch.equal(keep[0], keep[4])
    assert not torch.equal(keep[0], next(problems.make_network(small, 6).parameters()))
    first, second = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert not torch.equal(first, second)
    again = train(small, 16, 5)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(3, 5, 6), (10, 10)])
def test_a_users_images_are_learnt_and_judged(shape, tmp_path, small):
    file, x = tmp_path / "own.npz", np.random.default_rng(0).integers(0, 256, size=(250, *shape), dtype=np.uint8)
    np.savez(file, x=x)
    own = make_task(str(file), 2, large=False)
    assert own.train.shape == (200, *(shape if len(shape) == 3 else (1, *shape)))
    assert float(own.train.min()) >= -1
    assert float(own.train.max()) <= 1
    np.savez(file, x=(x / 127.5 - 1).astype(np.float32))
    assert torch.allclose(make_task(str(file), 2, large=False).train, own.train, atol=1e-6)
    rows, _ = run(dataclasses.replace(own, samples=70), "d16")
    assert {"frechet", "floor", "calls"} <= {row.figure for row in rows}
    assert "frechet_features" not in {row.figure for row in rows}
    both = rows + run(dataclasses.replace(own, samples=70), "edm")[0] + run(dataclasses.replace(own, samples=70), "d64")[0]
    assert judge(study, Results(both, list(study.arms)))[2].verdict == "not testable here"


def test_a_u_net_is_trained_at_full_scale(small, monkeypatch):
    monkeypatch.setattr(problems, "BATCH", 2)
    model = train(dataclasses.replace(small, large=True, steps=1), 16, 0)
    x = torch.randn(2, 1, 8, 8)
    before = model.state_dict()
    kept = {name for name, value in quantize_weights(model, 4, NOT_ON_A_GRID).state_dict().items() if torch.equal(value, before[name])}
    assert {f"net.time_embedding.linear_{i}.weight" for i in (1, 2)} <= kept
    assert "net.conv_in.weight" not in kept
    assert isinstance(model, nn.Module)
    assert model(x, torch.ones(2)).shape == x.shape


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((250, 4), np.uint8), r"x is \(250, 4\) uint8; expected images"),
        (np.zeros((10, 4, 4), np.uint8), "N >= 200"),
        (np.zeros((250, 4, 4), np.int64), "int64; expected images"),
        (np.full((250, 4, 4), 3.0), r"values outside \[-1, 1\]"),
        (np.full((250, 4, 4), np.nan), r"values outside \[-1, 1\]"),
        (None, "no array 'x'"),
    ],
)
def test_files_that_cannot_be_learnt_are_refused(x, words, tmp_path):
    file = tmp_path / "own.npz"
    np.savez(file, **({"y": np.zeros(3)} if x is None else {"x": x}))
    with pytest.raises(ValueError, match=words):
        make_task(str(file), 0, large=False)
    with pytest.raises(FileNotFoundError, match="expected an .npz file"):
        make_task(str(tmp_path / "none.npz"), 0, large=False)


def test_images_that_a_u_net_cannot_halve_twice_are_refused(tmp_path):
    np.savez(tmp_path / "own.npz", x=np.zeros((250, 6, 8), np.uint8))
    with pytest.raises(ValueError, match="expected multiples of 4 at full scale"):
        make_task(str(tmp_path / "own.npz"), 0, large=True)
