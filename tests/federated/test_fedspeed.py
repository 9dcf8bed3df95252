"""FedSpeed held against NumPy, against its own limit cases, and against its fixed point."""

from __future__ import annotations

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from federations import examples, gradient, linear, net, quadratics, square
from flower_runs import flower_runs

from fewer import meters
from fewer.federated import (
    FedAvg,
    FedDyn,
    FedProx,
    FedSAM,
    FedSpeedAlgorithm,
    FedSpeedConfig,
    FedSpeedOptimizer,
    FlatModel,
    Independent,
    LocalConfig,
    Scaffold,
    Shards,
    dirichlet,
    load_checkpoint,
    simulate,
)
from fewer.federated._shared.clients import client_rng


@pytest.fixture(scope="module", autouse=True)
def _long_runs(request):
    """Flower's processes, which the last file looks at, start while the quick tests run."""
    flower_runs(request)


FULL = FedSpeedConfig(local_steps=4, lr=0.05, lr_decay=0.9, weight_decay=1e-2, batch_size=100, max_grad_norm=0.5)
ROUNDS = [[0, 2], [1, 2, 3], [0, 3]]  # who takes part


def chosen(rounds):
    return lambda clients, round, seed: rounds[round - 1]


def everybody(clients, round, seed):
    return list(clients)


def by_numpy(shards, config, rounds, x):
    """FedSpeed derived again, from the equations alone."""
    m, h, lam = len(shards), np.zeros((len(shards), len(x))), 1 / config.prox
    for t, sampled in enumerate(rounds):
        ys = {}
        for i in sampled:
            y, eta = x.copy(), config.lr * config.lr_decay**t
            for _ in range(config.local_steps):
                g1 = gradient(shards, i, y)
                g2 = gradient(shards, i, y + config.rho * g1 / (np.linalg.norm(g1) + 1e-7 if config.normalize else 1.0))
                v = (1 - config.alpha) * g1 + config.alpha * g2 + h[i] / lam + (y - x) / lam  # g_i = -h_i / lambda
                y = y - eta * (v * min(1, config.max_grad_norm / (np.linalg.norm(v) + 1e-6)) + config.weight_decay * y)
            ys[i], h[i] = y, h[i] + y - x
        x = np.mean([y + (h[i] if config.server_rule == "paper" else 0) for i, y in ys.items()], axis=0)
        x = x + (h.sum(0) / m if config.server_rule == "released" else 0)
    return x


@pytest.mark.parametrize("rule", ["paper", "released"])
@pytest.mark.parametrize("variant", [{}, {"alpha": 0.6}, {"normalize": False}, {"max_grad_norm": 10.0}])
def test_three_rounds_equal_a_numpy_derivation(rule, variant):
    shards, config = quadratics(), replace(FULL, server_rule=rule, **variant)
    history = simulate(FedSpeedAlgorithm(config), linear(), shards, 3, sampler=chosen(ROUNDS))
    np.testing.assert_allclose(history.server.x.numpy(), by_numpy(shards, config, ROUNDS, np.full(3, 0.3)), atol=1e-12, rtol=0)


def test_the_server_rules_agree_when_all_take_part_and_only_then():
    shards = quadratics()

    def run(rule, sampler):
        return simulate(FedSpeedAlgorithm(replace(FULL, server_rule=rule)), linear(), shards, 3, sampler=sampler).server.x

    assert torch.allclose(run("paper", everybody), run("released", everybody), atol=1e-12, rtol=0)
    assert (run("paper", chosen(ROUNDS)) - run("released", chosen(ROUNDS))).abs().max() > 1e-3


def classification():
    x, y = examples()
    return Shards(x, y, dirichlet(y, clients=6, alpha=0.3, seed=3, min_size=7))


LOCAL = {"local_epochs": 2, "lr": 0.1, "batch_size": 8}


def parameters_of(algorithm, rounds=4, **keywords):
    keywords = {"sampler": Independent(0.5), "seed": 5} | keywords
    return simulate(algorithm, net, classification(), rounds, **keywords).server.x


def test_without_ascent_and_proximal_term_it_is_fedavg_bit_for_bit():
    ours = parameters_of(FedSpeedAlgorithm(FedSpeedConfig(rho=0, prox=0, **LOCAL)))
    assert torch.equal(ours, parameters_of(FedAvg(LocalConfig(**LOCAL))))


