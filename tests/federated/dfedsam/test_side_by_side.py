"""DFedSAM's study on a user's own images: every arm logs what the tables show, a file's own clients are taken, and claims can fail."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from trials import told_by

from fewer.errors import UserError
from fewer.federated.dfedsam import study as side_by_side
from fewer.study import Results, Scale
from fewer.study.results import Row

QUICK = dataclasses.replace(side_by_side.SIZES[Scale.QUICK], rounds=6)
ARMS = list(side_by_side.study.arms)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """`run(arm, **arrays)`: the figures and notes of an arm on 500 images of one's own."""
    monkeypatch.setitem(side_by_side.SIZES, Scale.QUICK, QUICK)
    monkeypatch.setattr(side_by_side, "LOCAL_STEPS", 2)

    def run(arm, tuning=False, scale=Scale.QUICK, **arrays):
        y = np.arange(500) % 4
        x = np.random.default_rng(0).integers(0, 60, (500, 8, 8), dtype=np.uint8) + (50 * y).astype(np.uint8)[:, None, None]
        np.savez(tmp_path / "mine.npz", x=x, y=y, **arrays)
        settings = {"data": str(tmp_path / "mine.npz"), "lr": 0.05}
        return told_by(side_by_side, arm, settings, tuning=tuning, scale=scale)

    return run


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_logs_every_figure_of_the_tables(mine, arm):
    figures, notes, _ = mine(arm)
    for figure in side_by_side.study.figures:
        if (figure.name, arm) != ("consensus", "fedsam-server"):  # where all have the same model
            assert tuple(side_by_side.MOST.items()) in figures[figure.name], figure.name
    assert [dict(key)["round"] for key in figures["accuracy"] if "round" in dict(key)] == [2, 3, 4, 5, 6]
    assert notes["clients"].endswith("Dirichlet 0.1")


def test_arms_differ_in_what_they_say(mine):
    at = tuple(side_by_side.MOST.items())
    found = {arm: {name: values[at] for name, values in mine(arm)[0].items() if at in values} for arm in ARMS}
    gradients = {arm: each["gradients"] for arm, each in found.items()}
    assert gradients["dfedsam"] == gradients["dfedsam-mgs"] == gradients["fedsam-server"] == 2 * gradients["dfedavg"] > 0
    assert found["dfedsam-mgs"]["bytes"] == 4 * found["dfedsam"]["bytes"]
    assert found["dfedsam-mgs"]["consensus"] < found["dfedsam"]["consensus"]
    assert found["dfedsam"]["busiest_bytes"] < found["fedsam-server"]["busiest_bytes"]
    assert found["fedsam-server"]["accuracy"] == found["fedsam-server"]["local_accuracy"]


def test_a_files_own_clients_are_taken(mine):
    assert mine("dfedavg", client=np.arange(500) % 6 * 10)[1]["clients"] == "6, as the file says"
    with pytest.raises(UserError, match="client names 1 client; expected at least 2"):
        mine("dfedavg", client=np.zeros(500, int))


def test_tuning_looks_at_validation_images_alone(mine):
    figures, _, objectives = mine("dfedsam", tuning=True)
    assert len(objectives) == 1
    assert max(dict(key)["round"] for key in figures["accuracy"]) == QUICK.rounds // 2


def test_full_scale_has_further_splits_graphs_and_gossip_steps(mine, monkeypatch):
    """With small nets in place of ResNet-18."""
    monkeypatch.setitem(side_by_side.SIZES, Scale.FULL, dataclasses.replace(QUICK, rounds=1, clients=6, batch_size=60))
    make_model = side_by_side.make_model
    monkeypatch.setattr(side_by_side, "make_model", lambda task, scale, seed: make_model(task, Scale.QUICK, seed))
    figures, _, _ = mine("dfedsam", scale=Scale.FULL)
    ends = [dict(key) for key in figures["local_accuracy"] if "round" not in dict(key)]
    assert [end for end in ends if "graph" not in end] == [{"unlike": unlike} for unlike in (0.1, 0.3, 0.6)]
    assert [end["graph"] for end in ends if "graph" in end] == [
        "torus(2, 3)",
        "exponential(6)",
        "random_graph(6, 5, seed=0)",
        "complete(6)",
    ]
    assert not [key for key in figures["accuracy"] if {"round", "graph"} <= set(dict(key))]  # they would lie on the arm's own curve
    figures, _, _ = mine("dfedsam-mgs", scale=Scale.FULL)
    assert [dict(key)["steps"] for key in figures["bytes"] if "graph" in dict(key) and "round" not in dict(key)] == [2, 8]


GOOD = {
    ("accuracy", "dfedavg"): 0.74, ("accuracy", "dfedsam"): 0.76, ("accuracy", "dfedsam-mgs"): 0.78, ("accuracy", "fedsam-server"): 0.79,
    ("local_accuracy", "dfedsam"): 0.65, ("local_accuracy", "dfedsam-mgs"): 0.73, ("local_accuracy", "dfedsam-exponential"): 0.75,
    ("consensus", "dfedsam"): 1.0, ("consensus", "dfedsam-mgs"): 0.14,
}  # fmt: skip
WORSE = [
    {},
    {("accuracy", "dfedsam"): 0.73},
    {("accuracy", "dfedsam"): 0.775},
    {("local_accuracy", "dfedsam-mgs"): 0.69},
    {("consensus", "dfedsam-mgs"): 0.4},
    {("accuracy", "fedsam-server"): 0.83},
    {("local_accuracy", "dfedsam-exponential"): 0.68},
]
FAILING = [[], [0], [1], [1], [2], [3], [4]]


@pytest.mark.parametrize(("worse", "failing"), list(zip(WORSE, FAILING, strict=True)))
def test_a_claim_fails_where_its_figures_say_so(worse, failing):
    rows = [
        Row(arm, seed, figure, side_by_side.MOST, value + 0.001 * seed)
        for (figure, arm), value in (GOOD | worse).items()
        for seed in range(3)
    ]
    results = Results(rows, ARMS)
    claims = [claim for claim in side_by_side.study.claims if claim.test is not side_by_side.the_papers_tables]
    assert [number for number, claim in enumerate(claims) if claim.test(results).outcome != "holds"] == failing
    assert all(claims[number].test(results).outcome == "fails" for number in failing)
