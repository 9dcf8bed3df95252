"""Who comes when: the clock's schedule, what a run over it holds and leaves out, resuming, and what is refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from federations import examples, loss, net
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic_workers import lines, model, workers, written

from fewer.federated import (
    AnarchicAlgorithm,
    AnarchicConfig,
    Clock,
    FedBuff,
    Independent,
    LocalConfig,
    Return,
    Scaffold,
    Shards,
    Update,
    schedule,
    simulate,
    simulate_anarchic,
)
from fewer.federated._shared import asynchrony
from fewer.federated._shared.asynchrony import Versions, synchronous_rounds
from fewer.federated._shared.clients import client_rng


def delays(updates):
    return [number - each.version for number, update in enumerate(updates) for each in update.returns]


def test_a_schedule_of_three_workers_equals_one_written_out():
    """One step a visit, no latency, speeds 1, 2, 4: at 4 worker 0 returns for the 4th time, worker 1 for the 2nd, worker 2 for the 1st."""
    by_hand = [
        Update(2.0, [Return(0, 0, 1), Return(0, 0, 1)]),  # at 1 and 2
        Update(3.0, [Return(1, 0, 1), Return(0, 1, 1)]),  # at 2 and 3: worker 0's second return made update 1 before it fetched again
        Update(4.0, [Return(0, 2, 1), Return(1, 1, 1)]),  # both at 4, the lower id first; worker 1 fetched at 2, after update 1
        Update(5.0, [Return(2, 0, 1), Return(0, 2, 1)]),  # at 4 worker 0 fetched again before worker 1 filled the buffer
        Update(6.0, [Return(0, 4, 1), Return(1, 3, 1)]),  # worker 2 has been away since 4
    ]
    clock = Clock([1.0, 2.0, 4.0], latency=0.0, steps=[1, 1, 1])
    assert schedule(clock, 3, buffer=2, updates=5) == by_hand


def test_rest_comes_before_the_next_fetch():
    clock = Clock([1.0, 1.0], latency=0.0, rest=2.5, steps=[1, 2])
    assert schedule(clock, 2, buffer=1, updates=4) == [
        Update(1.0, [Return(0, 0, 1)]),
        Update(2.0, [Return(1, 0, 2)]),
        Update(4.5, [Return(0, 2, 1)]),  # it fetched at 3.5
        Update(6.5, [Return(1, 3, 2)]),  # it fetched at 4.5, when worker 0 (the lower id) had just returned
    ]


@pytest.mark.parametrize("buffer", [1, 4])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_the_mean_delay_is_that_of_the_others_over_the_buffer_whatever_the_speeds(buffer, spread):
    count = 10
    speeds = np.exp(spread * np.random.default_rng(0).normal(size=count))
    updates = schedule(Clock(speeds.tolist(), steps=(1, 10)), count, buffer, 2000, seed=1)
    assert np.mean(delays(updates)) == pytest.approx((count - 1) / buffer, rel=0.02)
    assert [len(update.returns) for update in updates] == [buffer] * 2000


@settings(max_examples=40, deadline=None)
@given(speeds=st.lists(st.floats(0.1, 20), min_size=1, max_size=6), buffer=st.integers(1, 8), rest=st.floats(0, 5), seed=st.integers(0, 99))
def test_versions_are_those_of_the_fetch_and_the_same_seed_gives_the_same_list(speeds, buffer, rest, seed):
    clock, count = Clock(speeds, rest=rest, steps=(1, 4)), len(speeds)
    updates = schedule(clock, count, buffer, 30, seed)
    assert updates == schedule(clock, count, buffer, 30, seed)
    assert updates[:12] == schedule(clock, count, buffer, 12, seed)
    times = [0.0, *[update.time for update in updates]]
    assert all(one <= other for one, other in pairwise(times))
    left, visits = dict.fromkeys(range(count), 0.0), dict.fromkeys(range(count), 0)
    for number, update in enumerate(updates):
        for each in update.returns:
            visits[each.worker] += 1
            assert each.steps == clock.steps_of(each.worker, visits[each.worker], seed)
            assert each.version <= number
            assert times[each.version] <= left[each.worker] + 1e-9  # it fetched a version that was there when it left
            left[each.worker] += clock.seconds(each.worker, each.steps) + rest


def test_other_seeds_give_other_steps_within_the_range():
    clock = Clock([1.0] * 4, steps=(2, 5))
    drawn = [each.steps for update in schedule(clock, 4, 2, 100, seed=7) for each in update.returns]
    assert set(drawn) == {2, 3, 4, 5}
    assert schedule(clock, 4, 2, 10, seed=7) != schedule(clock, 4, 2, 10, seed=8)


def test_a_round_lasts_as_long_as_its_slowest():
    clock = Clock([1.0, 2.0, 30.0], latency=0.5)
    updates = synchronous_rounds(clock, 3, chosen=2, updates=40, steps=5, seed=2)
    assert {len(update.returns) for update in updates} == {2}
    assert delays(updates) == [0] * 80
    lengths = np.diff([0.0, *[update.time for update in updates]])
    for update, length in zip(updates, lengths, strict=True):
        assert length == pytest.approx(max(clock.seconds(each.worker, 5) for each in update.returns))
    assert {round(float(length), 6) for length in lengths} == {10.5, 150.5}


CS = AnarchicAlgorithm(AnarchicConfig(variant="cs", lr=0.05, batch_size=8))


def classification(bad: int | None = None):
    x, y = examples()
    shards = Shards(x, y, np.split(np.arange(150), [31, 60, 104, 112]))
    if bad is not None:
        x[shards.parts[bad]] = float("nan")
    return shards


TWELVE = schedule(Clock([1.0, 1.7, 3.1, 0.6, 2.2], steps=(1, 5)), 5, buffer=2, updates=12, seed=1)


class Stop(Exception):
    pass


@pytest.mark.parametrize("executor", [None, "vmap"])
@pytest.mark.parametrize(
    "algorithm", [CS, FedBuff(LocalConfig(lr=0.05)), Scaffold(LocalConfig(lr=0.05))], ids=["cs", "fedbuff", "scaffold"]
)
@pytest.mark.parametrize("after", [1, 7])
def test_a_run_that_was_stopped_in_the_middle_goes_on_as_if_it_had_not_been(algorithm, executor, after, tmp_path):
    file = tmp_path / "state.pt"

    def run(**keywords):
        return simulate_anarchic(algorithm, net, classification(), TWELVE, seed=3, executor=executor, loss_fn=loss, **keywords)

    def stop(line):
        if line.round == after:
            raise Stop

    with pytest.raises(Stop):
        run(checkpoint=file, tell=stop)
    resumed, whole = run(checkpoint=file), run()
    assert [each.round for each in resumed.rounds] == list(range(after + 1, 13))
    assert torch.equal(resumed.server.x, whole.server.x)
    for name, vector in whole.server.vectors.items():
        assert torch.equal(resumed.server.vectors[name], vector)
    for name, table in whole.client_states.tables.items():
        assert torch.equal(resumed.client_states.tables[name], table)


def test_a_checkpoint_of_another_run_is_refused_and_stays(tmp_path):
    file = tmp_path / "state.pt"
    run = {"checkpoint": file, "loss_fn": loss}
    simulate_anarchic(CS, net, classification(), TWELVE[:4], **run)
    before = file.read_bytes()
    x, y = examples()
    with pytest.raises(ValueError, match="written with 5 clients and is resumed with 6"):
        simulate_anarchic(CS, net, Shards(x, y, list(np.arange(150).reshape(6, 25))), TWELVE[:4], **run)
    with pytest.raises(ValueError, match="written with algorithm .*variant='cs'.*resumed with .*variant='cd'"):
        simulate_anarchic(AnarchicAlgorithm(AnarchicConfig(variant="cd")), net, classification(), TWELVE[:4], **run)
    with pytest.raises(ValueError, match="written with updates '4, .*resumed with '12, "):
        simulate_anarchic(CS, net, classification(), TWELVE, **run)
    with pytest.raises(ValueError, match="written with seed 0; resumed with 1"):
        simulate_anarchic(CS, net, classification(), TWELVE[:4], seed=1, **run)
    assert file.read_bytes() == before


def test_only_versions_that_an_outstanding_visit_may_need_are_held(monkeypatch):
    held, sizes = [], []
    release = Versions.release
    monkeypatch.setattr(Versions, "release", lambda self, one: (release(self, one), held.append(self))[0])

    def tell(line):
        sizes.append(len({version for _, version in held[-1].held}))

    updates = schedule(Clock([1.0, 1.0, 1.0, 50.0], steps=(1, 3)), 4, buffer=2, updates=60)
    simulate_anarchic(CS, net, Shards(*examples(40), torch.arange(40).split(10)), updates, loss_fn=loss, tell=tell)
    assert max(sizes) <= 4  # at most one a worker
    assert not held[-1].held


def test_what_a_client_keeps_from_one_visit_it_finds_at_the_next_even_within_an_update():
    """With SCAFFOLD, whose clients keep a control: a worker twice in an update starts its second visit with what the first one left."""
    shards, flat = workers(), model()
    scaffold = Scaffold(LocalConfig(lr=0.05, batch_size=5))
    twice = simulate_anarchic(scaffold, flat, shards, written([(0, 0, 2), (0, 0, 3)]))
    first = simulate_anarchic(scaffold, flat, shards, written([(0, 0, 2)]))
    both = simulate_anarchic(scaffold, flat, shards, written([(0, 0, 2)], [(0, 0, 3)]))
    assert torch.allclose(twice.client_states.get(0)["control"], both.client_states.get(0)["control"], atol=1e-12)
    assert not torch.allclose(twice.client_states.get(0)["control"], first.client_states.get(0)["control"])
    at_once = simulate_anarchic(scaffold, flat, shards, written([(0, 0, 2), (1, 0, 1), (0, 0, 3)]), executor="vmap")
    one = simulate_anarchic(scaffold, flat, shards, written([(0, 0, 2), (1, 0, 1), (0, 0, 3)]))
    assert torch.allclose(at_once.server.x, one.server.x, atol=1e-12)


def test_batches_are_those_of_the_workers_visit_whatever_version_it_fetched_and_whoever_came_before():
    """Worker 0's second visit, with version 0, in the third update: its batches are those of (seed, 0, 2)."""
    shards, updates = classification(), written([(1, 0, 1)], [(0, 1, 2)], [(3, 0, 2), (0, 0, 3)])
    history = simulate_anarchic(CS, net, shards, updates, seed=9, loss_fn=loss)
    message = CS.configure(CS.initial(history.flat.initial(), 5), [0], 1)[0]
    rng = client_rng(9, 2, 0)
    rng.integers(2**62)  # what its layers are seeded with
    _, reply = CS.local({}, message, shards.shard(0, history.flat, 3), rng)
    assert torch.equal(history.server.vectors["memory"][0], reply.vectors["update"])


