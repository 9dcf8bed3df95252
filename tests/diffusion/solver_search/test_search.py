"""Evolution by its frequencies, the search against brute force, its journal, and what it drops."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact_flows import EDM, error, flow, randn
from schedules import DATA, EMS_OF_NONE, EPS, MEAN, SPACE, Counted, random_schedules
from scipy.stats import chisquare, kendalltau

from fewer.diffusion import ScheduleSearch, SearchSpace, SolverSchedule, StepDecision
from fewer.diffusion._shared import GaussianMixture, NoiseSchedule
from fewer.diffusion.solver_search import Objective, Predictor, evaluate, evolution, search
from fewer.diffusion.solver_search.search import presets

NOISES = 20 * randn(32, 3)
REFERENCE = flow(DATA, NOISES, 20.0, 0.02)


def objective(eps=EPS) -> Objective:
    return Objective(eps, NOISES, REFERENCE, EDM, EMS_OF_NONE, MEAN)


def cheap(schedule: SolverSchedule) -> float:
    """A score that costs nothing: how far the steps are from equal, and orders from 2."""
    gaps = np.diff(schedule.lambdas)
    return float(gaps.std() + sum(abs(step.order - 2) for step in schedule.steps))


def test_children_are_solvers_of_their_number_of_calls():
    draw, parents, (first, last) = random.Random(0), [*presets(SPACE, 5), *random_schedules(10)], SPACE.ends
    for i in range(8000):  # each is mutated, three of ten are crossed before
        child = SPACE.child(parents, 5, draw)
        assert child.nfe == 5
        if i % 50 == 0:
            assert replace(child).validate().nfe == 5, "a fresh one, that nobody validated"
        assert max(abs(child.lambdas[0] - first), abs(child.lambdas[-1] - last)) < 1e-6
        assert all(step.start == -1 for step in child.steps)
        if i % 3 == 0:
            parents[i % len(parents)] = child
    free = [SPACE.child(parents, None, draw).nfe for _ in range(300)]
    assert len(set(free)) > 2, "budgets feed one another"


def test_points_that_a_corrector_cannot_use_make_no_solver():
    """Close together the points serve the predictor, and not the corrector, whose new point is far away."""
    step = StepDecision("data", 4)
    steps = (*(StepDecision("data", 1) for _ in range(3)), step, StepDecision("data", 1))
    lambdas = (-2.0, -1.999, -1.998, -1.997, 1.5, 2.0)
    assert SolverSchedule(lambdas, steps).validate().nfe == 5
    corrected = replace(SolverSchedule(lambdas, steps), steps=(*steps[:3], replace(step, corrector="pseudo"), steps[4]))
    with pytest.raises(ValueError, match="step 3: corrector: .* condition"):
        corrected.validate()
    assert SPACE.valid(corrected.lambdas, corrected.steps, "none") is None


def test_costly_correctors_and_crowded_spaces_end_with_a_solver_or_an_error(monkeypatch):
    draw, costly = random.Random(0), replace(SPACE, correctors={"implicit": 0.5, "none": 0.5})
    parents = [costly.random(4, draw) for _ in range(10)]
    assert {each.nfe for each in parents} == {4}
    assert {costly.child(parents, 4, draw).nfe for _ in range(100)} == {4}
    fixed = replace(SPACE, time_rate=0.0, insert=0.0, delete=0.0, afs={"none": 1.0}, nodes=())
    found = ScheduleSearch(fixed, cheap, np.array([3, 4]), 60, predictor=False, first_random=3).run()
    assert set(found.pareto) == {3, 4}
    monkeypatch.setattr(evolution, "TRIES", 3)
    with pytest.raises(ValueError, match="expected a space with room"):
        SPACE.random(500, draw)


def fits(counts: Counter, shares: dict) -> bool:
    total = sum(counts.values())
    assert set(counts) <= set(shares)
    return chisquare([counts[name] for name in shares], [total * share for share in shares.values()]).pvalue > 1e-3


def test_draws_have_the_stated_frequencies():
    draw, count = random.Random(1), 5000
    drawn = [SPACE.draw_step(draw) for _ in range(count)]
    assert fits(Counter(step.order for step in drawn), {1: 0.2, 2: 0.4, 3: 0.3, 4: 0.1})
    assert fits(Counter(step.prediction for step in drawn), {"noise": 0.3, "data": 0.3, "v3": 0.4})
    assert fits(Counter(step.corrector for step in drawn), {"none": 0.5, "pseudo": 0.5})
    assert fits(Counter(len(step.points[0]) for step in drawn), {1: 0.5, 2: 0.5})
    assert np.std([step.coefficient for step in drawn]) == pytest.approx(0.03, rel=0.05)
    assert fits(Counter(SPACE.pick(SPACE.afs, draw) for _ in range(count)), {"none": 0.3, "zero_x0": 0.3, "average_x0": 0.4})
    bare = SearchSpace(EDM)
    assert fits(Counter(bare.pick(bare.predictions, draw) for _ in range(count)), {"noise": 0.5, "data": 0.5})
    step = StepDecision("noise", 4, relaxation="linear", coefficient=1.0, corrector="none")
    changed = [SPACE.changed(step, 1.0, draw) for _ in range(count)]
    assert fits(Counter(each.order == 4 for each in changed), {True: 0.7 + 0.3 * 0.1, False: 0.3 * 0.9})
    assert fits(Counter(each.prediction == "noise" for each in changed), {True: 0.7 + 0.3 * 0.3, False: 0.3 * 0.7})
    assert fits(Counter(each.coefficient == 1.0 for each in changed), {True: 0.7, False: 0.3})
    assert fits(Counter(each.corrector == "none" for each in changed), {True: 0.85, False: 0.15})


def test_times_and_numbers_of_steps_move_as_often_as_stated():
    draw, parent = random.Random(2), SolverSchedule.preset("ddim", 5, EDM)
    still = replace(SPACE, decision_rate=0.0)
    children = [child for _ in range(1500) if (child := still.mutate(parent, None, draw)) is not None]
    assert fits(Counter(len(child.steps) - 5 for child in children), {-1: 0.2, 0: 0.6, 1: 0.2})
    same = [child for child in children if len(child.steps) == 5]
    moved = Counter(abs(a - b) > 1e-9 for child in same for a, b in zip(child.lambdas[1:-1], parent.lambdas[1:-1], strict=True))
    assert fits(moved, {True: 0.3, False: 0.7})
    shifts = [a - b for child in same for a, b in zip(child.lambdas[1:-1], parent.lambdas[1:-1], strict=True) if abs(a - b) > 1e-9]
    assert np.std(shifts) == pytest.approx(0.08, rel=0.1)


def test_parts_that_are_not_searched_stay():
    draw, parent = random.Random(3), SolverSchedule.preset("unipc-2", 5, EDM)
    grid_only = replace(SPACE, decision_rate=0.0, insert=0.0, delete=0.0)
    decisions_only = replace(SPACE, time_rate=0.0, insert=0.0, delete=0.0, afs={"none": 1.0})
    bare = replace(decisions_only, nodes=())
    for _ in range(20):
        assert grid_only.child([parent], 5, draw).steps == parent.steps
        assert bare.child([parent], 5, draw).lambdas == parent.lambdas
    free = replace(SPACE, end_times=(0.02, 0.03), nodes=())
    ends = {math.exp(-free.child([parent], 5, draw).lambdas[-1]) for _ in range(30)}
    assert len(ends) > 3
    assert all(0.0199 < end < 0.0301 for end in ends)
    same = replace(SPACE, uniform=True)
    assert len({step.prediction for step in same.child([parent], 5, draw).steps}) == 1


@pytest.mark.parametrize("predictor", [False, True])
def test_a_seed_decides_everything_and_a_journal_is_gone_on_from(tmp_path, predictor, monkeypatch):
    monkeypatch.setattr(search, "CANDIDATES", 100)
    monkeypatch.setattr(search, "EPOCHS", 5)
    words = {"space": SPACE, "nfe": 5, "budget": 70, "predictor": predictor, "seed": 4, "first_random": 10}
    first = ScheduleSearch(objective=cheap, **words).run()
    assert ScheduleSearch(objective=cheap, **words).run().history == first.history
    assert ScheduleSearch(objective=cheap, **words | {"seed": 5}).run().history != first.history
    assert len(first.history) == first.evaluations == 70

    def stops(schedule: SolverSchedule) -> float:
        if len(journal.read_text().splitlines() if journal.exists() else []) == 50:
            raise KeyboardInterrupt
        return cheap(schedule)

    journal = tmp_path / "scores.jsonl"
    with pytest.raises(KeyboardInterrupt):
        ScheduleSearch(objective=stops, journal=journal, **words).run()
    journal.write_text(journal.read_text() + '{"on": "sea')  # cut off
    asked = []
    again = ScheduleSearch(objective=lambda each: asked.append(each) or cheap(each), journal=journal, **words).run()
    assert again.history == first.history
    assert len(asked) == 21, "those that are missing, and one to see that the journal is of this objective"
    with pytest.raises(ValueError, match="expected a journal of the same model"):
        ScheduleSearch(objective=lambda each: 1.1 * cheap(each), journal=journal, **words).run()
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    journal.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 is no score"):
        ScheduleSearch(objective=cheap, journal=journal, **words).run()


def test_the_best_of_the_finalists_on_fresh_noises_is_picked_and_paid_for():
    fresh: dict[SolverSchedule, float] = {}

    def rescore(schedule: SolverSchedule) -> float:
        return fresh.setdefault(schedule, -float(len(fresh)))  # the last is the best

    found = ScheduleSearch(SPACE, cheap, 5, 80, predictor=False, rescore=rescore, first_random=10).run()
    assert len(fresh) == 5
    assert (found.evaluations, len(found.history)) == (80, 60)
    assert found.best == list(fresh)[-1]
    assert found.score[5] == cheap(found.best)


def test_several_numbers_of_calls_are_searched_together():
    found = ScheduleSearch(SPACE, cheap, [4, 6], 140, predictor=False, first_random=10).run()
    assert {nfe: each.nfe for nfe, each in found.pareto.items()} == {4: 4, 6: 6}
    assert found.best == min(found.history, key=lambda each: each.score).schedule


def test_evolution_of_one_time_comes_within_two_hundredths_of_brute_force():
    """One dimension, two calls, DDIM: only the time in the middle is free."""
    data = GaussianMixture(torch.tensor([[-1.0], [0.8]]).double(), torch.tensor([0.4, 0.6]).double(), torch.full((2, 1), 0.02).double())
    x = 20 * randn(150, 1)
    exact = data.transport(x, 20.0, 0.02)
    score = Objective(lambda x, t: (x - data.denoiser(x, t)) / t, x, exact, EDM)
    space = SearchSpace(EDM, decision_rate=0.0, insert=0.0, delete=0.0, afs={"none": 1.0})
    start = SolverSchedule.preset("ddim", 2, EDM)
    first, last = space.ends
    brute = min(score(replace(start, lambdas=(first, middle, last))) for middle in np.linspace(first, last, 2002)[1:-1].tolist())
    found = ScheduleSearch(space, score, 2, 150, predictor=False, starts=[start]).run()
    assert found.score[2] <= 1.02 * brute


def test_the_first_call_is_shared_and_all_others_are_counted():
    network = Counted()
    score = objective(network)
    schedules = [replace(each, afs="none") for each in presets(SPACE, 5)[:4]]
    found = [score(each) for each in schedules]
    assert network.calls == 1 + 4 * 4
    assert score.calls == network.calls * len(NOISES)
    assert found[0] == pytest.approx(evaluate(schedules[0], EPS, NOISES, REFERENCE, EDM))
    assert found[0] == pytest.approx(error(score.ends(schedules[0]), REFERENCE))
    with pytest.raises(ValueError, match="one end a noise"):
        Objective(EPS, NOISES, REFERENCE[:3], EDM)


def test_a_search_beats_the_presets_on_other_noises():
    score = objective()
    found = ScheduleSearch(SPACE, score, 5, 150, predictor=False, seed=1).run()
    x = 20 * randn(64, 3, seed=9)
    other = Objective(EPS, x, flow(DATA, x, 20.0, 0.02), EDM, EMS_OF_NONE, MEAN)
    assert other(found.best) < 0.9 * min(other(each) for each in presets(SPACE, 5))


def test_the_predictor_learns_to_rank():
    known, held_out = random_schedules(60), random_schedules(60, seed=1)
    predictor = Predictor(0).fit(known, [cheap(each) for each in known])
    assert kendalltau(predictor(held_out).numpy(), [cheap(each) for each in held_out]).statistic > 0.4


def test_scores_that_are_not_finite_are_dropped_and_fifty_in_a_row_stop(monkeypatch):
    monkeypatch.setattr(search, "CANDIDATES", 20)
    monkeypatch.setattr(search, "EPOCHS", 2)
    calls = iter(range(10**6))
    found = ScheduleSearch(SPACE, lambda s: math.nan if next(calls) % 2 else cheap(s), 5, 60, predictor=False, first_random=5).run()
    assert (len(found.history), found.dropped) == (30, 30)
    nothing = iter(range(10**6))
    late = ScheduleSearch(SPACE, lambda s: math.nan if next(nothing) < 30 else cheap(s), 5, 40, first_random=5).run()
    assert late.dropped == 30, "with nothing to learn from yet, the predictor waits"
    with pytest.raises(ValueError, match="50 schedules in a row scored nan"):
        ScheduleSearch(SPACE, lambda s: math.nan, 5, 100, predictor=False).run()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"budget": 17}, "budget is 17; expected 18"),
        ({"budget": 30, "rescore": cheap}, "expected 38"),
        ({"budget": 0}, "budget is 0"),
        ({"nfe": 0}, "nfe"),
        ({"nfe": 2.5}, "nfe is 2.5"),
        ({"nfe": []}, "nfe is empty"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_search_that_cannot_be_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        ScheduleSearch(**{"space": SPACE, "objective": cheap, "nfe": 5, "budget": 100} | words)


def test_probabilities_that_are_none_are_refused():
    for words in (
        {"crossover": 1.5},
        {"insert": 0.7, "delete": 0.7},
        {"time_deviation": -1},
        {"parents": 0},
        {"predictions": {"v3": 1.0}},
        {"orders": {5: 1.0}},
        {"afs": {"none": -1.0}},
        {"correctors": {}},
        {"end_times": (1e-5, 0.01)},
    ):
        with pytest.raises(ValueError, match="expected"):
            SearchSpace(NoiseSchedule.edm(), **words)
