"""The study: trials in fresh processes, resume, troubles, results, verdicts, sealed test data."""

from __future__ import annotations

import io
import math

import msgspec
import numpy as np
import pytest
from guessing.study import study as guessing
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fewer.devices import choose_device
from fewer.errors import UserError, require
from fewer.report.terminal import races_table
from fewer.study import (
    Bars,
    Bench,
    Choice,
    Curve,
    Estimate,
    Figure,
    LocalEngine,
    LogUniform,
    NotTestable,
    Results,
    Scale,
    Store,
    Study,
    Tradeoff,
    Uniform,
    Verdict,
    judge,
    make_record,
    plan,
    run,
)
from fewer.study.results import Row, bootstrap
from fewer.study.runner import Observer
from fewer.study.settings import choose_settings
from fewer.study.trial import FigureEvent, Trial, TrialSpec, run_trial
from fewer.study.tuning import tune_arm
from fewer.study.verdicts import UNDECIDED

MODULE = "guessing.study"


def run_guessing(store, *, seeds=2, fresh=False, observer=None, arms=(), **options):
    with Store(store, write=True) as opened:
        planned = plan(guessing, MODULE, seeds=seeds, given=options, arms=arms, store=opened)
        return run(planned, opened, LocalEngine(), observer, fresh=fresh)


class Counting(Observer):
    """Counts the trials that really ran."""

    ran = 0

    def finished(self, spec, event):
        self.ran += bool(spec.arm)


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store.sqlite"


def test_a_run_gives_every_arm_and_seed_its_figures_and_a_verdict_on_each_claim(store):
    outcome = run_guessing(store, seeds=3)
    assert not outcome.failed
    assert {(row.arm, row.seed) for row in outcome.results.rows} == {(arm, seed) for arm in ("median", "mean", "none") for seed in range(3)}
    assert {verdict.verdict for verdict in outcome.verdicts} == {"holds", "fails"}
    assert outcome.summary == "The mean was off by 0.075."


def test_a_repeated_trial_gives_the_same_figures(store, tmp_path):
    first, second = run_guessing(store), run_guessing(tmp_path / "second.sqlite")
    quality = [row for row in first.results.rows if not row.figure.startswith("work.")]
    assert quality == [row for row in second.results.rows if not row.figure.startswith("work.")]
    assert len({row.value for row in quality if row.figure == "error" and row.arm == "mean"}) > 3, "seeds must matter"


def test_a_second_run_does_only_what_is_missing_and_fresh_starts_over(store):
    run_guessing(store, seeds=1)
    counting = Counting()
    run_guessing(store, seeds=2, observer=counting)
    assert counting.ran == 3
    run_guessing(store, seeds=2, observer=counting)
    assert counting.ran == 3
    run_guessing(store, seeds=2, observer=counting, fresh=True)
    assert counting.ran == 9


def test_changed_options_are_other_trials(store):
    run_guessing(store, seeds=1)
    counting = Counting()
    run_guessing(store, seeds=1, observer=counting, size="50")
    assert counting.ran == 3


@pytest.mark.parametrize(
    ("trouble", "status", "words"),
    [
        ("raise", "failed", "ZeroDivisionError: a fault in the arm"),
        ("exit", "killed", "last words"),
        ("signal", "killed", "SIGKILL"),
        ("memory", "out of memory", "MemoryError"),
        ("endless", "timed out", "time limit of 8 s"),
    ],
)
def test_a_trial_that_comes_to_grief_is_recorded_and_the_rest_goes_on(store, monkeypatch, trouble, status, words):
    monkeypatch.setattr(guessing, "time_limit", 8.0 if trouble == "endless" else 120.0)  # enough for the others on a busy machine
    outcome = run_guessing(store, seeds=1, trouble=trouble)
    assert list(outcome.failed) == ["mean, seed 0"]
    assert outcome.failed["mean, seed 0"].startswith(status)
    assert words in outcome.failed["mean, seed 0"]
    assert outcome.verdicts[0].verdict == "not testable here"
    assert "mean seed 0" in outcome.verdicts[0].reason
    assert outcome.verdicts[1].verdict == "fails"
    with Store(store) as opened:
        statuses = {trial.arm: trial.status for trial in opened.trials()}
    assert statuses == {"median": "done", "mean": status, "none": "done"}


