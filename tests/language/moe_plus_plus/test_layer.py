"""The layer against its equations, one token and one expert at a time, and against Mixtral's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_plus_plus_models import INNER, D, ffn, forced, loop, make
from torch import Tensor

from fewer.language.moe_plus_plus.layer import MoEPlusPlus
from fewer.meters import count_flops


def only(expert: int, layer: MoEPlusPlus, tokens: int) -> Tensor:
    """Logits that select one expert for every token, with a softmax that is not 1."""
    logits = torch.zeros(tokens, layer.num_experts, dtype=torch.float64)
    logits[:, expert] = 3.0
    return logits


def test_a_zero_expert_alone_gives_exactly_nothing() -> None:
    layer = forced(make(top_k=1)).eval()
    out = layer(torch.randn(5, D, dtype=torch.float64), only(layer.num_experts - 1, layer, 5))
    assert torch.equal(out.hidden_states, torch.zeros(5, D, dtype=torch.float64))


def test_a_copy_expert_alone_gives_p_x() -> None:
    layer, x = forced(make(top_k=1)).eval(), torch.randn(5, D, dtype=torch.float64)
    logits = only(6, layer, 5)
    torch.testing.assert_close(layer(x, logits).hidden_states, logits.softmax(-1)[:, 6:7] * x, atol=1e-12, rtol=0)


def test_a_constant_expert_alone_mixes_its_vector_with_x() -> None:
    layer, x = forced(make(top_k=1)).eval(), torch.randn(5, D, dtype=torch.float64)
    assert layer.constants is not None
    for c in range(2):
        logits = only(4 + c, layer, 5)
        a = (x @ layer.constants.wg[c].T).softmax(-1)
        expected = logits.softmax(-1)[:, 4 + c, None] * (a[:, :1] * x + a[:, 1:] * layer.constants.constant[c])
        torch.testing.assert_close(layer(x, logits).hidden_states, expected, atol=1e-12, rtol=0)


def test_a_feed_forward_expert_alone_is_swiglu() -> None:
    layer, x = forced(make(top_k=1)).eval(), torch.randn(3, D, dtype=torch.float64)
    logits = only(2, layer, 3)
    expected = torch.stack([logits.softmax(-1)[0, 2] * ffn(layer, 2, row) for row in x])
    torch.testing.assert_close(layer(x, logits).hidden_states, expected, atol=1e-12, rtol=0)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    gating=st.sampled_from(["paper", "renorm", "released"]),
    factor=st.sampled_from([None, 0.5, 1.1]),
    priority=st.sampled_from(["position", "score"]),
    base=st.sampled_from(["assignments", "tokens"]),
    router=st.sampled_from(["linear", "mlp"]),
    kinds=st.sampled_from([(1, 1, 2), (0, 0, 0), (2, 0, 1), (0, 1, 0), (1, 0, 0)]),
    training=st.booleans(),
)
def test_the_layer_equals_a_loop_over_tokens_and_experts(
    seed: int, gating: Any, factor: float | None, priority: Any, base: Any, router: Any, kinds: tuple[int, int, int], training: bool
) -> None:
    zero, copies, constant = kinds
    layer = make(
        seed, num_zero=zero, num_copy=copies, num_constant=constant, gating=gating, capacity_factor=factor, capacity_priority=priority,
        capacity_base=base, router=router,
    ).train(training)  # fmt: skip
    x = torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    residual, mask = torch.randn(9, layer.num_experts, dtype=torch.float64), torch.rand(9) < 0.8
    out = layer(x, residual, mask)
    expected = loop(layer, x, residual, mask)
    torch.testing.assert_close(out.hidden_states, expected, atol=1e-10, rtol=0)
    weight = torch.randn(9, D, dtype=torch.float64)
    ours = torch.autograd.grad((out.hidden_states * weight).sum(), [x, layer.experts.up_proj, *layer.router.wg.parameters()])
    theirs = torch.autograd.grad(
        (expected * weight).sum(), [x, layer.experts.up_proj, *layer.router.wg.parameters()], materialize_grads=True
    )
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


def mixtral(layer: MoEPlusPlus) -> Any:
    """transformers' block with the layer's weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=layer.hidden_size, intermediate_size=layer.experts.down_proj.shape[-1], num_local_experts=layer.num_ffn,
        num_experts_per_tok=layer.top_k,
    )  # fmt: skip
    config._experts_implementation = "eager"
    block: Any = MixtralSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(next(layer.router.wg.parameters()))
        block.experts.gate_up_proj.copy_(layer.experts.up_proj)
        block.experts.down_proj.copy_(layer.experts.down_proj)
    return block


