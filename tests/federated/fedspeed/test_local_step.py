"""FedSpeed's local step as a torch optimizer: the steps of the loop, its state, what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from federations import linear, quadratics, square
from torch import nn

from fewer.federated import (
    FedSpeedAlgorithm,
    FedSpeedConfig,
    FedSpeedOptimizer,
)
from fewer.federated._shared.clients import client_rng

FULL = FedSpeedConfig(local_steps=4, lr=0.05, lr_decay=0.9, weight_decay=1e-2, batch_size=100, max_grad_norm=0.5)


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


def test_the_optimizer_refuses_what_does_not_fit_its_parameters():
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="correction has the shapes .*expected those of the parameters"):
        FedSpeedOptimizer(model.parameters(), correction=[torch.zeros(3)])
    with pytest.raises(ValueError, match="2 groups of parameters"):
        FedSpeedOptimizer([{"params": [model.weight]}, {"params": [model.bias]}])


def test_the_optimizers_state_round_trips():
    def closure(model, optimizer):
        def compute():
            optimizer.zero_grad()
            value = model(torch.ones(3, 2)).square().mean()
            value.backward()
            return value

        return compute

    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    optimizer = FedSpeedOptimizer(model.parameters())
    optimizer.step(closure(model, optimizer))
    optimizer.end_round()
    twin = nn.Linear(2, 1)
    twin.load_state_dict(model.state_dict())
    other = FedSpeedOptimizer(twin.parameters())
    other.load_state_dict(optimizer.state_dict())
    optimizer.step(closure(model, optimizer))
    other.step(closure(twin, other))
    assert torch.equal(model.weight, twin.weight)