def test_any_algorithm_makes_the_steps_that_its_visits_say():
    """Without delay and with the same batches a schedule is a run of rounds."""
    shards, local = classification(), {"lr": 0.1, "batch_size": 8}
    rounds = written(*[[(worker, version, 6) for worker in range(5)] for version in range(3)])
    ours = simulate_anarchic(Scaffold(LocalConfig(**local)), net, shards, rounds, seed=2)
    theirs = simulate(Scaffold(LocalConfig(local_steps=6, **local)), net, shards, 3, sampler=Independent(1.0), seed=2)
    assert torch.equal(ours.server.x, theirs.server.x)


@pytest.mark.parametrize("executor", [None, "vmap"])
def test_a_return_with_nan_is_left_out_and_its_worker_named(executor):
    updates = written([(0, 0, 2), (3, 0, 1)], [(3, 0, 2)], [(1, 1, 3), (3, 2, 1)])
    with pytest.warns(UserWarning, match="left out|stays") as told:
        history = simulate_anarchic(CS, net, classification(bad=3), updates, executor=executor, loss_fn=loss)
    words = [str(each.message) for each in told]
    assert sum("client 3 sent 'update' with NaN or infinite numbers" in each for each in words) == 3
    assert sum("update 2: no good return of 1; the model stays as it is" in each for each in words) == 1
    assert [each.left_out for each in lines(history)] == [(3,), (3,), (3,)]
    assert history.server.x.isfinite().all()
    assert not history.server.vectors["memory"][3].any()
    others = written([(0, 0, 2)], [(0, 0, 1)], [(1, 1, 3)])
    alone = simulate_anarchic(CS, net, classification(), others[:1], executor=executor, loss_fn=loss)
    assert torch.allclose(history.server.vectors["memory"][0], alone.server.vectors["memory"][0], atol=1e-6)
    assert [each.round for each in history.rounds] == [1, 2, 3]


