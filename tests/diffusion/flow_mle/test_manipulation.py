"""Picking and placing: the expert's script, its demonstrations as windows, and how actors are judged."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from toy_arm import Table

from fewer.diffusion.flow_mle import FlowPolicy, problems
from fewer.diffusion.flow_mle.problems import (
    EPISODE,
    HOVER,
    Expert,
    Problem,
    Robot,
    Training,
    demonstrations,
    episode,
    episode_seed,
    judged,
    regressed,
)
from fewer.diffusion.flow_mle.velocity import VelocityMLP
from fewer.errors import MissingExtra


class Still:
    """An actor that does nothing."""

    def reset(self):
        pass

    def act(self, state, generator=None):
        return torch.zeros(4)


def test_the_expert_comes_from_above_and_closes_before_it_carries():
    run = episode(Table(), Expert(), 3)
    assert run.distance < 0.005
    gripper, thing, fingers = run.states[:, :3], run.states[:, 3:6], run.actions[:, 3]
    first = int((fingers < 0).nonzero()[0])
    assert bool((fingers[:first] > 0).all())
    assert bool((fingers[first:] < 0).all())
    assert float((gripper[first] - thing[first]).norm()) < 0.01
    assert bool((run.actions[first : first + 4, :3] == 0).all())
    assert not bool((run.actions[first + 4, :3] == 0).all())
    sideways = (gripper - thing)[:first, :2].norm(dim=1) > 0.01
    assert bool(((gripper - thing)[:first, 2][sideways] > 0.9 * HOVER).all())


def test_demonstrations_are_windows_that_a_policy_learns_from():
    table = Table()
    seen, taken = demonstrations(table, 3, horizon=4, obs_steps=3)
    windows = EPISODE - 4 + 1
    assert seen.shape == (3 * windows, 3, 28)
    assert taken.shape == (3 * windows, 4, 4)
    run = episode(table, Expert(), episode_seed(0, 1, test=False))
    assert torch.equal(seen[windows], run.states[[0, 0, 0]])
    assert torch.equal(seen[windows + 5], run.states[3:6])
    assert torch.equal(taken[windows + 5], run.actions[5:9])
    policy = FlowPolicy(28, 4, horizon=4, obs_steps=3, width=16, steps=1)
    policy.fit(seen, taken, updates=2)
    assert 0 <= judged(table, policy, 2)["success"] <= 1


def test_actors_are_judged_in_episodes_of_their_own_and_noise_is_the_seeds():
    table = Table()
    demonstrations(table, 20)
    learnt = set(table.seeds)
    table.seeds.clear()
    state = torch.get_rng_state()
    good = judged(table, Expert(), 20)
    assert not learnt & set(table.seeds)
    assert (good["success"], good["precise"]) == (1.0, 1.0)
    assert judged(table, Still(), 20)["precise"] == 0
    noisy = [judged(table, Expert(), 20, action_noise=0.1, observation_noise=0.005) for _ in range(2)]
    assert good["distance"] < noisy[0]["distance"] == noisy[1]["distance"]
    assert torch.equal(torch.get_rng_state(), state)


class Watching(Still):
    """An actor that does nothing and keeps what it is given."""

    def __init__(self):
        self.given = []

    def act(self, state, generator=None):
        self.given.append(state)
        return super().act(state)


def test_noise_of_observations_is_on_where_things_are():
    actor = Watching()
    run = episode(Table(), actor, 3, observation_noise=0.005)
    off = torch.stack(actor.given) - run.states
    assert bool((off[:, 9:] == 0).all())
    assert torch.allclose(off[:, 6:9], off[:, 3:6] - off[:, :3], atol=1e-6)
    assert 0.004 < float(off[:, :6].std()) < 0.006


def test_a_robot_is_shown_what_to_do_once_and_policies_have_the_scales_of_that(cache, monkeypatch):
    count, real = [0], problems.demonstrations
    monkeypatch.setattr(problems, "demonstrations", lambda *given: count.__setitem__(0, count[0] + 1) or real(*given))
    robot = Robot(Table, count=3, width=16)
    (problem, policy), (again, _), (other, _) = (robot.lesson(seed) for seed in (5, 5, 6))
    assert count[0] == 2
    assert torch.equal(problem.train[0], again.train[0])
    assert not torch.equal(problem.train[0], other.train[0])
    seen, taken = real(Table(), 3, 5)
    assert torch.equal(policy.pairs(seen, taken)[0], problem.train[0])
    assert float(problem.train[0].abs().max()) <= 1 + 1e-6
    assert torch.allclose(problem.train[1].std(0, correction=0).amax(), torch.ones(()), atol=0.05)
    assert policy.field(torch.zeros(2), *(each[:2] for each in problem.train)).shape == (2, 32)


def test_a_regression_answers_to_the_condition_alone_and_comes_to_what_is_expected():
    draw = torch.Generator().manual_seed(0)
    cond = torch.randn(400, 2, generator=draw)
    wanted = cond @ torch.tensor([[0.5, -0.3], [0.2, 0.4]])
    x1 = wanted + 0.05 * torch.randn(400, 2, generator=draw)
    problem = Problem(
        "line", (x1, cond), (x1, cond), lambda: VelocityMLP(2, 2, 16), lambda: VelocityMLP(2, 2, 16), Training(9, 64, 5e-3, 0.9), 4
    )
    policy = FlowPolicy(2, 2, horizon=1, obs_steps=1, width=16, steps=1)
    policy.field = regressed(problem, 500, 0)
    plans = [policy.plan(cond[:50, None], torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    assert torch.allclose(*plans, atol=1e-5)
    assert float((plans[0][:, 0] - wanted[:50].clamp(-1, 1)).square().mean().sqrt()) < 0.05


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(problems.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="pip install gymnasium-robotics==1.4.2 mujoco==3.3.7"):
        problems.pick_and_place()


@pytest.mark.skipif(importlib.util.find_spec("gymnasium_robotics") is None, reason="gymnasium-robotics is not installed")
def test_the_expert_places_the_robots_object():
    told = judged(problems.pick_and_place(), Expert(), 10)
    assert told["success"] == 1
    assert told["distance"] < 0.005