def test_nan_is_kept_as_nan_and_never_averaged(store):
    outcome = run_guessing(store, trouble="nan")
    assert all(math.isnan(row.value) for row in outcome.results.rows if row.arm == "mean")
    assert outcome.verdicts[0].verdict == "not testable here"
    assert "final of mean is NaN for seed 0" in outcome.verdicts[0].reason
    record = make_record(outcome)
    assert record.figures["final"]["mean"] == [({}, [None, None])]
    assert math.isnan(record.results().curve("final", "mean")[()][0])


def test_a_record_has_charts_of_what_an_arm_logged(store, monkeypatch):
    drawn = [Curve("error", over="size"), Tradeoff("unknown", "final"), Bars(("final", "unknown"))]
    monkeypatch.setattr(guessing, "charts", [*drawn, Curve("unknown", over="size"), Bars(("unknown",))])
    assert make_record(run_guessing(store, seeds=1)).charts == drawn


def test_trouble_with_data_is_told_once_before_any_arm_runs(store):
    counting = Counting()
    with pytest.raises(UserError, match="none of 2 sources"):
        run_guessing(store, trouble="data", observer=counting)
    assert counting.ran == 0


def test_parallel_jobs_give_the_figures_of_one(store, tmp_path):
    alone = run_guessing(store)
    with Store(tmp_path / "parallel.sqlite", write=True) as opened:
        together = run(plan(guessing, MODULE, seeds=2, jobs=2, store=opened), opened, LocalEngine(jobs=2))
    figures = [[row for row in outcome.results.rows if not row.figure.startswith("work.")] for outcome in (alone, together)]
    assert figures[0] == figures[1]


def test_a_study_says_how_many_trials_go_at_a_time_and_the_command_may_say_otherwise(monkeypatch):
    monkeypatch.setattr("fewer.study.runner.usable_cores", lambda: 2)
    counted = Study("counted", question="?", jobs=4)
    counted.arm("only")(lambda task, trial: None)
    assert plan(counted, MODULE).jobs == 2
    assert {spec.threads for spec in plan(counted, MODULE).specs} == {1}
    assert plan(counted, MODULE, jobs=1).jobs == 1
    assert plan(counted, MODULE, device="cuda").jobs == 1
    assert plan(guessing, MODULE).jobs == 1
    with pytest.raises(ValueError, match="counted: jobs is 2 and seconds are told; expected cpu_seconds, or one trial at a time"):
        Study("counted", question="?", figures=[Figure("seconds", "time")], jobs=2)


def test_an_arm_cannot_reach_test_data_while_settings_are_tuned():
    events = []
    settings = {"size": 40, "shape": "flat", "trouble": "peek", "shift": 0.1}
    run_trial(TrialSpec(MODULE, "guessing", "mean", 0, Scale.QUICK, settings, tuning=True), events.append)
    assert events[-1].status == "failed"
    assert "test data are sealed while settings are tuned" in events[-1].error
    run_trial(TrialSpec(MODULE, "guessing", "mean", 0, Scale.QUICK, settings), events.append)
    assert events[-1].status == "done", "outside of tuning the same arm reads them"


def test_tuning_gives_every_arm_the_same_budget_and_finds_better_settings(store, tmp_path):
    told = []
    with Store(store, write=True) as opened:
        planned = plan(guessing, MODULE, seeds=1, store=opened)
        for arm in ("median", "mean"):
            tuning = tune_arm(planned, guessing.arms[arm], LocalEngine(), trials=8, observe=lambda *words: told.append(words))
            assert tuning.settings["shift"] < 0.1, "the best shift is the smallest"
            opened.save_tuning("guessing", arm, planned.scale, planned.options, tuning)
        assert [sum(words[0] == arm for words in told) for arm in ("median", "mean")] == [8, 8]
        assert any(words[3] == "pruned" for words in told)
        settings, origin = choose_settings(guessing, MODULE, guessing.arms["mean"], Scale.QUICK, planned.options, opened)
        assert settings["shift"] == tuning.settings["shift"]
        assert origin.startswith("tuned here: ")
        outcome = run(plan(guessing, MODULE, seeds=1, store=opened), opened, LocalEngine())
    assert outcome.notes["mean"]["settings"].startswith("tuned here: ")
    assert outcome.notes["none"]["settings"] == "fixed"


