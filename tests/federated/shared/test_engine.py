"""The in-process engine: clients in any order, all at once, resumed; what it leaves out and what it refuses."""

from __future__ import annotations

from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch
from federations import examples, loss, net
from torch import nn
from torch.nn import functional as F

from fewer.federated import (
    FedAvg,
    FedDyn,
    FedProx,
    FedSAM,
    FedSpeedAlgorithm,
    FedSpeedConfig,
    FlatModel,
    Independent,
    LocalConfig,
    Scaffold,
    Shards,
    dirichlet,
    load_checkpoint,
    simulate,
)


def chosen(rounds):
    return lambda clients, round, seed: rounds[round - 1]


def everybody(clients, round, seed):
    return list(clients)


def classification():
    x, y = examples()
    return Shards(x, y, dirichlet(y, clients=6, alpha=0.3, seed=3, min_size=7))


LOCAL = {"local_epochs": 2, "lr": 0.1, "batch_size": 8}


def parameters_of(algorithm, rounds=4, **keywords):
    keywords = {"sampler": Independent(0.5), "seed": 5} | keywords
    return simulate(algorithm, net, classification(), rounds, **keywords).server.x


def test_a_client_that_comes_back_finds_its_own_correction():
    """Client 3 takes part in rounds 1 and 5, others in between: its g of round 1 is what it starts round 5 with."""
    rounds = [[3, 1], [0, 1], [0, 2], [1, 2], [3, 0]]
    algorithm = FedSpeedAlgorithm(FedSpeedConfig(**LOCAL))
    history = simulate(algorithm, net, classification(), 4, sampler=chosen(rounds))
    first = simulate(algorithm, net, classification(), 1, sampler=chosen(rounds))
    kept = first.client_states.get(3)["correction"]
    assert kept.norm() > 0
    assert torch.equal(history.client_states.get(3)["correction"], kept)

    handed = []
    spy = type("Spy", (FedSpeedAlgorithm,), {"local": lambda self, state, message, *rest: (
        handed.append((message.round, message.client, state["correction"].clone())), FedSpeedAlgorithm.local(self, state, message, *rest)
    )[1]})  # fmt: skip
    simulate(spy(algorithm.config), net, classification(), 5, sampler=chosen(rounds))
    in_round_5 = next(g for round, client, g in handed if (round, client) == (5, 3))
    assert torch.equal(in_round_5, kept)


class Shuffled(Executor):
    """Finishes a round's clients in another order than they were given in: nothing runs before the last one is there."""

    def __init__(self, sizes):
        self.sizes, self.waiting, self.rng = iter(sizes), [], np.random.default_rng(7)
        self.size = next(self.sizes)

    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        self.waiting.append((future, fn, args, kwargs))
        if len(self.waiting) == self.size:
            for place in self.rng.permutation(self.size):
                future_, fn, args, kwargs = self.waiting[place]
                future_.set_result(fn(*args, **kwargs))
            self.waiting, self.size = [], next(self.sizes, 0)
        return future


@pytest.mark.parametrize("algorithm", [FedSpeedAlgorithm(FedSpeedConfig(**LOCAL)), Scaffold(LocalConfig(**LOCAL))])
def test_who_finishes_first_changes_nothing(algorithm):
    in_order = parameters_of(algorithm)
    with ThreadPoolExecutor(4) as pool:
        assert torch.equal(parameters_of(algorithm, executor=pool), in_order)
    sampler = Independent(0.5)
    sizes = [len(sampler(range(6), round, 5)) for round in range(1, 5)]
    assert max(sizes) > 2
    assert torch.equal(parameters_of(algorithm, executor=Shuffled(sizes)), in_order)


ALGORITHMS = [
    FedSpeedAlgorithm(FedSpeedConfig(server_rule="paper", **LOCAL)),
    FedSpeedAlgorithm(FedSpeedConfig(relaxed_beta=0.1, alpha=0.5, **LOCAL)),
    FedAvg(LocalConfig(**LOCAL)),
    FedProx(LocalConfig(**LOCAL)),
    FedSAM(LocalConfig(**LOCAL)),
    Scaffold(LocalConfig(**LOCAL)),
    FedDyn(LocalConfig(**LOCAL)),
]


NAMES = ["fedspeed-paper", "fedspeed", "fedavg", "fedprox", "fedsam", "scaffold", "feddyn"]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=NAMES)
def test_all_clients_at_once_equal_one_after_the_other(algorithm):
    """The clients' sizes differ, so that batches have unlike sizes and clients unlike numbers of steps."""
    sizes = [len(part) for part in classification().parts]
    assert len(set(sizes)) > 3
    one, all_ = (simulate(algorithm, net, classification(), 5, sampler=Independent(0.7), executor=each) for each in (None, "vmap"))
    assert torch.allclose(one.server.x, all_.server.x, atol=1e-5, rtol=0)
    assert [each.gradients for each in one.rounds] == [each.gradients for each in all_.rounds]
    for name, table in one.client_states.tables.items():
        assert torch.allclose(table, all_.client_states.tables[name], atol=1e-5 * 10, rtol=0)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=NAMES)
