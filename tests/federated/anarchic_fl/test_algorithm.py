"""AFA-CD, AFA-CS and FedBuff held against NumPy, against FedAvg, against their fixed points, and what they remember."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from federations import examples, loss, net
from hypothesis import given, settings
from hypothesis import strategies as st
from quadratic_workers import START, Point, as_it_is, curvature, gradient, lines, minimiser, model, workers, written
from torch import nn

from fewer.federated import (
    AnarchicAlgorithm,
    AnarchicConfig,
    Clock,
    FedAvg,
    FedBuff,
    FlatModel,
    LocalConfig,
    Return,
    Shards,
    Update,
    schedule,
    simulate,
    simulate_anarchic,
)
from fewer.federated._shared.algorithm import Reply, ServerState, run_aggregate
from fewer.federated._shared.client_states import LARGE

PLAIN = {"weight_decay": 0.0, "max_grad_norm": float("inf"), "batch_size": 50}
# Delays 0 to 3, K from 1 to 5, worker 1 twice in the third buffer.
BY_HAND = written(
    [(0, 0, 3), (2, 0, 1)],
    [(0, 1, 5), (1, 0, 2)],
    [(1, 2, 4), (1, 0, 1)],
    [(2, 1, 2), (0, 3, 1)],
    [(2, 4, 5), (1, 1, 3)],
)


def everybody(clients, round, seed):
    return list(clients)


def config(variant, **settings):
    return AnarchicConfig(**PLAIN | {"variant": variant, "lr": 0.05, "lr_decay": 0.9, "server_lr": 3.0} | settings)


def by_numpy(updates, rule, unseen="zero", lr=0.05, decay=0.9, eta=3.0):
    """The three methods derived again, from the equations alone."""
    xs, memory = [START], {}
    for t, update in enumerate(updates):
        came = []
        for each in update.returns:
            y, rate = xs[each.version], lr * decay**each.version
            for _ in range(each.steps):
                y = y - rate * gradient(each.worker, y)
            came.append(xs[each.version] - y if rule == "fedbuff" else (xs[each.version] - y) / (rate * each.steps))
            memory[each.worker] = came[-1]
        step = sum(memory.values()) / (3 if unseen == "zero" else len(memory)) if rule == "cs" else np.mean(came, axis=0)
        xs.append(xs[t] - (1 if rule == "fedbuff" else eta * lr * decay**t) * step)
    return xs[-1]


RULES = {
    "cd": (AnarchicAlgorithm(config("cd")), {}),
    "cs": (AnarchicAlgorithm(config("cs")), {}),
    "cs, skip": (AnarchicAlgorithm(config("cs", unseen="skip")), {"unseen": "skip"}),
    "fedbuff": (FedBuff(config("cd")), {}),
}


@pytest.mark.parametrize("executor", [None, "vmap"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("updates", [BY_HAND[:1], BY_HAND], ids=["one update", "five"])
def test_a_schedule_written_by_hand_equals_numpy(rule, updates, executor):
    assert {t - each.version for t, update in enumerate(BY_HAND) for each in update.returns} == {0, 1, 2, 3}
    algorithm, variant = RULES[rule]
    history = simulate_anarchic(algorithm, model(), workers(), updates, executor=executor)
    np.testing.assert_allclose(history.server.x.numpy(), by_numpy(updates, rule.split(",")[0], **variant), atol=1e-12, rtol=0)
    assert [each.delays for each in lines(history)] == [tuple(t - each.version for each in u.returns) for t, u in enumerate(updates)]
    assert [each.gradients for each in history.rounds] == [sum(each.steps for each in update.returns) for update in updates]


def classification(dtype=torch.float64):
    x, y = examples(60)
    return Shards(x.to(dtype), y, torch.arange(60).split(20))


def all_at_once(rounds, steps, workers=3):
    """No delay: every worker returns in every update with the version before it."""
    return written(*[[(worker, version, steps[worker]) for worker in range(workers)] for version in range(rounds)])


@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_without_delay_and_with_equal_steps_it_is_fedavg(dtype, near):
    local = {"lr": 0.1, "lr_decay": 0.95, "batch_size": 8, "weight_decay": 1e-2, "max_grad_norm": 0.7}
    shards, steps = classification(dtype), 4
    theirs = simulate(FedAvg(LocalConfig(local_steps=steps, **local)), lambda: net().to(dtype), shards, 5, sampler=everybody, seed=3)

    def ours(variant, steps, rounds=5):
        algorithm = AnarchicAlgorithm(AnarchicConfig(variant=variant, server_lr=4.0, **local))
        return simulate_anarchic(algorithm, lambda: net().to(dtype), shards, all_at_once(rounds, steps), seed=3).server.x

    assert (ours("cd", [4, 4, 4]) - theirs.server.x).abs().max() <= near
    for rounds in range(1, 6):
        assert (ours("cs", [4, 4, 4], rounds) - ours("cd", [4, 4, 4], rounds)).abs().max() <= near
    unequal = simulate_anarchic(FedAvg(LocalConfig(**local)), lambda: net().to(dtype), shards, all_at_once(5, [1, 4, 7]), seed=3)
    assert (ours("cd", [1, 4, 7]) - unequal.server.x).abs().max() > 1e-3


def in_turn(updates, steps=1):
    """Workers 0, 0, 0, 0, 1, 1, 2 returning in turn, each with the version of three updates before."""
    return written(*[[((0, 0, 0, 0, 1, 1, 2)[t % 7], max(0, t - 3), steps)] for t in range(updates)])


class Derived(FlatModel):
    """The quadratics' gradient by its formula, for runs of thousands of updates."""

    def gradient(self, vector, x, y):
        a, c = x[0].chunk(2)
        return a * (vector - c)


