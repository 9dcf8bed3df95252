"""Picking and placing: the expert's script, its demonstrations as windows, and how actors are judged."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from fewer.diffusion.flow_mle import FlowPolicy, problems
from fewer.diffusion.flow_mle.problems import EPISODE, HOVER, Expert, demonstrations, episode, episode_seed, judged
from fewer.errors import MissingExtra


class Table:
    """An arm without weight: it moves by a twentieth of its action, and what lies between closed fingers goes with it."""

    def __init__(self):
        self.seeds = []

    def reset(self, seed):
        self.seeds.append(seed)
        draw = np.random.default_rng(seed)
        self.gripper, self.thing, self.goal = np.array([0, 0, 0.3]), np.append(draw.uniform(-0.2, 0.2, 2), 0.0), draw.uniform(-0.2, 0.2, 3)
        return self.seen(), {}

    def seen(self):
        observation = np.concatenate([self.gripper, self.thing, np.zeros(19)])
        return {"observation": observation, "desired_goal": self.goal, "achieved_goal": self.thing}

    def step(self, action):
        assert action.shape == (4,)
        assert np.abs(action).max() <= 1
        held = action[3] < 0 and np.linalg.norm(self.gripper - self.thing) < 0.012
        self.gripper = self.gripper + action[:3] / 20
        self.thing = self.gripper.copy() if held else self.thing
        return self.seen(), 0.0, False, False, {}


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


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(problems.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="pip install gymnasium-robotics==1.4.2 mujoco==3.3.7"):
        problems.pick_and_place()


@pytest.mark.skipif(importlib.util.find_spec("gymnasium_robotics") is None, reason="gymnasium-robotics is not installed")
def test_the_expert_places_the_robots_object():
    told = judged(problems.pick_and_place(), Expert(), 10)
    assert told["success"] == 1
    assert told["distance"] < 0.005
