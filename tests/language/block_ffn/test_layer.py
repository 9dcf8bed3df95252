"""The layer: all ways of multiplying are one function, only active experts are read, the router is what the paper says."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fewer.language import BlockFFN

KERNELS = ("dense", "sparse", "union", "auto")


def layer_of(dtype=torch.float64, hidden=12, experts=7, size=5, seed=0, **words):
    torch.manual_seed(seed)
    layer = BlockFFN(hidden, experts, size, **words).to(dtype)
    layer.reset_parameters(0.5)
    return layer


def tokens_of(count, layer, seed=1):
    return torch.randn(count, layer.hidden_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(layer.up_proj.dtype)


def by_definition(layer, x):
    """sum_i A_i W_down_i SiLU(W_up_i x), expert by expert and token by token."""
    y = torch.zeros_like(x)
    for token, row in enumerate(x):
        a1 = (layer.router_proj.weight @ row).clamp(min=0)
        a = layer.router_norm.weight * a1 / ((a1 * a1).mean() + layer.router_norm.eps).sqrt()
        for expert in range(layer.num_experts):
            place = slice(expert * layer.expert_size, (expert + 1) * layer.expert_size)
            y[token] += a[expert] * layer.down_proj[:, place] @ F.silu(layer.up_proj[place] @ row)
    return y


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 2, 7, 32, 33])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("pattern", ["as it comes", "none active", "all active"])
def test_every_kernel_is_the_sum_over_experts(tokens, dtype, near, pattern):
    layer = layer_of(dtype)
    layer.router_norm.weight.uniform_(-1, 1)  # the sign of w does not decide who is active
    x = tokens_of(tokens, layer)
    if pattern != "as it comes":
        layer.router_proj.weight.copy_(layer.router_proj.weight.abs() * (1 if pattern == "all active" else -1))
        x = x.abs()
    wanted = by_definition(layer, x)
    for kernel in KERNELS:
        layer.kernel = kernel
        assert torch.allclose(layer(x), wanted, rtol=near, atol=near), kernel
    if pattern == "none active":
        assert not layer(x).any()


@given(tokens=st.integers(1, 9), experts=st.integers(1, 9), size=st.integers(1, 5), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_kernels_agree_for_any_sizes(tokens, experts, size, seed):
    layer = layer_of(hidden=6, experts=experts, size=size, seed=seed)
    x = tokens_of(tokens, layer, seed)
    logits = layer.router_proj(x)
    gates, active = layer.gates(logits), layer.active(logits)
    dense, *others = (layer.mix(x, gates, active, kernel) for kernel in ("dense", "sparse", "union"))
    assert all(torch.allclose(dense, other, atol=1e-10) for other in others)
    assert torch.equal(gates != 0, active)


def test_a_token_is_multiplied_row_by_row_unless_it_learns(monkeypatch):
    layer = layer_of(torch.float32, kernel="sparse")
    x = tokens_of(1, layer)
    wanted = by_definition(layer, x)
    wanted.sum().backward()
    expected = layer.up_proj.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.allclose(layer.up_proj.grad, expected, atol=1e-5)
    monkeypatch.setattr("fewer.language.block_ffn.layer.over_active_experts", None)
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with torch.no_grad():
            assert torch.allclose(layer(x), wanted, atol=1e-5)
    with pytest.raises(TypeError):
        layer(x)
    with torch.no_grad(), pytest.raises(TypeError):
        layer.to(torch.bfloat16)(x.bfloat16())


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sparse", "union"])
def test_the_weights_of_inactive_experts_are_never_read(kernel):
    layer = layer_of(kernel=kernel)
    x = tokens_of(3, layer)
    used = layer.active(layer.router_proj(x)).any(0)
    assert 0 < used.sum() < layer.num_experts
    before = layer(x)
    unread = ~used.repeat_interleave(layer.expert_size)
    layer.up_proj[unread] = torch.nan
    layer.down_proj[:, unread] = torch.nan
    assert torch.equal(layer(x), before)
    layer.kernel = "dense"
    assert layer(x).isnan().any()


@torch.no_grad()
def test_a_token_by_itself_reads_its_own_experts_alone():
    layer = layer_of(kernel="sparse")
    x = tokens_of(4, layer)
    active = layer.active(layer.router_proj(x))
    alone = layer(x)[:1]
    foreign = (~active[0]).repeat_interleave(layer.expert_size)
    layer.up_proj[foreign] = torch.nan
    assert torch.equal(layer(x)[:1], alone)


@torch.no_grad()
def test_auto_takes_the_union_where_few_large_experts_are_active():
    layer = BlockFFN(512, 16, 64)
    x = torch.randn(1, 512)
    few, many = torch.zeros(1, 16, dtype=torch.bool), torch.ones(1, 16, dtype=torch.bool)
    few[:, :8] = True
    assert (layer._quickest(x, few), layer._quickest(x, many)) == ("union", "dense")
    with torch.enable_grad():
        assert layer._quickest(x, few) == "dense"
    with torch.autocast("cpu", torch.bfloat16):
        assert layer._quickest(x, few) == "dense"
        assert layer(x).isfinite().all()
    tiny = BlockFFN(32, 16, 4)
    assert tiny._quickest(torch.randn(1, 32), few) == "dense"


def test_the_routers_scale_does_not_matter_and_its_norm_counts_every_expert():
    layer = layer_of(eps=1e-12)
    x = tokens_of(50, layer)
    gates = layer.gates(layer.router_proj(x))
    for factor in (0.1, 10.0):
        scaled = copy.deepcopy(layer)
        with torch.no_grad():
            scaled.router_proj.weight *= factor
        assert torch.allclose(scaled.gates(scaled.router_proj(x)), gates, atol=1e-8)
    square = gates.square().mean(-1)
    assert torch.allclose(square, torch.ones_like(square), atol=1e-8)
    assert (gates == 0).any(-1).all()  # zeros are in that mean


def test_a_token_without_experts_gives_zero_and_finite_gradients():
    layer = layer_of()
    x = tokens_of(3, layer).abs().requires_grad_()
    with torch.no_grad():
        layer.router_proj.weight.copy_(-layer.router_proj.weight.abs())
    y = layer(x)
    y.sum().backward()
    assert not y.any()
    assert all(each.grad is None or each.grad.isfinite().all() for each in (x, *layer.parameters()))


@pytest.mark.parametrize("kernel", ["dense", "sparse", "union"])
def test_gradients_are_right_away_from_the_routers_kink(kernel):
    layer = layer_of(hidden=4, experts=3, size=2, kernel=kernel)
    x = tokens_of(2, layer).requires_grad_()
    assert layer.router_proj(x).abs().min() > 1e-2
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(
        run, (x, *(each.detach().clone(memory_format=torch.preserve_format).requires_grad_() for each in values))
    )


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "near"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_is_right_to_its_own_rounding(dtype, near):
    exact, layer = layer_of(), layer_of().to(dtype)
    x = tokens_of(8, exact).to(dtype)
    for value, rounded in zip(exact.parameters(), layer.parameters(), strict=True):
        value.copy_(rounded)
    layer.router_proj.weight.copy_(exact.router_proj.weight)
    logits = layer.router_proj(x)
    gates, active = layer.gates(logits), layer.active(logits)  # the router is that of the evaluated dtype
    wanted = exact.mix(x.double(), gates.double(), active, "dense")
    for kernel in ("dense", "sparse", "union"):
        y = layer.mix(x, gates, active, kernel)
        assert y.dtype == dtype
        assert (y.double() - wanted).abs().max() < near * wanted.abs().max()


@torch.no_grad()
def test_copies_and_files_keep_the_layer_and_not_its_graph():
    layer = layer_of(torch.float32, kernel="union")
    layer.output_router_logits = True
    with torch.enable_grad():
        layer(tokens_of(2, layer))
    assert layer.router_logits.requires_grad
    x = tokens_of(3, layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.router_logits is None
        assert torch.equal(other(x), layer(x))
    fresh = layer_of(torch.float32, seed=5, kernel="union")
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert list(layer.state_dict()) == ["up_proj", "down_proj", "router_proj.weight", "router_norm.weight"]
    assert layer.down_proj.shape == (layer.hidden_size, layer.num_experts * layer.expert_size)


@torch.no_grad()
def test_weights_laid_out_otherwise_are_laid_out_again_once():
    layer = layer_of(kernel="union")
    x = tokens_of(2, layer)
    wanted = layer(x)
    layer.down_proj = torch.nn.Parameter(layer.down_proj.contiguous())  # as a file has them
    assert torch.equal(layer(x), wanted)
    place = layer.down_proj.data_ptr()
    layer(x)
    assert layer.down_proj.T.is_contiguous()
    assert layer.down_proj.data_ptr() == place


@torch.no_grad()
def test_any_shape_and_stride_goes_in():
    layer = layer_of(kernel="union")
    x = tokens_of(24, layer)
    flat = layer(x)
    assert torch.allclose(layer(x.view(2, 3, 4, -1)).view(24, -1), flat)
    wide = torch.empty(24, 2 * layer.hidden_size, dtype=x.dtype)
    wide[:, ::2] = x
    assert torch.allclose(layer(wide[:, ::2]), flat)
    assert layer(x[0]).shape == x[0].shape
    assert layer(x[:0]).shape == x[:0].shape
    layer.kernel = "sparse"
    assert layer(x[:0]).shape == x[:0].shape


@torch.no_grad()
def test_a_nan_is_carried_on():
    for kernel in KERNELS:
        layer = layer_of(kernel=kernel)
        x = tokens_of(2, layer)
        x[0, 0] = torch.nan
        assert layer(x)[0].isnan().all(), kernel


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num_experts": 0}, "num_experts is 0; expected a whole number of at least 1"),
        ({"expert_size": 0}, "expert_size is 0; expected a whole number of at least 1"),
        ({"hidden_size": 1.5}, "hidden_size is 1.5; expected a whole number"),
        ({"eps": 0.0}, "eps is 0.0; expected a finite number above 0"),
        ({"activation": "swish"}, "activation is 'swish'; expected one of silu"),
        ({"kernel": "unoin"}, "did you mean 'union'"),
        ({"kernel": "triton", "activation": "relu"}, "expected 'silu' with the triton kernel"),
    ],
)
def test_what_makes_no_layer_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        BlockFFN(**{"hidden_size": 4, "num_experts": 2, "expert_size": 2} | words)


def test_odd_input_and_odd_weights_are_refused():
    layer = layer_of()
    with pytest.raises(ValueError, match="expected a last dimension of 12"):
        layer(torch.zeros(2, 11, dtype=torch.float64))
    gated = layer.state_dict() | {"gate_proj": torch.zeros(35, 12)}
    with pytest.raises(ValueError, match="gate_proj, which is of gated experts"):
        layer.load_state_dict(gated)
    layer.kernel = "triton"
    with pytest.raises(RuntimeError, match="kernel is 'triton' and the weights are on cpu; expected a GPU"):
        layer(tokens_of(1, layer))