def test_the_derived_gradient_is_that_of_the_model():
    w = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for x in workers().x:
        assert torch.allclose(
            Derived(Point(), as_it_is).gradient(w, x[None], torch.zeros(1)), model().gradient(w, x[None], torch.zeros(1)), atol=1e-14
        )


def course(algorithm, updates):
    xs = []
    simulate_anarchic(algorithm, Derived(Point(), as_it_is), workers(), updates, evaluate=lambda x: xs.append(x.numpy().copy()))
    return np.array(xs)


def test_afa_cs_ends_at_the_minimiser_and_afa_cd_at_that_of_those_who_come_often():
    constant = {"lr": 0.05, "lr_decay": 1.0, "server_lr": 1.0}
    cs = course(AnarchicAlgorithm(config("cs", **constant)), in_turn(4000))
    np.testing.assert_allclose(cs[-1], minimiser(), atol=1e-10, rtol=0)
    cd = course(AnarchicAlgorithm(config("cd", **constant)), in_turn(2100))[-700:].mean(axis=0)
    assert np.linalg.norm(cd - minimiser((4, 2, 1))) < 5e-3
    assert np.linalg.norm(cd - minimiser()) > 0.4


def test_local_drift_is_of_the_order_of_the_local_rate():
    """Five local steps; eta eta_L stays, so that only the drift changes."""
    misses = [
        np.linalg.norm(
            course(AnarchicAlgorithm(config("cs", lr=lr, lr_decay=1.0, server_lr=0.05 / lr)), in_turn(1000, 5))[-1] - minimiser()
        )
        for lr in (0.05, 0.005)
    ]
    assert misses[0] == pytest.approx(0.02, abs=0.005)
    assert misses[1] == pytest.approx(misses[0] / 10, rel=0.1)


def test_more_local_steps_do_not_pull_harder():
    lr, eta, most = 0.002, 5.0, 10
    bound = 2 * lr * curvature(0).max() * most
    drawn = np.random.default_rng(0).integers(1, most + 1, size=(20, 4))

    def length(algorithm, steps):
        updates = written([(worker, 0, int(k)) for worker, k in enumerate(steps)])
        return float((simulate_anarchic(algorithm, model(), workers(4, alike=True), updates).server.x - torch.tensor(START)).norm())

    algorithm = AnarchicAlgorithm(config("cd", lr=lr, server_lr=eta))
    one = length(algorithm, [1, 1, 1, 1])
    for steps in drawn:
        assert length(algorithm, steps) == pytest.approx(one, rel=bound)
        assert length(FedBuff(config("cd", lr=lr)), steps) == pytest.approx(steps.mean() / eta * length(algorithm, steps), rel=bound)


def test_the_running_mean_is_the_mean_of_the_memory():
    updates = schedule(Clock([1.0, 2.0, 5.0, 1.5, 1.0, 1e9], steps=(1, 6)), workers=6, buffer=3, updates=500, seed=4)
    history = simulate_anarchic(AnarchicAlgorithm(config("cs", lr_decay=1.0)), Derived(Point(), as_it_is), workers(6), updates)
    table, mean, heard = (history.server.vectors[name] for name in ("memory", "memory_mean", "heard"))
    assert (mean - table.mean(0)).abs().max() <= 1e-12
    assert heard.tolist() == [True] * 5 + [False]
    assert not table[5].any()
    assert table[:5].any(dim=1).all()
    assert (table[0] - torch.from_numpy(gradient(0, minimiser()))).norm() < 5  # a mean gradient, not a raw difference of models


