"""The two losses and the factor, against their definitions and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fewer.language import AdaptiveFactor, activation_locality_loss, chunk_sparsification_loss
from fewer.language.block_ffn.layer import root_mean_square_norm


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# Locality


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_locality_is_the_cross_entropy_of_neighbours(alpha):
    logits = drawn(2, 6, 5)
    probability = torch.sigmoid(alpha * logits)
    wanted = F.binary_cross_entropy(probability[:, :-1], probability[:, 1:])
    assert torch.allclose(activation_locality_loss(logits, alpha=alpha), wanted, rtol=1e-12)


def test_of_equal_tokens_locality_is_the_entropy_and_nothing_where_they_are_certain():
    logits = drawn(1, 1, 6).expand(2, 9, 6)
    p = torch.sigmoid(2 * logits)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert torch.allclose(activation_locality_loss(logits, alpha=2.0), entropy)
    assert activation_locality_loss(logits.sign() * 50, alpha=100.0) == 0


def test_documents_do_not_see_each_other_and_padding_is_not_seen():
    a, b = drawn(1, 4, 3), drawn(1, 7, 3)
    both = activation_locality_loss(torch.cat([a, b], 1), torch.tensor([[0] * 4 + [1] * 7]), alpha=1.0)
    apart = (3 * activation_locality_loss(a, alpha=1.0) + 6 * activation_locality_loss(b, alpha=1.0)) / 9
    assert torch.allclose(both, apart, rtol=1e-12)
    padded = torch.cat([torch.full((1, 2, 3), 1e4, dtype=torch.float64), b], 1)
    mask = torch.tensor([[0] * 2 + [1] * 7])
    assert torch.allclose(
        activation_locality_loss(padded, attention_mask=mask, alpha=1.0), activation_locality_loss(b, alpha=1.0), rtol=1e-12
    )


def test_the_gradient_flows_into_both_tokens_unless_the_later_is_detached():
    logits = drawn(1, 3, 2).requires_grad_()
    for detach in (False, True):
        (gradient,) = torch.autograd.grad(activation_locality_loss(logits, alpha=1.0, detach_target=detach), logits)
        assert bool(gradient[:, -1].any()) is not detach
    assert torch.autograd.gradcheck(lambda x: activation_locality_loss(x, alpha=1.0), logits)


def test_half_precision_does_not_overflow():
    logits = torch.full((1, 4, 3), 3e4, dtype=torch.float16)
    assert activation_locality_loss(logits) == 0
    assert chunk_sparsification_loss(logits, chunk_len=2).isfinite()


# Chunks


def test_chunk_loss_is_its_definition():
    logits = drawn(2, 6, 4)
    a1 = logits.clamp(min=0)
    r = a1 / (a1.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    p = r / (r.sum(-1, keepdim=True) + 1e-5)
    parts = []
    for row in p:
        for chunk in (row[:3], row[3:]):
            unused = torch.ones(4, dtype=torch.float64)
            for token in chunk:
                unused = unused * (1 - token + 1e-5)
            parts.append((1 - unused).mean())
    assert torch.allclose(chunk_sparsification_loss(logits, chunk_len=3), torch.stack(parts).mean(), rtol=1e-10)


def test_one_expert_for_all_costs_its_share_and_one_each_costs_all_of_them():
    experts = 8
    one = torch.eye(experts, dtype=torch.float64)[[3]].expand(2, 16, experts)
    assert chunk_sparsification_loss(one, chunk_len=4).item() == pytest.approx(1 / experts, abs=1e-3)
    each = torch.eye(experts, dtype=torch.float64)[:4].repeat(1, 4, 1).view(1, 16, experts)
    assert chunk_sparsification_loss(each, chunk_len=4).item() == pytest.approx(4 / experts, abs=1e-3)
    assert chunk_sparsification_loss(drawn(1, 1, experts), chunk_len=1).item() == pytest.approx(1 / experts, abs=1e-4)


def test_chunk_loss_has_the_gradient_of_finite_differences():
    logits = drawn(1, 4, 5)
    logits[..., :3] = logits[..., :3].abs()  # of a single active expert p is 1, whatever its logit
    assert logits.abs().min() > 1e-3
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(chunk_sparsification_loss(logits, chunk_len=2), logits)
    assert gradient.abs().max() > 1e-3
    assert torch.autograd.gradcheck(lambda x: chunk_sparsification_loss(x, chunk_len=2), logits)


def test_padding_activates_nothing_and_its_chunks_do_not_count():
    logits = drawn(1, 8, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])
    first = logits[:, :4].clone()
    first[:, 3] = -1
    near = chunk_sparsification_loss(first, chunk_len=4)
    assert chunk_sparsification_loss(logits, mask, chunk_len=4).item() == pytest.approx(near.item(), abs=2e-5)
    other = logits.clone()
    other[:, 3:] = drawn(1, 5, 5)
    assert torch.equal(chunk_sparsification_loss(other, mask, chunk_len=4), chunk_sparsification_loss(logits, mask, chunk_len=4))


def test_of_padding_alone_both_losses_are_nothing():
    logits, mask = drawn(2, 4, 3).requires_grad_(), torch.zeros(2, 4, dtype=torch.long)
    total = activation_locality_loss(logits, attention_mask=mask) + chunk_sparsification_loss(logits, mask, chunk_len=2)
    total.backward()
    assert total == 0
    assert not logits.grad.any()


def test_the_norm_counts_all_experts():
    assert torch.allclose(root_mean_square_norm(torch.tensor([3.0, 0.0, 0.0, 0.0])), torch.tensor([2.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: chunk_sparsification_loss(x, chunk_len=4), "the sequence has 6 tokens; expected a multiple of chunk_len 4: pad it to 8"),
        (lambda x: chunk_sparsification_loss(x, chunk_len=0), "chunk_len is 0; expected a whole number of at least 1"),
        (lambda x: activation_locality_loss(x, alpha=0.0), "alpha is 0.0; expected a finite number above 0"),
        (lambda x: activation_locality_loss(x, torch.zeros(1, 6).long()), r"doc_ids is \(1, 6\) torch.int64; expected integers \(2, 6\)"),
        (lambda x: activation_locality_loss(x, attention_mask=torch.ones(2, 6)), "attention_mask is .* torch.float32; expected integers"),
        (lambda x: chunk_sparsification_loss(x[0], chunk_len=2), r"expected \[batch, tokens, experts\]"),
    ],
)
def test_what_fits_no_loss_is_refused(run, message):
    with pytest.raises(ValueError, match=message):
        run(drawn(2, 6, 3))


# The factor


def factor_of(**words):
    return AdaptiveFactor(**{"start": 0.05, "stable_steps": 4, "adjust_every": 2} | words)


def test_a_falling_loss_never_raises_the_factor_and_a_constant_one_keeps_it():
    factor, before = factor_of(), 0.05
    for step in range(40):
        value = factor.step(1.0 * 0.97**step)
        assert value <= before
        before = value
    still = factor_of()
    assert {still.step(0.3) for _ in range(20)} == {0.05}


def test_the_smallest_rise_counts_as_the_least_factor():
    factor = factor_of(smooth=False)
    for loss in (0.3, 0.3, 0.3003):
        assert factor.step(loss) == 0.05
    assert factor.step(0.3003) == pytest.approx(0.05 * 1.025, rel=1e-12)  # the mean rose by 0.1 %


def test_a_new_value_is_reached_in_a_line_or_at_once():
    losses = [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    at_once, line = factor_of(smooth=False), factor_of()
    assert [at_once.step(loss) for loss in losses] == pytest.approx([0.05] * 3 + [0.025] * 4)
    assert [line.step(loss) for loss in losses] == pytest.approx([0.05] * 3 + [0.0375, 0.025, 0.025, 0.025])


@given(losses=st.lists(st.floats(0.01, 10), min_size=1, max_size=60))
@settings(max_examples=30, deadline=None)
def test_the_factor_stays_within_its_bound_and_goes_on_from_its_state(losses):
    factor, unbound = factor_of(), factor_of(max_factor=None, smooth=False)
    for place, loss in enumerate(losses):
        if place == len(losses) // 2:
            other = factor_of()
            other.load_state_dict(factor.state_dict())
            factor = other
        whole = factor.step(loss)
        unbound.step(loss)
        assert 0 < whole <= 4 * 0.05
    straight = factor_of()
    assert [straight.step(loss) for loss in losses][-1] == whole
    assert unbound.value > 0


def test_a_state_is_of_the_middle_of_an_interval_too():
    words = {"stable_steps": 8, "adjust_every": 4}
    straight, before, after = (factor_of(**words) for _ in range(3))
    losses = [0.9**step for step in range(20)]
    wanted = [straight.step(loss) for loss in losses]
    found = [before.step(loss) for loss in losses[:10]]
    assert len(set(wanted[8:12])) == 4  # on its way
    after.load_state_dict(before.state_dict())
    assert [*found, *(after.step(loss) for loss in losses[10:])] == wanted


@pytest.mark.parametrize("loss", [math.nan, 0.0, -0.1, math.inf])
def test_a_loss_that_is_none_is_refused_and_changes_nothing(loss):
    factor = factor_of()
    factor.step(0.3)
    before = factor.state_dict()
    with pytest.raises(ValueError, match="expected a finite number above 0"):
        factor.step(loss)
    assert factor.state_dict() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"start": -0.1}, "start is -0.1; expected a finite number above 0"),
        ({"stable_steps": 3}, "stable_steps is 3; expected a whole number of at least 4"),
        ({"stable_steps": 5}, "stable_steps is 5; expected a multiple of adjust_every, 2"),
        ({"max_factor": 0.5}, "max_factor is 0.5; expected a number of at least 1"),
    ],
)
def test_what_makes_no_factor_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        factor_of(**words)


def test_a_foreign_state_is_refused():
    factor = factor_of()
    with pytest.raises(ValueError, match="expected .*'from', 'losses', 'steps'"):
        factor.load_state_dict({"steps": 3})
    long = factor_of(stable_steps=8, adjust_every=4)
    for _ in range(8):
        long.step(0.3)
    with pytest.raises(ValueError, match="it is of another adjust_every"):
        factor.load_state_dict(long.state_dict())
