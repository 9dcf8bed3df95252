"""Labels by brute force, the loss by its formula, gradients where they belong, and what tuning changes."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from factor_models import IDS, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fewer.language.factor_llm.adaptation import AdaptConfig, adapt
from fewer.language.factor_llm.factorization import factorize, unfactorize
from fewer.language.factor_llm.loss import (
    FactorLoss,
    balance_term,
    experts_of,
    individual_labels,
    oracle,
    prior_approximate_loss,
    subset_labels,
)

TEXT = torch.randint(3, 40, (600,), generator=torch.Generator().manual_seed(2))


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), experts=st.integers(2, 6), tokens=st.integers(1, 5), data=st.data())
def test_labels_are_those_of_a_loop(seed: int, experts: int, tokens: int, data: Any) -> None:
    top_k = data.draw(st.integers(1, experts))
    draw = torch.Generator().manual_seed(seed)
    outputs, dense = (
        torch.randn(experts, tokens, 7, generator=draw, dtype=torch.float64),
        torch.randn(tokens, 7, generator=draw, dtype=torch.float64),
    )
    single, subset = individual_labels(outputs, dense, top_k), subset_labels(outputs, dense, top_k)

    def error(chosen: tuple[int, ...], token: int) -> float:
        return (experts / top_k * sum(outputs[each, token] for each in chosen) - dense[token]).square().sum().item()  # pyright: ignore[reportAttributeAccessIssue]

    for token in range(tokens):
        distance = [(outputs[each, token] - top_k / experts * dense[token]).square().mean().item() for each in range(experts)]
        nearest = sorted(range(experts), key=lambda each: distance[each])[:top_k]
        assert single[token].nonzero().flatten().tolist() == sorted(nearest)
        best = min(itertools.combinations(range(experts), top_k), key=lambda chosen: error(chosen, token))
        assert tuple(subset[token].nonzero().flatten().tolist()) == best
        assert error(best, token) <= error(tuple(nearest), token) + 1e-9


def test_the_loss_is_that_of_its_formula() -> None:
    marked = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)).argsort(-1) < 2
    logits = torch.randn(6, 5, dtype=torch.float64)
    t = marked.double()
    assert prior_approximate_loss(t + 3.7, marked).item() == pytest.approx(0, abs=1e-12)
    expected = F.kl_div(t.softmax(-1).log(), logits.softmax(-1), reduction="sum") / 6
    assert prior_approximate_loss(logits, marked).item() == pytest.approx(expected.item(), abs=1e-9)
    assert prior_approximate_loss(logits, marked, "ce").item() == pytest.approx(F.cross_entropy(logits, t / 2).item(), abs=1e-9)
    uniform = prior_approximate_loss(torch.zeros(3, 4), torch.tensor([[True, True, False, False]] * 3)).item()
    assert uniform == pytest.approx(math.log((2 * math.e + 2) / 4) - 0.5, abs=1e-5)
    assert prior_approximate_loss(torch.tensor([[1e4, -1e4]]), torch.tensor([[True, False]])).isfinite()


def test_the_auxiliary_term_is_the_released_one() -> None:
    logits = torch.randn(5, 4)
    p = logits.softmax(-1)
    expected = sum(p[row, each].item() for row in range(5) for each in logits[row].topk(2).indices) / 20
    assert balance_term(logits, 2).item() == pytest.approx(expected, abs=1e-6)


def test_each_loss_reaches_its_own_weights_and_no_others() -> None:
    model = factorize(make(), 4, 2).train()
    model(IDS, labels=IDS).loss.backward()
    for mlp in experts_of(model):
        assert mlp.router.weight.grad is None
        assert mlp.gate_up.grad is not None
        assert mlp.gate_up.grad.any()
    model.zero_grad(set_to_none=True)
    with FactorLoss(model) as loss_of:
        teachers = [each.gate_up.clone() for each in loss_of.teachers]
        model(IDS, labels=IDS)
        loss_of.router_losses()[0].backward()
        touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert touched == {f"model.layers.{number}.mlp.router.{part}" for number in range(3) for part in ("weight", "bias")}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model(IDS, labels=IDS)).backward()
            optimizer.step()
        assert all(torch.equal(one, two.gate_up) for one, two in zip(teachers, loss_of.teachers, strict=True))
        assert not torch.equal(loss_of.teachers[0].gate_up, experts_of(model)[0].gate_up)
    assert experts_of(model)[0].last_pa_loss is not None


def test_padding_has_no_label() -> None:
    model = factorize(make(), 4, 2).train()
    padded = torch.cat([torch.zeros_like(IDS), IDS], 1)
    mask = torch.cat([torch.zeros_like(IDS), torch.ones_like(IDS)], 1)
    with FactorLoss(model) as loss_of:
        model(IDS, labels=IDS)
        alone = loss_of.router_losses()[0]
        model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0))
        torch.testing.assert_close(loss_of.router_losses(mask)[0], alone, atol=1e-5, rtol=1e-5)
        model(padded, attention_mask=mask)
        assert loss_of.router_losses(torch.zeros_like(mask))[0].item() == 0


def test_a_teacher_s_inputs_are_the_dense_model_s() -> None:
    dense = make()
    seen: list[Tensor] = []
    dense.model.layers[2].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    dense(IDS)
    model = factorize(make(), 4, 2).train()
    with FactorLoss(model, par_input="teacher") as loss_of:
        model(IDS, labels=IDS)
        assert not torch.allclose(loss_of.inputs[2], seen[0], atol=1e-3)
        loss_of._dense_inputs()
        torch.testing.assert_close(loss_of.inputs[2], seen[0], atol=1e-5, rtol=1e-5)
        assert [mlp.top_k for mlp in experts_of(model)] == [2, 2, 2]


def test_an_oracle_sends_tokens_where_the_labels_say_and_leaves_no_trace() -> None:
    model = factorize(make(), 4, 2)
    mlp, x = experts_of(model)[1], torch.randn(9, 16)
    outputs = torch.stack([mlp.expert(number, x) for number in range(4)])
    expected = individual_labels(outputs, outputs.sum(0), 2)
    with oracle(model, "individual"):
        assert torch.equal(mlp.route(x), expected.nonzero()[:, 1].reshape(9, 2))
    assert "route" not in vars(mlp)


def test_routers_alone_leave_every_weight_and_both_phases_lower_their_loss() -> None:
    dense = make()
    model = factorize(make(), 4, 2)
    frozen = model.model.embed_tokens.weight.clone()
    config = AdaptConfig(lr=3e-3, batch=4, window=16, warm_up=2, router_steps=12)
    done = adapt(model, TEXT, 12, config)
    assert done.router_losses[-1] < done.router_losses[0]
    assert done.losses == []
    assert done.tokens == 12 * 64
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    done = adapt(model, TEXT, 20, AdaptConfig(lr=3e-3, batch=4, window=16, warm_up=2, router_steps=0))
    assert sum(done.losses[-4:]) < sum(done.losses[:4])
    assert torch.equal(model.model.embed_tokens.weight, frozen)
    assert not torch.equal(unfactorize(model).model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight)


def test_a_data_set_of_rows_is_taken_as_well_and_its_padding_left_out() -> None:
    rows = [{"input_ids": row.tolist(), "attention_mask": [0, 0] + [1] * 9} for row in IDS]
    done = adapt(factorize(make(), 4, 2), rows, 6, lr=1e-3, router_steps=2, batch=2)
    assert (len(done.router_losses), len(done.losses), done.tokens) == (2, 4, 6 * 2 * 9)


def test_untouched_weights_come_back_after_routers_were_trained() -> None:
    dense, model = make(), factorize(make(), 4, 2)
    adapt(model, TEXT, 3, AdaptConfig(batch=2, window=16, router_steps=3))
    plain = unfactorize(model)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in dense.state_dict().items())


def test_what_cannot_be_is_refused() -> None:
    model = factorize(make(intermediate_size=36), 9, 2)
    with pytest.raises(ValueError, match="label is 'subset' and there are 9 experts; expected at most 8"):
        FactorLoss(model, label="subset")
    with pytest.raises(ValueError, match="pa_weight is -1"):
        FactorLoss(model, pa_weight=-1)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts"):
        FactorLoss(make())
    with FactorLoss(model) as loss_of, pytest.raises(ValueError, match="no pass in training mode went before"):
        loss_of(model(IDS, labels=IDS))
    with pytest.raises(ValueError, match="the text has 4 tokens; expected at least 1024"):
        adapt(model, TEXT[:4], 3)
    with pytest.raises(ValueError, match="window is 512 and the model reads 64 tokens"):
        adapt(factorize(make(max_position_embeddings=64)), TEXT, 3, AdaptConfig(window=512))
    with pytest.raises(ValueError, match="the data set has no rows"):
        adapt(factorize(make()), [], 3)
    with pytest.raises(ValueError, match="window is 11 and the model reads 8 tokens"):
        adapt(factorize(make(max_position_embeddings=8)), [{"input_ids": row.tolist()} for row in IDS], 3)
    with pytest.raises(ValueError, match="expected router_steps=0"):
        AdaptConfig(pa_weight=0.0)
