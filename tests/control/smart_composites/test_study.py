"""A user's own recording and network in the study: read or refused in one line, and steered by what was learned from the first half."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fewer.control import excitation, mass_spring_damper, simulate
from fewer.control.smart_composites.problems import DT, HORIZON, Recording, learned_from
from fewer.control.smart_composites.study import of_the_mass, study, task
from fewer.errors import UserError
from fewer.study import Results, Scale, Trial, judge
from fewer.study.results import Row
from fewer.study.trial import FigureEvent, TrialSpec

torch.set_num_threads(1)


def recording(steps: int = 800) -> Recording:
    plant = mass_spring_damper()
    u = excitation(plant.lower, plant.upper, steps, np.random.default_rng(0))
    return Recording(u, np.array([plant.reset(0), *(plant.step(each, DT) for each in u[:-1])]))


@pytest.fixture
def log(tmp_path):
    made = recording()
    np.savez(tmp_path / "log.npz", u=made.u[:, 0], y=made.y)
    return tmp_path / "log.npz"


def trial(arm: str, events: list) -> Trial:
    return Trial(TrialSpec("study", study.slug, arm, 0, Scale.QUICK, study.arms[arm].defaults(Scale.QUICK, {})), events.append)


def test_a_learned_plant_moves_as_the_recorded_one_did():
    made = recording()
    plant, second = made.plant(0), made.half(1)
    plant.reset(0)
    plant.x = np.concatenate([second.u[2], *second.y[3::-1]])  # u(n - 1), y(n), ..., y(n - 3) for n = 3
    y = []
    for u in second.u[3:43]:
        plant.step(u, DT)
        y.append(plant.true())
    assert np.sqrt(np.mean((np.array(y) - second.y[4:44]) ** 2)) < 0.1 * second.y.std()


def test_a_controller_of_a_recording_steers_the_plant_it_was_recorded_of(log):
    work = task(Scale.QUICK, log=str(log))
    controller = of_the_mass(work, trial("nr-mpc-1", []), max_iter=1)
    reference = np.where(np.arange(150 + HORIZON[1]) // 40 % 2 == 0, 1.0, -0.5)
    run = simulate(mass_spring_damper(), controller, reference, DT, 150)
    assert run.rms_error < 0.6 * np.sqrt(np.mean(reference**2))
    assert learned_from(work.recording, 0, 8).one_step_rmse < 0.01


def test_a_run_about_a_users_own_is_judged_as_such(log, tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
    torch.export.save(torch.export.export(model, (torch.zeros(1, 3),)), tmp_path / "m.pt2")
    work = task(Scale.QUICK, model=str(tmp_path / "m.pt2"), log=str(log))
    rows = []
    for arm in ("nr-mpc-1", "c", "lqr", "emlearn", "onnxruntime"):
        events: list = []
        study.arms[arm].run(work, trial(arm, events))
        rows += [Row(arm, 0, each.name, each.coordinates, each.value) for each in events if isinstance(each, FigureEvent)]
    assert {row.figure for row in rows} >= {"error", "cpu_seconds", "bytes", "ram_bytes", "parameters"}
    results = Results(rows, list(study.arms))
    assert {verdict.verdict for verdict in judge(study, results)} == {"not testable here"}
    assert "Your network as C takes" in study.summarise(results)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"u": np.zeros(500)}, "has no array 'y'"),
        ({"u": np.zeros(500), "y": np.zeros(400)}, "u has 500 samples and y 400"),
        ({"u": np.zeros(100), "y": np.zeros(100)}, "at least 400"),
        ({"u": np.ones(500), "y": np.arange(500.0)}, "never changes"),
        ({"u": np.arange(500.0), "y": np.full(500, np.nan)}, "y is .* expected finite numbers"),
        ({"u": np.zeros((500, 1, 1)), "y": np.zeros(500)}, "u is .* expected finite numbers"),
    ],
)
def test_a_recording_that_is_none_is_refused_in_one_line(arrays, message, tmp_path):
    np.savez(tmp_path / "log.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        task(Scale.QUICK, log=str(tmp_path / "log.npz"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no file"):
        task(Scale.QUICK, log=str(tmp_path / "absent.npz"))
    with pytest.raises(UserError, match="no file"):
        task(Scale.QUICK, model=str(tmp_path / "absent.onnx"))
