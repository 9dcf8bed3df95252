"""FedSpeed's study on a user's own images: every arm logs what the tables show, and a file's own clients are taken."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from trials import told_by

from fewer.errors import UserError
from fewer.federated.fedspeed import study as side_by_side
from fewer.study import Scale

QUICK = dataclasses.replace(side_by_side.SIZES[Scale.QUICK], rounds=3)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """`run(arm, **arrays)`: the figures and notes of an arm on 160 images of one's own."""
    monkeypatch.setitem(side_by_side.SIZES, Scale.QUICK, QUICK)

    def run(arm, tuning=False, **arrays):
        y = np.arange(160) % 4
        x = np.random.default_rng(0).integers(0, 60, (160, 8, 8), dtype=np.uint8) + (50 * y).astype(np.uint8)[:, None, None]
        np.savez(tmp_path / "mine.npz", x=x, y=y, **arrays)
        settings = {"data": str(tmp_path / "mine.npz"), "lr": 0.05}
        return told_by(side_by_side, arm, settings, tuning=tuning)

    return run


@pytest.mark.parametrize("arm", side_by_side.study.arms)
def test_every_arm_logs_every_figure_of_the_tables(mine, arm):
    figures, notes, _ = mine(arm)
    for figure in side_by_side.study.figures:
        assert tuple(sorted(side_by_side.MOST.items())) in figures[figure.name], figure.name
    assert [dict(key)["round"] for key in figures["accuracy"] if dict(key).get("round")][:3] == [1, 2, 3]
    assert notes["clients"].endswith(f"Dirichlet {side_by_side.UNLIKE}")


def test_a_files_own_clients_are_taken(mine):
    _, notes, _ = mine("fedavg", client=np.arange(160) % 6 * 10)
    assert notes["clients"] == "6, as the file says"
    with pytest.raises(UserError, match="client names 1 client; expected at least 2"):
        mine("fedavg", client=np.zeros(160, int))


def test_tuning_looks_at_validation_images_alone(mine):
    figures, _, objectives = mine("fedspeed", tuning=True)
    assert len(objectives) == 1
    assert max(dict(key)["round"] for key in figures["accuracy"]) == QUICK.rounds // 2