def test_the_running_mean_is_computed_anew_now_and_then(monkeypatch):
    monkeypatch.setattr("fewer.federated.anarchic_fl.algorithm.REFRESH", 2)
    algorithm = AnarchicAlgorithm(config("cs"))
    server = algorithm.initial(torch.zeros(3, dtype=torch.float64), 3)
    server.vectors["memory_mean"] += 1.0  # as if sums had drifted
    reply = Reply(1, {"update": torch.ones(3, dtype=torch.float64)}, {"examples": 1})
    once = run_aggregate(algorithm, server, [reply])
    assert (once.vectors["memory_mean"] - once.vectors["memory"].mean(0)).abs().max() > 0.9
    twice = run_aggregate(algorithm, once, [reply])
    assert torch.equal(twice.vectors["memory_mean"], twice.vectors["memory"].mean(0))


@settings(max_examples=25, deadline=None)
@given(order=st.permutations(range(5)), variant=st.sampled_from(["cd", "cs"]), seed=st.integers(0, 999))
def test_the_order_of_replies_does_not_matter_where_nobody_is_there_twice(order, variant, seed):
    draw = torch.Generator().manual_seed(seed)
    replies = [Reply(i, {"update": torch.randn(7, generator=draw, dtype=torch.float64)}, {"examples": 1}) for i in range(5)]
    algorithm, x = AnarchicAlgorithm(config(variant)), torch.randn(7, generator=draw, dtype=torch.float64)
    one, other = (run_aggregate(algorithm, algorithm.initial(x, 8), each).x for each in (replies, [replies[i] for i in order]))
    assert (one - other).abs().max() <= 1e-13


def test_of_two_returns_of_a_worker_the_later_one_is_remembered_and_both_count_in_cd():
    first, second = (Reply(2, {"update": torch.full((3,), value, dtype=torch.float64)}, {"examples": 1}) for value in (1.0, 4.0))
    start = torch.zeros(3, dtype=torch.float64)
    cs, cd = (AnarchicAlgorithm(config(variant, lr=1.0, server_lr=1.0)) for variant in ("cs", "cd"))
    after = run_aggregate(cs, cs.initial(start, 3), [first, second])
    assert after.vectors["memory"][2].tolist() == [4.0] * 3
    assert after.x.tolist() == pytest.approx([-4 / 3] * 3)
    assert run_aggregate(cd, cd.initial(start, 3), [first, second]).x.tolist() == pytest.approx([-2.5] * 3)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is mapped is read in /proc")
def test_a_large_memory_lies_in_a_mapped_file():
    algorithm, x = AnarchicAlgorithm(config("cs")), torch.zeros(1_000_000)
    clients = LARGE // (4 * x.numel()) + 1
    server = algorithm.initial(x, clients)
    reply = Reply(clients - 1, {"update": torch.ones_like(x)}, {"examples": 1})
    after = run_aggregate(algorithm, server, [reply])
    assert float(after.vectors["memory"][-1].sum()) == 1e6
    assert float(after.vectors["memory_mean"][0]) == pytest.approx(1 / clients)
    assert inode(server.vectors["memory"].data_ptr()) != inode(torch.zeros(9).data_ptr()) == 0