def test_tuning_that_never_tells_an_objective_is_refused(store):
    with Store(store, write=True) as opened, pytest.raises(UserError, match="none of 2 trials told an objective"):
        tune_arm(plan(guessing, MODULE, given={"trouble": "raise"}, store=opened), guessing.arms["mean"], LocalEngine(), trials=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"seeds": 0}, "--seeds 0: expected at least 1"),
        ({"arms": ["meann"]}, "did you mean 'mean'"),
        ({"given": {"sise": "3"}}, "did you mean 'size'.*known: size, shape, trouble"),
        ({"given": {"size": "many"}}, "expected int"),
        ({"given": {"shape": "stepe"}}, "did you mean 'steep'"),
    ],
)
def test_what_a_user_gets_wrong_is_named_with_the_way_out(words, message):
    with pytest.raises(UserError, match=message):
        plan(guessing, MODULE, **words)


def test_unknown_devices_and_absent_gpus_are_refused():
    with pytest.raises(UserError, match="expected auto, cpu or cuda"):
        choose_device("tpu")
    assert choose_device("cpu") == "cpu"


# Results and claims


def results_of(*values, figure="error", arm="a"):
    return Results([Row(arm, seed, figure, {}, value) for seed, value in enumerate(values)], ["a", "b"], {"b": "was not run"})


def test_a_ratio_is_of_means_and_its_interval_holds_it():
    rows = [
        Row(arm, seed, "error", {}, value)
        for arm, values in {"a": (1.0, 2.0, 3.0), "b": (2.0, 4.0, 6.0)}.items()
        for seed, value in enumerate(values)
    ]
    estimate = Results(rows, ["a", "b"]).ratio("error", "a", "b")
    assert (estimate.value, estimate.low, estimate.high) == (0.5, 0.5, 0.5)
    assert estimate <= 0.5
    assert not estimate < 0.5


def test_differences_are_paired_by_seed():
    rows = [Row(arm, seed, "error", {}, seed + shift) for arm, shift in (("a", 0.25), ("b", 0.0)) for seed in range(5)]
    rows.append(Row("a", 9, "error", {}, 1000.0))
    estimate = Results(rows, ["a", "b"]).difference("error", "a", "b")
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((0.25, 0.25, 0.25))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8))
def test_a_bootstrap_interval_lies_within_the_values_and_around_the_mean(values):
    sample = np.array(values)
    estimate = bootstrap(lambda a: a, sample)
    slack = 1e-9 * max(1.0, np.abs(sample).max())
    assert sample.min() - slack <= estimate.low <= estimate.value + slack
    assert estimate.value - slack <= estimate.high <= sample.max() + slack


def test_areas_and_thresholds_are_those_of_known_curves():
    rows = [Row("a", seed, "error", {"n": n}, 10.0 - n) for seed in (0, 1) for n in (0, 2, 10)]
    results = Results(rows, ["a"])
    assert results.area("error", "a", over="n").value == pytest.approx(5.0)
    assert results.threshold("error", "a", over="n", reach=8.0, better="lower").value == 2
    assert results.threshold("error", "a", over="n", reach=-1.0, better="lower").value == math.inf
    assert results.mean("error", "a", n=2).value == 8.0
    slower = [Row("b", seed, "error", {"n": n}, 10.0 - n / (5 - seed)) for seed in (0, 1, 2) for n in (0, 2, 10)]
    both = Results([*rows, *slower], ["a", "b"])
    assert both.threshold("error", "a", over="n", reach="b", better="lower").per_seed.tolist() == [2.0, 10.0]  # b ends at 8 and at 7.5
    assert both.threshold("error", "b", over="n", reach="a", better="lower").value == math.inf
    with pytest.raises(NotTestable, match="it has some at: n=0; n=2; n=10"):
        results.mean("error", "a", n=3)