def test_a_resumed_run_equals_an_uninterrupted_one(algorithm, tmp_path):
    file = tmp_path / "state.pt"
    parameters_of(algorithm, rounds=3, checkpoint=file)
    server, kept = load_checkpoint(file, 6)
    assert server.round == 3
    assert set(kept) == set(algorithm.keeps)
    resumed = parameters_of(algorithm, rounds=6, checkpoint=file)
    assert torch.equal(resumed, parameters_of(algorithm, rounds=6))


def test_weighting_by_examples():
    shards = classification()
    algorithm = FedAvg(LocalConfig(weighted=True, **LOCAL))
    once = simulate(algorithm, net, shards, 1, sampler=everybody).server.x
    flat = FlatModel(net())
    alone = [simulate(FedAvg(LocalConfig(**LOCAL)), flat, shards, 1, sampler=chosen([[client]])).server.x for client in range(len(shards))]
    sizes = torch.tensor([float(len(part)) for part in shards.parts])
    assert torch.allclose(once, (sizes[:, None] * torch.stack(alone)).sum(0) / sizes.sum(), atol=1e-6)


def with_statistics():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def federation(bad: int | None = None):
    x, y = examples(60)
    if bad is not None:
        x[bad * 20] = float("nan")
    return Shards(x, y, torch.arange(60).split(20))


AVERAGE = FedAvg(LocalConfig(local_epochs=1, batch_size=10))


def test_statistics_are_refused_by_the_name_of_their_layer_unless_averaging_is_said_aloud():
    with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm1d\) keeps statistics.*GroupNorm.*buffers='average'"):
        simulate(AVERAGE, with_statistics, federation(), 1, sampler=Independent(1.0))
    with pytest.raises(ValueError, match="buffers is 'mean'; expected None or 'average'"):
        FlatModel(with_statistics(), buffers="mean")
    with pytest.raises(ValueError, match="clients trained at once"):
        simulate(AVERAGE, with_statistics, federation(), 1, sampler=Independent(1.0), executor="vmap", buffers="average")
    history = simulate(AVERAGE, with_statistics, federation(), 1, sampler=Independent(1.0), buffers="average")
    assert history.server.vectors["buffers"].shape == (16,)


@pytest.mark.parametrize("executor", [None, "vmap"])
def test_a_reply_with_nan_is_left_out_and_the_round_goes_on(executor):
    with pytest.warns(UserWarning, match="client 1 sent 'model' with NaN or infinite numbers; its reply is left out"):
        history = simulate(AVERAGE, net, federation(bad=1), 1, sampler=Independent(1.0), executor=executor)
    others = simulate(AVERAGE, net, federation(), 1, sampler=lambda clients, round, seed: [0, 2])
    assert torch.allclose(history.server.x, others.server.x, atol=1e-6)


@pytest.mark.parametrize("executor", [None, "vmap"])
def test_what_a_round_tells_is_of_the_good_replies(executor):
    with pytest.warns(UserWarning, match="client 1 sent 'model' with NaN"):
        told = simulate(AVERAGE, net, federation(bad=1), 1, sampler=Independent(1.0), executor=executor).rounds[0]
    others = simulate(AVERAGE, net, federation(), 1, sampler=lambda clients, round, seed: [0, 2], executor=executor).rounds[0]
    assert told.clients == [0, 1, 2]
    assert told.drift == pytest.approx(others.drift, rel=1e-5)
    assert told.numbers_up == 1.5 * others.numbers_up


def test_a_round_without_a_good_reply_ends_with_an_error():
    with pytest.warns(UserWarning, match="left out"), pytest.raises(ValueError, match="round 1: no good reply of 1"):
        simulate(AVERAGE, net, federation(bad=1), 1, sampler=lambda clients, round, seed: [1])


def test_a_sampler_that_chooses_nobody_is_told():
    with pytest.raises(ValueError, match="chose no client in round 1"):
        simulate(AVERAGE, net, federation(), 1, sampler=lambda clients, round, seed: [])


def test_a_checkpoint_of_another_federation_is_refused_and_stays(tmp_path):
    file = tmp_path / "state.pt"
    simulate(AVERAGE, net, federation(), 1, sampler=Independent(1.0), checkpoint=file)
    before = file.read_bytes()
    x, y = examples(60)
    with pytest.raises(ValueError, match="written with 3 clients and is resumed with 6"):
        simulate(AVERAGE, net, Shards(x, y, torch.arange(60).split(10)), 2, sampler=Independent(1.0), checkpoint=file)
    with pytest.raises(ValueError, match="written with seed 0; resumed with 1"):
        simulate(AVERAGE, net, federation(), 2, sampler=Independent(1.0), seed=1, checkpoint=file)
    with pytest.raises(ValueError, match="written with algorithm"):
        simulate(FedSpeedAlgorithm(), net, federation(), 2, sampler=Independent(1.0), checkpoint=file)
    with pytest.raises(ValueError, match="has a model of 99 parameters and is resumed with one of 35; expected the same model"):
        simulate(AVERAGE, lambda: nn.Linear(6, 5), federation(), 2, sampler=Independent(1.0), checkpoint=file)
    assert file.read_bytes() == before
    file.write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match="state.pt.*checkpoint"):
        simulate(AVERAGE, net, federation(), 2, sampler=Independent(1.0), checkpoint=file)
    assert list(tmp_path.iterdir()) == [file]


