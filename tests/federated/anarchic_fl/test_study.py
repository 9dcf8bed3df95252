"""The study on a user's own images, and verdicts that turn with made-up figures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from trials import told_by

from fewer.errors import UserError
from fewer.federated.anarchic_fl import study as side_by_side
from fewer.study import NotTestable, Results, Scale
from fewer.study.results import Row

QUICK = dataclasses.replace(side_by_side.SIZES[Scale.QUICK], rounds=20)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """`run(arm, **arrays)`: the figures and notes of an arm on 160 images of one's own."""
    monkeypatch.setitem(side_by_side.SIZES, Scale.QUICK, QUICK)

    def run(arm, **arrays):
        y = np.arange(160) % 4
        x = np.random.default_rng(0).integers(0, 60, (160, 8, 8), dtype=np.uint8) + (50 * y).astype(np.uint8)[:, None, None]
        np.savez(tmp_path / "mine.npz", x=x, y=y, **arrays)
        settings = {"data": str(tmp_path / "mine.npz")}
        return told_by(side_by_side, arm, settings)[:2]

    return run


@pytest.mark.parametrize("arm", side_by_side.study.arms)
def test_every_arm_logs_every_figure_of_the_tables(mine, arm):
    figures, notes = mine(arm)
    for figure in side_by_side.study.figures:
        if figure.at:
            assert tuple(sorted(figure.at.items())) in figures[figure.name], figure.name
    updates = {dict(key)["update"] for key in figures["accuracy"] if "update" in dict(key)}
    assert updates == set(range(1, 21))
    assert notes["clients"] == "10, 2 classes each"
    delay = figures["mean_delay"][(("mode", "random"),)]
    assert delay == 0 if arm == "fedavg" else delay > 1


def test_a_files_own_clients_are_taken(mine):
    _, notes = mine("afa-cs", client=np.arange(160) % 6 * 10)
    assert notes["clients"] == "6, as the file says"
    with pytest.raises(UserError, match="client names 1 client; expected at least 2"):
        mine("fedavg", client=np.zeros(160, int))


def test_all_arms_share_one_clock():
    clock, other = (side_by_side.clock_of(10, mode, 3) for mode in ("random", "fixed"))
    assert clock.seconds_per_step == other.seconds_per_step
    assert isinstance(other.steps, list)
    assert 1 <= min(other.steps) <= max(other.steps) <= side_by_side.MOST_STEPS
    waits = side_by_side.rounds_that_wait(10, 5, 4, "random", 3)
    assert waits[0].time == max(clock.seconds(each.worker, 5) for each in waits[0].returns)


def test_delays_at_full_scale_are_drawn_up_to_the_most():
    drawn = {t - each.version for t, update in enumerate(side_by_side.delayed_visits(100, 10, 300, 10, 0)) for each in update.returns}
    assert drawn == set(range(11))


GOOD = {
    ("fedavg", "random"): (0.78, 3000.0), ("fedavg", "fixed"): (0.78, 3000.0),
    ("fedbuff", "random"): (0.78, 900.0), ("fedbuff", "fixed"): (0.76, 900.0),
    ("afa-cd", "random"): (0.77, 900.0), ("afa-cd", "fixed"): (0.74, 900.0),
    ("afa-cs", "random"): (0.78, 900.0), ("afa-cs", "fixed"): (0.79, 900.0),
}  # fmt: skip


def outcomes(**changed):
    """claim -> its outcome on made-up figures; `changed` gives other accuracies or seconds."""
    values = {key: list(pair) for key, pair in GOOD.items()}
    for name, value in changed.items():
        arm, mode, place = name.replace("afa_", "afa-").split("_")
        values[arm, mode][int(place)] = value
    rows = [
        Row(arm, seed, figure, {"mode": mode}, value + 1e-4 * seed)
        for (arm, mode), pair in values.items()
        for figure, value in zip(("accuracy", "simulated_seconds"), pair, strict=True)
        for seed in range(3)
    ]
    results = Results(rows, list(side_by_side.study.arms))
    return {claim.__name__: claim(results).outcome for claim in CLAIMS}


CLAIMS = [
    side_by_side.cs_comparable, side_by_side.cd_comparable, side_by_side.no_error_term, side_by_side.no_waiting, side_by_side.above_fedbuff,
]  # fmt: skip


def test_all_claims_hold_on_figures_that_bear_them_out():
    assert set(outcomes().values()) == {"holds"}
    with pytest.raises(NotTestable):
        side_by_side.linear_speed_up(Results([], []))


@pytest.mark.parametrize(
    ("claim", "changed"),
    [
        ("cs_comparable", {"afa_cs_random_0": 0.74}),
        ("cs_comparable", {"fedavg_fixed_0": 0.83}),
        ("cd_comparable", {"afa_cd_random_0": 0.70}),
        ("no_error_term", {"afa_cd_fixed_0": 0.785}),
        ("no_waiting", {"afa_cs_random_1": 2000.0}),
        ("above_fedbuff", {"fedbuff_fixed_0": 0.785}),
    ],
)
def test_a_claim_fails_on_figures_that_do_not(claim, changed):
    turned = outcomes(**changed)
    assert turned[claim] == "fails"
