"""A policy on a toy: a point in the plane that is led to the origin."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

from fewer.diffusion.flow_mle import FineTuneConfig, FlowPolicy, odeint


def demonstrations(count=200, horizon=4):
    """Windows of two observations and four actions: each takes half of what is left."""
    at = 4 * torch.rand(count, 1, 2) - 2
    before, actions = at * 2, []
    state = at
    for _ in range(horizon):
        actions.append(-0.5 * state)
        state = state + actions[-1]
    return torch.cat([before, at], 1), torch.cat(actions, 1)


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    made = FlowPolicy(2, 2, horizon=4, execute=2, width=64)
    losses = made.fit(*demonstrations(), updates=400, lr=3e-3)
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    return made


def test_fine_tuning_for_one_step_makes_a_policy_precise_in_one_step(policy):
    made, (obs, actions) = copy.deepcopy(policy), demonstrations(100)
    made.steps = 1
    before = float((made.plan(obs) - actions).square().mean().sqrt())
    told = made.finetune(*demonstrations(), steps=1, config=FineTuneConfig(updates=300, lr=3e-3))
    assert told.report["spread"] < 0.1
    assert float((made.plan(obs) - actions).square().mean().sqrt()) < 0.5 * before
    made.steps = 3
    with pytest.warns(UserWarning, match="in 3 steps and was tuned for 1"):
        made.plan(obs)


def test_chunks_are_given_out_and_drawn_anew(policy):
    made, calls = copy.deepcopy(policy), []
    plan = made.plan
    made.plan = lambda obs, generator=None: calls.append(obs) or plan(obs, generator)
    at = torch.tensor([1.0, -1.0])
    for _ in range(5):
        at = at + made.act(at)
    assert len(calls) == 3  # two actions of each chunk
    assert torch.equal(calls[0][0, 0], calls[0][0, 1])  # the first observation stands for the one before
    assert not torch.equal(calls[1][0, 0], calls[1][0, 1])
    assert float(at.norm()) < 0.4
    made.reset()
    assert made.act(torch.randn(7, 2)).shape == (7, 2)
    with pytest.raises(ValueError, match="3 observations after 7; expected as many: call reset"):
        made.act(torch.randn(3, 2))


def test_a_policy_is_fitted_on_after_its_tuning_and_takes_any_precision(policy):
    made, (obs, actions) = copy.deepcopy(policy), demonstrations(20)
    made.finetune(obs.double(), actions.double(), steps=1, config=FineTuneConfig(updates=2))
    before = made.plan(obs.double(), torch.Generator().manual_seed(0))
    assert before.dtype == torch.float32
    made.fit(obs.double(), actions.double(), updates=2)
    assert int(made.tuned) == 0
    assert not torch.equal(made.plan(obs, torch.Generator().manual_seed(0)), before)


def test_a_policy_plans_by_the_solver_that_it_is_told_or_was_tuned_with(policy):
    made, (obs, actions) = copy.deepcopy(policy), demonstrations(20)
    made.steps, made.method = 3, "midpoint"
    noise = torch.randn(20, 8, generator=torch.Generator().manual_seed(2))
    chunk = odeint(made.field, noise, 3, method="midpoint", cond=made.condition(obs)).reshape(20, 4, 2).clamp(-1, 1)
    expected = made.act_low + (chunk + 1) / 2 * (made.act_high - made.act_low)
    assert torch.allclose(made.plan(obs, torch.Generator().manual_seed(2)), expected, atol=1e-6)
    made.finetune(obs, actions, steps=1, config=FineTuneConfig(updates=1, method="rk4"))
    assert (made.steps, made.method) == (1, "rk4")


def test_demonstrations_that_are_not_finite_change_nothing():
    made, (obs, actions) = FlowPolicy(2, 2, horizon=4, width=8), demonstrations(5)
    obs[3] = float("nan")
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ValueError, match="cond has a NaN or infinite number in row 3"):
        made.fit(obs, actions, updates=1)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())


def test_a_policy_is_a_module_like_any_other(policy):
    twin, obs = FlowPolicy(2, 2, horizon=4, execute=2, width=64), demonstrations(5)[0]
    twin.load_state_dict(policy.state_dict())
    draws = [each.plan(obs, torch.Generator().manual_seed(1)) for each in (policy, twin, pickle.loads(pickle.dumps(policy)))]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    half = copy.deepcopy(policy).to(torch.bfloat16).plan(obs.to(torch.bfloat16), torch.Generator().manual_seed(1))
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), draws[0], atol=0.1)
    constant = FlowPolicy(2, 2, horizon=4, width=8)
    constant.fit(obs, torch.full((5, 4, 2), 0.3), updates=1)
    assert torch.isfinite(constant.plan(obs)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.plan(obs)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda p: p.plan(torch.randn(3, 2)), r"observations are \(3, 2\); expected \[B, 2, 2\]"),
        (lambda p: p.act(torch.randn(3)), r"the observation is \(3,\); expected \[2\]"),
        (lambda p: p.fit(torch.randn(3, 2, 2), torch.randn(3, 2, 2)), r"actions are \(3, 2, 2\); expected \[3, 4, 2\]"),
        (lambda p: FlowPolicy(2, 2, horizon=2, execute=3), "execute is 3 with a horizon of 2"),
        (lambda p: FlowPolicy(0, 2), "obs_dim is 0"),
        (lambda p: FlowPolicy(2, 2, method="heun"), "method is 'heun'"),
    ],
)
def test_bad_words_are_refused(policy, act, said):
    with pytest.raises(ValueError, match=said):
        act(policy)