def test_a_mean_loss_cannot_train_clients_of_unlike_sizes_at_once():
    x, y = examples(60)
    shards = Shards(x, y, [range(25), range(25, 60)])
    with pytest.raises(ValueError, match=r"one number a batch; expected one an example"):
        simulate(AVERAGE, net, shards, 1, sampler=Independent(1.0), executor="vmap", loss_fn=F.cross_entropy)
    one, all_ = (simulate(AVERAGE, net, federation(), 2, sampler=Independent(1.0), executor=each, loss_fn=each_loss).server.x
                 for each, each_loss in ((None, loss), ("vmap", F.cross_entropy)))  # fmt: skip
    assert torch.allclose(one, all_, atol=1e-5)


@pytest.mark.parametrize("executor", [None, "vmap"])
def test_dropout_draws_the_same_in_every_run(executor):
    def model():
        return nn.Sequential(*net(), nn.Dropout(0.5))

    one, other = (simulate(AVERAGE, model, federation(), 2, sampler=Independent(1.0), executor=executor).server.x for _ in range(2))
    assert torch.equal(one, other)


def test_threads_leave_the_callers_random_numbers_alone():
    def model():
        return nn.Sequential(*net(), nn.Dropout(0.5))

    before = torch.get_rng_state()
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            simulate(FedAvg(LocalConfig(local_epochs=3, batch_size=2)), model, federation(), 2, sampler=Independent(1.0), executor=pool)
            assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("executor", ["vamp", "threads", 4])
def test_an_executor_that_is_none_is_refused(executor):
    with pytest.raises(ValueError, match=f"executor is {executor!r}; expected None, 'vmap' or a concurrent.futures pool"):
        simulate(AVERAGE, net, federation(), 1, sampler=Independent(1.0), executor=executor)


@pytest.mark.parametrize("executor", [None, "vmap"])
def test_a_client_that_the_sampler_names_twice_counts_once(executor):
    algorithm = FedSpeedAlgorithm(FedSpeedConfig(**LOCAL))
    twice = simulate(algorithm, net, federation(), 2, sampler=lambda *_: np.array([2, 0, 2, 2]), executor=executor)
    once = simulate(algorithm, net, federation(), 2, sampler=lambda *_: [0, 2], executor=executor)
    assert twice.rounds[0].clients == [2, 0]
    assert torch.allclose(twice.server.x, once.server.x, atol=1e-6)
    assert torch.allclose(twice.client_states.get(2)["correction"], once.client_states.get(2)["correction"], atol=1e-6)


def test_a_client_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="the sampler chose client 7 in round 1; expected some of the 3 that are there"):
        simulate(AVERAGE, net, federation(), 1, sampler=lambda *_: [0, 7])


@pytest.mark.parametrize("executor", [None, "vmap"])
def test_one_bad_round_does_not_stay_in_a_clients_state(executor, tmp_path):
    """Client 1's data hold NaN in round 1 alone: its reply is left out, and its correction stays what it was."""
    algorithm, file = FedSpeedAlgorithm(FedSpeedConfig(local_epochs=1, batch_size=10)), tmp_path / "state.pt"
    run = {"sampler": Independent(1.0), "executor": executor, "checkpoint": file}
    with pytest.warns(UserWarning, match="client 1 sent 'model' with NaN"):
        first = simulate(algorithm, net, federation(bad=1), 1, **run)
    assert not first.client_states.get(1)["correction"].any()
    assert first.client_states.get(0)["correction"].any()
    second = simulate(algorithm, net, federation(), 2, **run)
    assert second.client_states.get(1)["correction"].any()
    assert second.client_states.get(1)["correction"].isfinite().all()


@pytest.mark.parametrize("place", ["", "absent/\0", "file.txt/state.pt", "folder"])
def test_a_checkpoint_that_cannot_be_written_is_refused_before_the_work(tmp_path, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    told = []
    with pytest.raises((OSError, ValueError), match="checkpoint"):
        simulate(AVERAGE, net, federation(), 1, sampler=Independent(1.0), checkpoint=place, tell=told.append)
    assert not told
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["file.txt", "folder"]


@pytest.mark.parametrize("rounds", [0, -1, 2.5])
def test_a_number_of_rounds_that_cannot_be_is_refused(rounds):
    with pytest.raises(ValueError, match="rounds is .*expected a whole number of at least 1"):
        simulate(AVERAGE, net, federation(), rounds, sampler=Independent(1.0))