def test_without_free_experts_it_is_mixtral() -> None:
    layer = make(
        dtype=torch.float32, num_zero=0, num_copy=0, num_constant=0, num_ffn_experts=8, gating="renorm", gate_residual=False
    ).eval()
    block, x = mixtral(layer).eval(), torch.randn(4, 16, D)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = layer(ours), block(theirs)
    torch.testing.assert_close(out.hidden_states, expected, atol=1e-5, rtol=0)
    from fewer.language.moe_plus_plus.router import select

    assert torch.equal(select(out.router_logits, 2), block.gate(x)[2])
    out.hidden_states.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.experts.up_proj.grad, block.experts.gate_up_proj.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.experts.down_proj.grad, block.experts.down_proj.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(next(layer.router.wg.parameters()).grad, block.gate.weight.grad, atol=1e-5, rtol=1e-5)


def test_a_large_capacity_changes_nothing() -> None:
    layer, x = make(dtype=torch.float32, capacity_factor=1e3).train(), torch.randn(40, D)
    with_room = layer(x)
    layer.capacity_factor = None
    assert torch.equal(with_room.hidden_states, layer(x).hidden_states)


def test_capacity_is_for_training_alone() -> None:
    layer, x = make(capacity_factor=0.3).eval(), torch.randn(40, D, dtype=torch.float64)
    assert layer(x).stats.drop_rate == 0
    assert layer.train()(x).stats.drop_rate > 0.3


def test_the_input_is_left_as_it_was() -> None:
    x = torch.randn(2, 6, D, dtype=torch.float64)
    before = x.clone()
    for gating in ("paper", "renorm", "released"):
        make(gating=gating)(x)
    assert torch.equal(x, before)


def test_gradients_pass_gradcheck_through_every_weight() -> None:
    layer = MoEPlusPlus(4, 3, num_ffn_experts=2, num_constant=1).double().eval()
    x, residual = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, layer.num_experts, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    values = tuple(parameter.detach().clone().requires_grad_() for parameter in layer.parameters())

    def run(*weights: Tensor) -> Tensor:
        given = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(layer, given, (x, residual)).hidden_states

    assert torch.autograd.gradcheck(run, values, atol=1e-6)


def test_experts_without_tokens_get_zero_gradients() -> None:
    layer = forced(make(top_k=1))
    layer(torch.randn(3, D, dtype=torch.float64), only(7, layer, 3)).hidden_states.sum().backward()
    for weight in layer.experts.parameters():
        assert weight.grad is not None
        assert not weight.grad.any()


def test_grouped_products_give_what_a_loop_gives() -> None:
    layer, rows = make(dtype=torch.float32), torch.randn(16, D, requires_grad=True)
    counts, weights = [5, 2, 6, 3], list(layer.experts.parameters())
    one, two = layer.experts(rows, counts), layer.experts.grouped(rows, counts)
    torch.testing.assert_close(one, two)
    for each, other in zip(*(torch.autograd.grad(out.square().sum(), [rows, *weights]) for out in (one, two)), strict=True):
        torch.testing.assert_close(each, other)


