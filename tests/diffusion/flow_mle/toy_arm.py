"""A robot's arm without a simulator, for tests that act."""

from __future__ import annotations

import numpy as np


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