def test_what_is_never_reached_survives_a_record():
    study = Study("never", question="When?")
    study.arm("a")(lambda task, trial: None)
    study.claim("it comes")(lambda results: results.threshold("error", "a", over="n", reach=-1.0, better="lower") < 5)
    rows = [Row("a", 0, "error", {"n": n}, 1.0) for n in (1, 2)]
    (verdict,) = judge(study, Results(rows, ["a"]))
    again = msgspec.json.decode(msgspec.json.encode(verdict), type=Verdict)
    assert again == verdict
    assert verdict.verdict == "fails"
    assert str(again.ours[0]) == "never [never, never], claimed < 5"


def test_a_curve_at_further_coordinates_is_one_of_several():
    rows = [Row("a", 0, "error", {"n": n, "data": data}, n * slope) for n in (0.0, 4.0) for data, slope in (("x", 1.0), ("y", 3.0))]
    results = Results([*rows, Row("a", 0, "error", {}, 99.0)], ["a"])
    assert results.area("error", "a", over="n", data="x").value == pytest.approx(2.0)
    assert results.area("error", "a", over="n", data="y").value == pytest.approx(6.0)
    assert results.threshold("error", "a", over="n", reach=10, data="y").value == 4.0
    with pytest.raises(NotTestable, match="logs no error over n at data=z"):
        results.area("error", "a", over="n", data="z")


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        (lambda results: results.mean("eror", "a") < 1, "did you mean 'error'.*known: error"),
        (lambda results: results.mean("error", "c") < 1, "names the arm 'c'"),
    ],
)
def test_a_claim_that_names_what_does_not_exist_is_a_mistake_to_mend(claim, message):
    study = Study("s", question="?")
    study.claim("a claim")(claim)
    with pytest.raises(UserError, match=message):
        judge(study, results_of(1.0))


def test_a_claim_about_an_arm_that_was_not_run_is_not_testable_and_says_why():
    study = Study("s", question="?")
    study.claim("b is better")(lambda results: results.ratio("error", "b", "a") < 1)
    verdict = judge(study, results_of(1.0))[0]
    assert (verdict.verdict, verdict.reason) == ("not testable here", "b was not run")


def test_a_failing_claim_keeps_failing_and_shows_ours_beside_the_bound():
    study = Study("s", question="?")
    study.claim("small", paper="0.5", if_fails="too little data")(
        lambda results: (results.mean("error", "a") <= 0.5) & (results.mean("error", "a") >= 0)
    )
    verdict = judge(study, results_of(1.0, 3.0))[0]
    assert (verdict.verdict, verdict.paper, verdict.reason) == ("fails", "0.5", "too little data")
    assert [(measured.value, measured.bound) for measured in verdict.ours] == [(2.0, 0.5), (2.0, 0.0)]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [((0.1, 0.2, 0.3), "holds"), ((0.6, 0.7, 0.8), "fails"), ((0.1, 0.2, 0.9), "undecided"), ((0.4, 0.9, 0.9), "undecided")],
)
def test_a_verdict_rests_on_the_interval_over_seeds_and_not_on_the_point(values, verdict):
    study = Study("s", question="?")
    study.claim("small", if_fails="too large")(lambda results: results.mean("error", "a") <= 0.5)
    study.claim("and", if_fails="too large")(lambda results: (results.mean("error", "a") <= 0.5) & (results.mean("error", "a") >= 0))
    study.claim("python's and")(lambda results: (results.mean("error", "a") >= 0) and results.mean("error", "a") <= 0.5)
    for judged in judge(study, results_of(*values)):
        assert judged.verdict == verdict
    assert judge(study, results_of(*values))[0].reason == {"holds": "", "fails": "too large"}.get(verdict, UNDECIDED)


def test_one_part_that_fails_is_enough_and_one_undecided_leaves_it_open():
    mean = results_of(0.1, 0.9).mean("error", "a")
    assert ((mean < 0.5) & (mean > 2)).outcome == "fails"
    assert ((mean < 0.5) & (mean > 0)).outcome == "undecided"
    assert mean.between(0, 1).outcome == "holds"
    assert mean.between(0, 0.5).outcome == "undecided"