def test_operations_are_those_of_the_executed_assignments() -> None:
    layer = make(dtype=torch.float32, num_ffn_experts=4, gate_residual=True).eval()
    x, tokens = torch.randn(30, D), 30
    with count_flops() as flops, torch.no_grad():
        out = layer(x, torch.randn(tokens, layer.num_experts))
    n = layer.num_experts
    ffn_part = 6 * D * INNER * int(out.stats.executed[: layer.num_ffn].sum())
    free = 6 * D * layer.num_constant * tokens  # W_c x and B V
    assert flops.total == ffn_part + free + 2 * n * (D + n) * tokens
    assert 0 < out.stats.ffn_after < 2
    with count_flops() as first, torch.no_grad():  # a first layer has no map for logits before it
        layer(x)
    assert first.total - 6 * D * INNER * int(layer(x).stats.executed[: layer.num_ffn].sum()) == free + 2 * n * D * tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_is_right_to_its_precision(dtype: torch.dtype) -> None:
    given = make(dtype=torch.float32).eval()
    layer, exact = copy.deepcopy(given).to(dtype), given.double()
    x = torch.randn(2, 8, D).to(dtype)
    assert next(layer.router.parameters()).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out, expected = layer(x), exact(x.double())
    assert out.hidden_states.dtype == dtype
    torch.testing.assert_close(out.hidden_states.double(), expected.hidden_states, atol=20 * torch.finfo(dtype).eps, rtol=0)


def test_the_router_is_float32_under_autocast() -> None:
    layer, x = make(dtype=torch.float32).eval(), torch.randn(4096, D).bfloat16()
    from fewer.language.moe_plus_plus.router import select

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert torch.equal(select(out.router_logits, 2), select(layer.router(x.float(), None), 2))
    assert out.hidden_states.dtype == torch.bfloat16


def test_copies_pickles_and_state_dicts_give_the_same() -> None:
    layer, x = make(dtype=torch.float32).eval(), torch.randn(1, 1, D)
    other = make(seed=1, dtype=torch.float32).eval()
    other.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        assert torch.equal(twin(x).hidden_states, layer(x).hidden_states)
    strided = torch.randn(D, 7).T
    torch.testing.assert_close(layer(strided).hidden_states, layer(strided.contiguous()).hidden_states)


def test_a_masked_batch_gives_zeros() -> None:
    layer = make()
    out = layer(torch.randn(2, 3, D, dtype=torch.float64), token_mask=torch.zeros(2, 3))
    assert not out.hidden_states.any()
    assert out.aux_loss.item() == 0
    out.aux_loss.backward()
    assert out.stats.tokens == 0
    assert out.stats.drop_rate == 1 - 0 / 1


BAD: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 0}, "top_k is 0"),
    ({"top_k": 9}, "top_k is 9 and there are 8 experts"),
    ({"tau": 0.0}, "tau is 0.0; expected a number above 0 and at most 1"),
    ({"tau": 1.5}, "tau is 1.5"),
    ({"capacity_factor": 0.0}, "capacity_factor is 0.0; expected a finite number above 0"),
    ({"num_copy": -1}, "num_copy is -1; expected a whole number of at least 0"),
    ({"num_ffn_experts": 0}, "num_ffn_experts is 0; expected a whole number of at least 1"),
    ({"gating": "softmax"}, "gating is 'softmax'; expected one of paper, renorm, released"),
    ({"router": "deep"}, "router is 'deep'; expected one of linear, mlp"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_numbers_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**words)


def test_bad_inputs_are_refused() -> None:
    layer, x = make(layer_idx=3), torch.randn(4, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"hidden_states are \(4, 11\); expected \[\.\.\., 12\]"):
        layer(x[:, 1:])
    with pytest.raises(ValueError, match=r"gate_residual is \(3, 8\) on cpu; expected the logits \[4, 8\]"):
        layer(x, torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"token_mask is \(5,\) and there are 4 tokens"):
        layer(x, token_mask=torch.ones(5))
    with pytest.raises(ValueError, match="router logits of layer 3 are not finite"):
        layer(x * float("nan"))
    with pytest.raises(ValueError, match="gate_residual is"):
        layer(x, torch.zeros(4, 8, device="meta"))
