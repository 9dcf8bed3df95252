"""Gating residuals, gate values, balance and capacity."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_plus_plus_models import D, make

from fewer.language.moe_plus_plus.router import (
    PathwayRouter,
    gate_values,
    heterogeneous_capacity,
    heterogeneous_load_balance_loss,
    select,
    within_capacity,
)


def test_a_zero_gate_map_changes_no_bit() -> None:
    router, x = PathwayRouter(D, 8), torch.randn(5, D)
    with torch.no_grad():
        assert router.gate_map is not None
        router.gate_map.weight.zero_()
    assert torch.equal(router(x, torch.randn(5, 8)), router(x, None))


def test_a_gate_map_of_one_passes_the_logits_on() -> None:
    first, second, x = PathwayRouter(D, 8, gate_residual=False), PathwayRouter(D, 8), torch.randn(5, D)
    with torch.no_grad():
        assert second.gate_map is not None
        assert isinstance(second.wg, torch.nn.Linear)
        second.wg.weight.zero_()
        second.gate_map.weight.copy_(torch.eye(8))
    logits = first(x, None)
    assert torch.equal(second(x, logits), logits)
    assert not torch.allclose(logits.sum(-1), torch.ones(5))


def test_the_layer_passes_on_logits_with_the_residual_in_them() -> None:
    layer, x = make().eval(), torch.randn(5, D, dtype=torch.float64)
    residual = torch.randn(5, 8, dtype=torch.float64)
    assert torch.equal(layer(x, residual).router_logits, layer.router(x, residual))


def test_equal_logits_select_the_lower_index() -> None:
    assert select(torch.zeros(3, 40), 2).tolist() == [[0, 1]] * 3


def test_gate_values_of_a_zero_expert_s_partner() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 2.5]])
    chosen = select(logits, 2)
    assert gate_values(logits, chosen, "released", zeros=1).tolist() == [[0.0, 1.0]]
    assert gate_values(logits, chosen, "renorm", zeros=1).sum().item() == pytest.approx(1)
    assert gate_values(logits, chosen, "paper", zeros=1).sum().item() < 1
    both = gate_values(logits, chosen, "released", zeros=2)  # two zero experts: nothing is divided by nothing
    assert both.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("tau", [0.25, 0.75, 1.0])
def test_a_uniform_router_has_the_loss_of_the_formula(tau: float) -> None:
    n, n_ffn, k = 12, 8, 2
    pairs = torch.tensor(list(itertools.combinations(range(n), k)))  # every expert equally often
    loss = heterogeneous_load_balance_loss(torch.zeros(len(pairs), n, dtype=torch.float64), pairs, n_ffn, tau)
    assert loss.item() == pytest.approx(k * (n_ffn + tau * (n - n_ffn)) / n**2, abs=1e-15)


def test_the_loss_and_its_gradient_are_the_definition_s_with_the_load_held() -> None:
    logits = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    chosen, mask = select(logits, 2), torch.rand(20) < 0.7
    eta = torch.tensor([1.0] * 4 + [0.3] * 2, dtype=torch.float64)
    load = torch.stack([(chosen[mask] == e).any(-1).double().mean() for e in range(6)])
    expected = (eta * load * logits[mask].softmax(-1).mean(0)).sum()
    loss = heterogeneous_load_balance_loss(logits, chosen, 4, 0.3, mask)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-14)
    assert load.sum().item() == pytest.approx(2)
    one, two = (torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, expected))
    torch.testing.assert_close(one, two, atol=1e-15, rtol=0)
    switch = (load * logits[mask].softmax(-1).mean(0)).sum()
    assert heterogeneous_load_balance_loss(logits, chosen, 4, 1.0, mask).item() == pytest.approx(switch.item(), abs=1e-14)


@pytest.mark.parametrize(("tau", "share"), [(0.25, 2 / 6), (0.75, 6 / 10)])
def test_descent_on_the_loss_alone_reaches_the_promised_share(tau: float, share: float) -> None:
    tokens, n, n_ffn = 10_000, 12, 8
    logits = torch.randn(tokens, n, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for _ in range(200):
        loss = heterogeneous_load_balance_loss(logits, select(logits, 2), n_ffn, tau)
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            logits -= tokens * gradient
    assert (select(logits, 2) < n_ffn).float().mean().item() == pytest.approx(share, abs=0.03)


@settings(max_examples=100)
@given(
    seed=st.integers(0, 10**6), tokens=st.integers(0, 60), n_ffn=st.integers(1, 6), n_zc=st.integers(0, 4), tau=st.floats(0.05, 1),
    gamma=st.floats(0.2, 3), score=st.booleans(),
)  # fmt: skip
def test_capacity_is_never_exceeded_and_drops_are_what_is_over_it(
    seed: int, tokens: int, n_ffn: int, n_zc: int, tau: float, gamma: float, score: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = n_ffn + n_zc
    logits = torch.randn(tokens, n, generator=generator) * 3
    chosen = select(logits, min(2, n))
    values, mask = gate_values(logits, chosen, "paper", 0), torch.rand(tokens, generator=generator) < 0.8
    assignments = int(mask.sum()) * chosen.shape[1]
    ffn, free = heterogeneous_capacity(assignments, n_ffn, n_zc, tau, gamma)
    assert n_ffn * ffn + n_zc * free >= gamma * assignments - 1e-6
    capacity = torch.tensor([ffn] * n_ffn + [free] * n_zc)
    served = within_capacity(chosen, values, capacity, "score" if score else "position", mask)
    load = torch.bincount(chosen[mask].flatten(), minlength=n)
    executed = torch.bincount(chosen[served], minlength=n)
    assert not served[~mask].any()
    assert torch.equal(executed, torch.minimum(load, capacity))
    if score:  # who is served has no smaller a gate value than who is not
        for expert in range(n):
            asked = (chosen == expert) & mask[:, None]
            inside, outside = values[asked & served], values[asked & ~served]
            assert not len(inside) or not len(outside) or inside.min() >= outside.max()


def test_capacity_by_score_does_not_depend_on_the_order_of_tokens() -> None:
    layer = make(capacity_factor=0.4, capacity_priority="score").train()
    x, order = torch.randn(30, D, dtype=torch.float64), torch.randperm(30)
    torch.testing.assert_close(layer(x).hidden_states[order], layer(x[order]).hidden_states, atol=1e-12, rtol=0)


def test_a_capacity_of_165_is_not_166() -> None:
    assert heterogeneous_capacity(1500, 8, 4, 0.75, 1.1) == (124, 165)
    with pytest.raises(ValueError, match="tau is 2"):
        heterogeneous_capacity(10, 1, 1, 2, 1.1)
    with pytest.raises(ValueError, match="capacity_factor is 0"):
        heterogeneous_capacity(10, 1, 1, 0.5, 0)