def test_some_seeds_that_never_get_there_leave_it_undecided():
    rows = [Row("a", seed, "error", {"n": n}, 1.0 if seed and n == 2 else 9.0) for seed in (0, 1, 2) for n in (1, 2)]
    reached = Results(rows, ["a"]).threshold("error", "a", over="n", reach=1.0, better="lower")
    assert (reached.low, reached.high) == (2.0, math.inf)
    assert (reached <= 2).outcome == "undecided"


def test_no_worse_best_spread_and_words():
    rows = [Row(arm, seed, "accuracy", {}, value + 0.01 * seed) for arm, value in (("a", 0.80), ("b", 0.85)) for seed in (0, 1)]
    results = Results(rows, ["a", "b"], units={"accuracy": "%"})
    assert results.no_worse("accuracy", "a", "b", by=0.06).outcome == "holds"
    assert results.no_worse("accuracy", "a", "b", by=0.04).outcome == "fails"
    assert results.no_worse("accuracy", "b", "a", by=0.04, better="lower").outcome == "fails"
    assert (results.best("accuracy"), results.best("accuracy", better="lower")) == ("b", "a")
    assert results.spread("accuracy", "a") == pytest.approx(0.01)
    assert (results.say("accuracy", "a"), results.say("accuracy", "a", beside="b")) == ("80.5 %", "0.94x")


def test_a_table_declares_arms_and_hands_the_rest_to_its_function():
    study, seen = Study("s", question="?", baseline="x"), []
    study.arm_table(
        lambda task, trial, power: seen.append((task, power)), {"x": {"power": 1}, "y": {"power": 2, "label": "Y"}}, settings={"lr": 1}
    )
    for arm in study.arms.values():
        arm.run("task", None)
    assert seen == [("task", 1), ("task", 2)]
    assert [(arm.label, arm.against, arm.settings) for arm in study.arms.values()] == [("x", None, {"lr": 1}), ("Y", "x", {"lr": 1})]


def test_a_trial_follows_a_value_and_counts_tensors():
    import torch

    events = []
    trial = Trial(TrialSpec(MODULE, "s", "a", 0, Scale.QUICK, {}), events.append)
    tell = trial.follow("loss", total=2, depth=3)
    tell(0.5)
    tell(0.25)
    with trial.tensors("peak_memory"):
        torch.ones(100)
    said = [(event.name, event.value, event.coordinates) for event in events if isinstance(event, FigureEvent)]
    assert said[:2] == [("loss", 0.5, {"epoch": 1, "depth": 3}), ("loss", 0.25, {"epoch": 2, "depth": 3})]
    assert ("peak_memory", 400.0, {}) in said


def test_spaces_start_where_they_say():
    assert (LogUniform(1e-4, 1e-2).default, Uniform(0, 1).default, Choice(["a", "b"]).default) == (pytest.approx(1e-3), 0.5, "a")
    assert isinstance(bootstrap(lambda a: a, np.ones(1)), Estimate)


def test_a_race_tells_a_ratio_that_is_known():
    bench = Bench("b")
    bench.race("twice the work", peer="half of it", reach=1.0)(lambda: (lambda: sum(range(40_000)), lambda: sum(range(20_000))))
    bench.quantity("numbers", peer="all", unit="", reach=0.5)(lambda: (1, 4))
    race, count = bench.run()
    assert 1.4 < race.ratio < 2.8
    assert not race.reached
    assert (count.ratio, count.reached) == (0.25, True)


def test_a_race_whose_peer_is_not_installed_is_left_out_and_the_others_go_on():
    bench = Bench("b")
    bench.race("sums", peer="no_such_library", reach=1.0)(lambda: (sum, require("no_such_library", "peers").sum))
    bench.quantity("numbers", peer="all", unit="", reach=0.5)(lambda: (1, 4))
    race, count = bench.run()
    assert (race.ratio, race.reached) == (None, None)
    assert race.left_out == "no_such_library is not installed; install it with: pip install 'fewer[peers]'"
    assert count.reached
    buffer = io.StringIO()
    Console(file=buffer, width=200).print(races_table([race, count]))
    assert "left out: no_such_library is not installed" in buffer.getvalue()
