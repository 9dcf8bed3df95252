"""The study on a user's own images, what it tells, and that its claims can fail."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from trials import told_by

from fewer.errors import UserError
from fewer.federated.fzoos import problems
from fewer.federated.fzoos import study as side_by_side
from fewer.study import Results, Scale, judge
from fewer.study.results import Row

SMALL = dataclasses.replace(
    side_by_side.SIZES[Scale.QUICK], images=2, rounds=2, steps=2, features=50, dimension=5, quadratic_rounds=2, side=8
)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """`run(arm, **arrays)`: the figures and notes of an arm on images of one's own."""
    monkeypatch.setitem(side_by_side.SIZES, Scale.QUICK, SMALL)

    def run(arm, tuning=False, **arrays):
        y = np.arange(300) % 4
        x = np.random.default_rng(0).integers(0, 60, (300, 8, 8), dtype=np.uint8)
        x[np.arange(300), y, :] += 150
        np.savez(tmp_path / "mine.npz", x=x, y=y, **arrays)
        settings = {"data": str(tmp_path / "mine.npz"), "lr": 0.05}
        return told_by(side_by_side, arm, settings, tuning=tuning)

    return run


@pytest.mark.parametrize("arm", side_by_side.study.arms)
def test_every_arm_tells_every_figure(own, arm):
    figures, notes, _ = own(arm)
    told = {figure.name for figure in side_by_side.study.figures} - {"queries_to_fooled"}
    assert told <= set(figures)
    assert notes["clients"] == "5"
    assert len(figures["image_margin"]) == 2 * 2


def test_a_files_own_clients_each_train_a_model(own):
    _, notes, _ = own("fedzo", client=np.arange(300) % 3)
    assert notes["clients"] == "3"
    with pytest.raises(UserError, match="client names 1 client; expected at least 2"):
        own("fedzo", client=np.zeros(300))


def test_tuning_looks_at_validation_images_alone(own):
    figures, _, objectives = own("fzoos", tuning=True)
    assert len(objectives) == 1
    assert not figures.keys() & {"margin", "image_margin", "error"}


def test_the_least_value_of_the_quadratics_is_where_it_is_said_to_be():
    problem = problems.quadratics(7, 3, 5.0, seed=2)
    least = problem.value(np.full(7, 0.5 - 0.5 / 20))
    assert least == pytest.approx(problem.least, abs=1e-12)
    assert all(problem.value(x) >= least for x in np.random.default_rng(0).random((20, 7)))
    apart = [float(np.std([box(np.full(7, 0.9)) for box in problems.quadratics(7, 3, unlike, 0).boxes])) for unlike in (0.5, 5.0)]
    assert apart[0] < apart[1] / 3


def made_up(**changes):
    """Results in which every claim holds, save for what is changed: name of a figure -> arm -> value of every seed."""
    ends = {"fzoos": -7.0, "fedzo": -5.0, "fedzo-scaffold": -6.0, "fzoos-uncorrected": -4.0} | changes.get("margin", {})
    errors = {"fzoos": 0.01, "fedzo": 0.1, "fedzo-scaffold": 0.1, "fzoos-uncorrected": 0.2} | changes.get("error", {})
    rows = []
    for seed in range(3):
        for arm, end in ends.items():
            tell = lambda name, value, **at: rows.append(Row(arm, seed, name, at, value))  # noqa: B023, E731
            tell("margin", end + 0.01 * seed)
            tell("error", errors[arm] * (1 + 0.01 * seed))
            for round in range(1, 13):
                tell("image_margin", end * round / 12, image=0, round=round)
                tell(
                    "image_queries",
                    changes.get("queries", {}).get(arm, 400 if arm.startswith("fzoos") else 600) * round,
                    image=0,
                    round=round,
                )
    return [verdict.verdict for verdict in judge(side_by_side.study, Results(rows, list(ends)))]


def test_every_claim_can_fail():
    assert made_up() == ["holds"] * 4
    assert made_up(queries={"fzoos": 900})[0] == "fails"
    assert made_up(margin={"fzoos": -4.0})[:3] == ["fails"] * 3
    assert made_up(margin={"fzoos": -5.5})[1:3] == ["fails"] * 2
    assert made_up(error={"fzoos": 0.06})[3] == "fails"
    assert made_up(error={"fzoos-uncorrected": 0.01})[3] == "fails"
