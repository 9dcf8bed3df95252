"""FedSpeed held against NumPy, against its own limit cases, and against its fixed point."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from federations import examples, gradient, linear, net, quadratics

from fewer import meters
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
    Shards,
    dirichlet,
    simulate,
)
from fewer.federated._shared.clients import client_rng

FULL = FedSpeedConfig(server_rule="paper", local_steps=4, lr=0.05, lr_decay=0.9, weight_decay=1e-2, batch_size=100, max_grad_norm=0.5)


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


def test_with_sampled_clients_the_default_rule_finds_the_optimum_and_the_papers_does_not():
    """Two of three clients take part in each round. At the optimum the corrections are the clients' own gradients: their mean over all is
    zero, their mean over a sample is not."""
    shards = quadratics(clients=3)
    best = torch.from_numpy(optimum(shards))
    draw = np.random.default_rng(0)
    drawn = [sorted(draw.choice(3, 2, replace=False).tolist()) for _ in range(400)]
    local = {"local_steps": 10, "lr": 0.1, "lr_decay": 1.0, "weight_decay": 0.0, "batch_size": 100}

    def error(algorithm):
        return float((simulate(algorithm, linear(), shards, len(drawn), sampler=chosen(drawn)).server.x - best).norm())

    assert FedSpeedConfig().server_rule == "released"
    assert error(FedSpeedAlgorithm(FedSpeedConfig(rho=0, prox=1.0, **local))) < 1e-6
    average = error(FedAvg(LocalConfig(**local)))
    assert average > 0.01
    assert error(FedSpeedAlgorithm(FedSpeedConfig(rho=0, prox=1.0, server_rule="paper", **local))) > average