def test_a_return_that_is_too_late_is_left_out_and_told():
    algorithm = AnarchicAlgorithm(AnarchicConfig(variant="cd", max_delay=1))
    updates = written([(0, 0, 1)], [(1, 0, 1)], [(2, 0, 1), (0, 2, 1)])
    with pytest.warns(UserWarning, match="client 2 came with a delay of 2 updates; expected at most 1"):
        history = simulate_anarchic(algorithm, model(), workers(), updates)
    assert [each.left_out for each in lines(history)] == [(), (), (2,)]
    without = simulate_anarchic(algorithm, model(), workers(), written([(0, 0, 1)], [(1, 0, 1)], [(0, 2, 1)]))
    assert torch.equal(history.server.x, without.server.x)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Clock([1.0, 0.0]), r"seconds_per_step\[1\] is 0.0; expected a finite number above 0"),
        (lambda: Clock([1.0, float("nan")]), r"seconds_per_step\[1\] is nan"),
        (lambda: Clock([1.0], steps=(0, 3)), r"steps\[0\] is 0; expected a whole number of at least 1"),
        (lambda: Clock([1.0], steps=[0]), r"steps\[0\] is 0"),
        (lambda: Clock([1.0], steps=(5, 2)), r"steps is \(5, 2\); expected a tuple \(least, most\)"),
        (lambda: Clock([1.0], latency=-1.0), "latency is -1.0"),
        (lambda: Return(0, 0, 0), "steps is 0; expected a whole number of at least 1"),
        (lambda: Return(-1, 0, 1), "worker is -1"),
        (lambda: schedule(Clock([1.0, 2.0]), 3, 1, 5), "seconds_per_step has 2 numbers for 3 workers; expected one a worker"),
        (lambda: schedule(Clock([1.0, 2.0], steps=[1]), 2, 1, 5), "steps is a list of 1 for 2 workers"),
        (lambda: schedule(Clock([1.0, 2.0]), 2, 0, 5), "buffer is 0; expected a whole number of at least 1"),
        (lambda: schedule(Clock([1.0, 2.0]), 2, 201, 5), "buffer is 201 for 2 workers; expected 1 to 200"),
        (lambda: synchronous_rounds(Clock([1.0]), 1, chosen=2, updates=1, steps=1), "chosen is 2 of 1 workers"),
        (lambda: simulate_anarchic(CS, model(), workers(), []), "no updates were given"),
        (lambda: simulate_anarchic(CS, model(), workers(), [Update(0.0, [])]), "update 1 has no returns"),
        (
            lambda: simulate_anarchic(CS, model(), workers(), written([(0, 0, 1)], [(1, 2, 1)])),
            "update 2 has a return of worker 1 with version 2; expected 0 to 1",
        ),
        (lambda: simulate_anarchic(CS, model(), workers(), written([(3, 0, 1)])), "update 1 has a return of worker 3; expected 0 to 2"),
        (
            lambda: simulate_anarchic(CS, model(), workers(), written([(0, 0, 1)]), executor="threads"),  # pyright: ignore[reportArgumentType]
            "executor is 'threads'",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_buffer_may_be_larger_than_the_workers_are_many():
    assert len(schedule(Clock([1.0, 2.0]), 2, buffer=5, updates=3)[2].returns) == 5
    assert asynchrony.LONGEST == 100