def test_without_ascent_and_correction_it_is_fedprox():
    ours = parameters_of(FedSpeedAlgorithm(FedSpeedConfig(rho=0, prox=0.3, correction=False, **LOCAL)))
    theirs = parameters_of(FedProx(LocalConfig(**LOCAL), mu=0.3))
    assert torch.equal(ours, theirs)
    assert (theirs - parameters_of(FedAvg(LocalConfig(**LOCAL)))).abs().max() > 1e-3


def test_without_the_proximal_term_it_is_fedsam():
    ours = parameters_of(FedSpeedAlgorithm(FedSpeedConfig(prox=0, rho=0.2, **LOCAL)))
    theirs = parameters_of(FedSAM(LocalConfig(**LOCAL), rho=0.2))
    assert torch.equal(ours, theirs)
    assert (theirs - parameters_of(FedAvg(LocalConfig(**LOCAL)))).abs().max() > 1e-3


def test_with_all_clients_and_no_ascent_it_is_feddyn():
    ours = parameters_of(FedSpeedAlgorithm(FedSpeedConfig(rho=0, prox=0.3, **LOCAL)), sampler=everybody)
    assert torch.allclose(ours, parameters_of(FedDyn(LocalConfig(**LOCAL), mu=0.3), sampler=everybody), atol=1e-5)


def optimum(shards):
    return np.linalg.lstsq(shards.x.numpy(), shards.y.numpy(), rcond=None)[0]


def test_the_optimum_is_a_fixed_point_and_no_fixed_point_of_fedprox():
    shards, flat = quadratics(), linear()
    best = torch.from_numpy(optimum(shards))
    config = FedSpeedConfig(rho=0, prox=0.1, local_steps=5, lr=0.1, weight_decay=0, batch_size=100)
    algorithm = FedSpeedAlgorithm(config)
    replies = []
    server = replace(algorithm.initial(best, len(shards)), x=best)
    for message in algorithm.configure(server, range(len(shards)), 1):
        g = torch.from_numpy(gradient(shards, message.client, best.numpy()))
        assert g.norm() > 0.05
        shard = shards.shard(message.client, flat)
        kept, reply = algorithm.local({"correction": g}, message, shard, client_rng(0, 1, message.client))
        assert torch.allclose(kept["correction"], g, atol=1e-10, rtol=0)
        replies.append(reply)
    assert torch.allclose(algorithm.aggregate(server, replies).x, best, atol=1e-10, rtol=0)

    flat.model.load_state_dict(flat.named(best))
    moved = simulate(FedProx(LocalConfig(local_steps=5, lr=0.1, weight_decay=0, batch_size=100)), flat, shards, 1, sampler=everybody)
    assert (moved.server.x - best).norm() > 1e-3


class Recorder:
    """A shard that keeps the batch of every gradient."""

    def __init__(self, shard):
        self._shard, self.asked = shard, []

    def __getattr__(self, name):
        return getattr(self._shard, name)

    def gradient(self, vector, batch):
        self.asked.append((vector.clone(), batch.rows.clone()))
        return self._shard.gradient(vector, batch)


@pytest.mark.parametrize(("variant", "calls"), [({}, 2), ({"alpha": 0.0}, 1), ({"rho": 0.0}, 1)])
def test_a_step_takes_two_gradients_of_one_batch_unless_one_is_enough(variant, calls):
    algorithm = FedSpeedAlgorithm(FedSpeedConfig(**{"local_epochs": 3, "batch_size": 4, "lr": 0.1} | variant))
    shards, flat = classification(), FlatModel(net())
    shard = Recorder(shards.shard(0, flat))
    server = algorithm.initial(flat.initial(), len(shards))
    state = {"correction": torch.zeros(flat.size)}
    with meters.counting() as counts:
        algorithm.local(state, algorithm.configure(server, [0], 1)[0], shard, client_rng(0, 1, 0))
    steps = 3 * -(-shard.size // 4)
    assert counts["gradients"] == len(shard.asked) == calls * steps
    batches = [shard.asked[step * calls : (step + 1) * calls] for step in range(steps)]
    assert all(torch.equal(first[1], last[1]) for first, *_, last in [[*each, each[-1]] for each in batches])
    assert len({tuple(each[0][1].tolist()) for each in batches}) == steps
    if calls == 2:
        distances = [(ascent - here).norm() for (here, _), (ascent, _) in batches]
        assert torch.allclose(torch.stack(distances), torch.tensor(0.1), atol=1e-4)


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
    FedSpeedAlgorithm(FedSpeedConfig(**LOCAL)),
    FedSpeedAlgorithm(FedSpeedConfig(server_rule="released", relaxed_beta=0.1, alpha=0.5, **LOCAL)),
    FedAvg(LocalConfig(**LOCAL)),
    FedProx(LocalConfig(**LOCAL)),
    FedSAM(LocalConfig(**LOCAL)),
    Scaffold(LocalConfig(**LOCAL)),
    FedDyn(LocalConfig(**LOCAL)),
]
NAMES = ["fedspeed", "fedspeed-released", "fedavg", "fedprox", "fedsam", "scaffold", "feddyn"]


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