def inode(address: int) -> int:
    """Of the file that an address of this process is mapped to; 0: none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, number, *_ = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return int(number)
    raise AssertionError(hex(address))


def test_workers_train_at_the_rate_of_the_version_they_fetched_and_the_server_steps_at_its_own():
    """Decay by visits, or the server's rate for the worker, would give another model: worker 2 comes once, late, with an old version."""
    updates = written([(0, 0, 2)], [(0, 1, 2)], [(2, 0, 3)])
    algorithm = AnarchicAlgorithm(config("cd", lr_decay=0.5))
    x = simulate_anarchic(algorithm, model(), workers(), updates).server.x
    np.testing.assert_allclose(x.numpy(), by_numpy(updates, "cd", decay=0.5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_all_at_once_equals_one_after_the_other(rule, decay):
    """Unlike models, versions, numbers of steps and sizes of batches in one update."""
    algorithm = RULES[rule][0]
    algorithm = replace(algorithm, config=replace(algorithm.config, lr_decay=decay, batch_size=8, max_grad_norm=0.8, weight_decay=1e-2))
    x, y = examples()
    shards = Shards(x, y, np.split(np.arange(150), [31, 60, 104, 112]))
    updates = schedule(Clock([1.0, 1.7, 3.1, 0.6, 2.2], steps=(1, 7)), 5, buffer=4, updates=12, seed=1)
    assert any(len({(each.version, each.steps) for each in update.returns}) == 4 for update in updates)
    one, all_ = (simulate_anarchic(algorithm, net, shards, updates, executor=each, loss_fn=loss) for each in (None, "vmap"))
    assert (one.server.x - all_.server.x).abs().max() <= 1e-5
    assert (one.server.x - one.flat.initial()).norm() > 0.1
    assert [each.gradients for each in one.rounds] == [each.gradients for each in all_.rounds]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_held_in_float32(dtype):
    x, y = examples(60)
    updates = schedule(Clock([1.0, 2.0], steps=(1, 4)), 2, buffer=1, updates=8)

    def run(dtype):
        shards = Shards(x.to(dtype), y, [range(25), range(25, 60)])
        algorithm = AnarchicAlgorithm(AnarchicConfig(variant="cs", lr=1e-3, server_lr=2.0, batch_size=10))
        return simulate_anarchic(algorithm, lambda: net().to(dtype), shards, updates)

    half, single = run(dtype), run(torch.float32)
    assert half.server.x.dtype == half.server.vectors["memory"].dtype == torch.float32
    moved, start = single.server.x - single.flat.initial(), half.flat.initial()
    assert ((half.server.x - start) - moved).norm() < 0.1 * moved.norm()


@pytest.mark.parametrize("labels", [torch.uint8, torch.int32, torch.int64])
def test_one_example_and_rows_that_are_not_contiguous_will_do(labels):
    x, y = examples(4)
    updates = written([(0, 0, 2)], [(1, 0, 1)])
    algorithm = AnarchicAlgorithm(AnarchicConfig(variant="cd"))

    def labelled(output, y):
        return loss(output, y.long())

    one, other = (
        simulate_anarchic(algorithm, net, Shards(each, y.to(labels), [[0], [1, 2, 3]]), updates, loss_fn=labelled).server.x
        for each in (x, x.T.contiguous().T)
    )
    assert torch.equal(one, other)


def test_configs_algorithms_and_states_are_copied_and_pickled():
    for each in (AnarchicAlgorithm(config("cs")), FedBuff(config("cd")), schedule(Clock([1.0, 2.0]), 2, 1, 3), Clock([1.0], steps=[3])):
        assert pickle.loads(pickle.dumps(each)) == copy.deepcopy(each) == each
    history = simulate_anarchic(AnarchicAlgorithm(config("cs")), model(), workers(), BY_HAND)
    server = copy.deepcopy(history.server)
    assert isinstance(server, ServerState)
    assert torch.equal(server.vectors["memory"], history.server.vectors["memory"])
    twin = nn.Module()
    twin.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    twin.load_state_dict(history.state_dict())
    assert torch.equal(twin.w.data, history.server.x)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"variant": "CD"}, "variant is 'CD'; expected one of cd, cs"),
        ({"unseen": "drop"}, "unseen is 'drop'; expected one of zero, skip"),
        ({"server_lr": 0}, "server_lr is 0; expected a finite number above 0"),
        ({"server_lr": float("nan")}, "server_lr is nan"),
        ({"buffer": 0}, "buffer is 0; expected a whole number of at least 1"),
        ({"max_delay": -1}, "max_delay is -1; expected a whole number of at least 0"),
        ({"weighted": True}, "weighted is True; expected False: workers count alike"),
        ({"lr": 0}, "lr is 0"),
    ],
)
def test_settings_out_of_range_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        AnarchicConfig(**{"variant": "cd"} | fields)
    with pytest.raises(TypeError, match="variant"):
        AnarchicConfig()  # pyright: ignore[reportCallIssue] - that is the point


def test_the_defaults_keep_the_rate_where_other_methods_decay_it_by_rounds():
    settings_ = AnarchicConfig(variant="cd")
    assert (settings_.lr, settings_.lr_at(4001), settings_.server_lr, settings_.buffer) == (0.02, 0.02, 5.0, 5)
    assert FlatModel(net()).size > 0
    assert Update(1.0, [Return(0, 0, 1)]).returns[0].visit is None
