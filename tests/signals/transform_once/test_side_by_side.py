"""The study on small fields: each arm runs, on the study's data and on one's own, and every claim can be judged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fewer.data.operator_sets import Fields
from fewer.signals import navier_stokes
from fewer.signals.transform_once import problems
from fewer.signals.transform_once import study as module
from fewer.study import NotTestable, Results, Scale
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, Trial, TrialSpec


def run(task, settings):
    rows = []
    for name, arm in module.study.arms.items():
        seen = []
        arm.run(task, Trial(TrialSpec("", "", name, 0, Scale.QUICK, dict(arm.settings) | settings), seen.append))
        rows += [Row(name, 0, each.name, each.coordinates, each.value) for each in seen if isinstance(each, FigureEvent)]
    return Results(rows, list(module.study.arms))


def test_every_arm_runs_and_every_claim_is_judged(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "SIZES", module.SIZES | {"train": 40, "test": 10, "resolution": 24, "T": 0.5})
    monkeypatch.setattr(module, "STEP_BATCH", 1)
    monkeypatch.setattr(problems, "SOLVED", 16)
    rough = {
        part: Fields(np.random.default_rng(0).random((n, 12, 12), np.float32), np.ones((n, 12, 12), np.float32))
        for part, n in (("train", 20), ("test", 5))
    }
    monkeypatch.setattr(problems, "load_darcy", lambda: {part: Fields(each.x, each.x.cumsum(2)) for part, each in rough.items()})
    task = module.study.build_task(Scale.QUICK, {})
    results = run(task, {"seconds": 0.3, "epochs": 2})
    outcomes = {}
    for claim in module.study.claims:
        try:
            outcomes[claim.text] = claim.test(results).outcome
        except NotTestable as reason:
            outcomes[claim.text] = str(reason)
    assert [outcome for outcome in outcomes.values() if outcome not in ("holds", "fails", "undecided")] == [
        "the naive start runs at full scale alone"
    ]
    assert outcomes["no error is below the floor of its modes"] == "holds"
    assert results.mean("error", "t1", data="navier-stokes").value < results.mean("error", "mean", data="navier-stokes").value
    assert module.study.summarise(results)


@pytest.mark.parametrize("shape", [(30,), (16, 12), (2, 16, 12)])
def test_fields_of_ones_own(tmp_path, shape):
    x = np.random.default_rng(0).standard_normal((20, *shape)).cumsum(-1)
    np.savez(tmp_path / "mine.npz", x=x, y=2 * x)
    task = module.study.build_task(Scale.QUICK, {"data": str(tmp_path / "mine.npz")})
    assert task.few is None
    assert len(task.main.test_x) == 4
    results = run(task, {"seconds": 0.2})
    assert results.mean("error", "t1", data="yours").value >= results.mean("floor", "t1", data="yours").value
    with pytest.raises(NotTestable, match="your own fields"):
        module.study.claims[0].test(results)
    assert "On your fields T1 erred by" in module.study.summarise(results)


def test_the_rate_rises_and_falls_once():
    factors = [problems.one_cycle(share / 100) for share in range(101)]
    assert factors[0] == pytest.approx(1 / 25)
    assert factors[30] == pytest.approx(1)
    assert factors[-1] == pytest.approx(0, abs=1e-12)
    assert sorted(factors[:31]) == factors[:31]
    assert sorted(factors[30:], reverse=True) == factors[30:]


def test_fields_are_made_once(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path))
    monkeypatch.setattr(problems, "SOLVED", 8)
    first = problems.vorticity(3, 2, 16, 0.1)
    monkeypatch.setattr(problems, "navier_stokes", None)
    again = problems.vorticity(3, 2, 16, 0.1)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    w0, w = navier_stokes(5, 8, T=0.1, seed=0)
    assert first.x.shape == (3, 1, 16, 16)
    torch.testing.assert_close(first.y[:, 0, ::2, ::2] / first.y.std(), w[:3] / w[:3].std(), rtol=0.2, atol=0.2)
    assert w0.shape == (5, 8, 8)