def test_relaxed_initialisation_starts_beyond_x_from_the_second_round_on():
    beta = 0.4
    config = FedSpeedConfig(relaxed_beta=beta, local_steps=1, lr=1e-12, batch_size=100, weight_decay=0)
    shards = quadratics()
    first = simulate(FedSpeedAlgorithm(replace(config, lr=0.1)), linear(), shards, 1, sampler=everybody)
    x, last = first.server.x, first.client_states.get(2)["last"]
    state = {"correction": torch.zeros(3, dtype=torch.float64), "last": last}
    algorithm = FedSpeedAlgorithm(config)
    flat = linear()
    message = algorithm.configure(replace(first.server, x=x), [2], 2)[0]
    kept, _ = algorithm.local(state, message, shards.shard(2, flat), client_rng(0, 2, 2))
    assert torch.allclose(kept["last"], x + beta * (x - last), atol=1e-9)
    kept, _ = algorithm.local(state | {"last": torch.zeros_like(last)}, message, shards.shard(2, flat), client_rng(0, 2, 2))
    assert torch.allclose(kept["last"], x, atol=1e-9)


def test_learning_rates_decay_by_rounds_and_not_by_participations():
    """Client 2 takes part in round 5 only: it trains at the rate of round 5, as the derivation says."""
    rounds, shards = [[0], [1], [0], [1], [2]], quadratics()
    config = replace(FULL, lr_decay=0.5)
    history = simulate(FedSpeedAlgorithm(config), linear(), shards, 5, sampler=chosen(rounds))
    np.testing.assert_allclose(history.server.x.numpy(), by_numpy(shards, config, rounds, np.full(3, 0.3)), atol=1e-12, rtol=0)


def test_weighting_by_examples():
    shards = classification()
    algorithm = FedAvg(LocalConfig(weighted=True, **LOCAL))
    once = simulate(algorithm, net, shards, 1, sampler=everybody).server.x
    flat = FlatModel(net())
    alone = [simulate(FedAvg(LocalConfig(**LOCAL)), flat, shards, 1, sampler=chosen([[client]])).server.x for client in range(len(shards))]
    sizes = torch.tensor([float(len(part)) for part in shards.parts])
    assert torch.allclose(once, (sizes[:, None] * torch.stack(alone)).sum(0) / sizes.sum(), atol=1e-6)


@pytest.mark.parametrize("variant", [{}, {"alpha": 0.4}, {"normalize": False}, {"server_rule": "released"}, {"correction": False}])
def test_the_optimizer_makes_the_steps_of_the_loop(variant):
    """Two rounds of one client: the optimizer's parameters, correction and message are those of the algorithm."""
    config = replace(FULL, **variant)
    shards, flat = quadratics(), linear()
    algorithm = FedSpeedAlgorithm(config)
    shard, state = shards.shard(1, flat), {"correction": torch.full((3,), 0.05, dtype=torch.float64)}
    model = linear().model
    given = None if not config.correction else [state["correction"].view(1, 3)]
    optimizer = FedSpeedOptimizer(model.parameters(), config, correction=given)
    x, y = shards.x[shards.parts[1]], shards.y[shards.parts[1]]
    server = algorithm.initial(flat.initial(), 4)

    def closure():
        optimizer.zero_grad()
        loss = square(model(x), y).mean()
        loss.backward()
        return loss

    for round in (1, 2):
        message = algorithm.configure(server, [1], round)[0]
        kept, reply = algorithm.local(state, message, shard, client_rng(0, round, 1))
        state = state | kept
        optimizer.param_groups[0]["lr"] = config.lr_at(round)
        for _ in range(config.local_steps):
            optimizer.step(closure)
        sent = optimizer.end_round()
        assert torch.allclose(sent[0].flatten(), reply.vectors["model"], atol=1e-12, rtol=0)
        server = algorithm.aggregate(server, [reply])
        optimizer.start_round([server.x.view(1, 3)])
    if config.correction:
        assert torch.allclose(optimizer.state[next(iter(model.parameters()))]["correction"].flatten(), state["correction"], atol=1e-12)
