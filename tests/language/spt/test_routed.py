"""Routed networks against a loop over tokens and blocks, at their dense limit, and what they compute."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewer.language.spt.routed import RoutedFFN, RoutedGatedFFN, balance, map_of
from fewer.meters import count_flops

D, CHANNELS, RANK = 6, 16, 3


class Lora(nn.Module):
    """A linear map with LoRA as peft lays it out."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.active_adapters = ["default"]
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, base.out_features, bias=False)})


def make(form: str, *, lora: bool = True, bias: bool = True, blocks: int = 4, active: int = 2, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    wrap: Any = Lora if lora else lambda each: each
    into = [wrap(nn.Linear(D, CHANNELS, bias=bias)) for _ in range(1 if form == "opt" else 2)]
    down = wrap(nn.Linear(CHANNELS, D, bias=bias))
    kind: Any = RoutedFFN if form == "opt" else RoutedGatedFFN
    made = kind(*into, down, blocks, active).to(dtype)
    with torch.no_grad():
        made.router.linear.weight.mul_(4)
    return made


def loop(made: Any, x: Tensor) -> Tensor:
    """The equations, one token and one block at a time."""
    rows = []
    for row in x:
        p = (made.router.linear.weight @ row + made.router.linear.bias).sigmoid()
        active = sorted(range(made.blocks), key=lambda block: (-p[block].item(), block))[: made.router.active]
        down = map_of(made.down)
        y = torch.zeros(D, dtype=x.dtype)
        for block in active:
            part, c = slice(block * made.size, (block + 1) * made.size), 2 * p[block]

            def into(linear: nn.Module, row: Tensor = row, part: slice = part, c: Tensor = c) -> Tensor:
                weight, bias, a, b = map_of(linear)
                out = c * (weight[part] @ row + (0 if bias is None else bias[part]))
                return out if a is None or b is None else out + b[part] @ (a @ row)

            h = F.relu(into(made.up)) if isinstance(made, RoutedFFN) else F.silu(into(made.gate)) * into(made.up)
            y = y + c * (down.weight[:, part] @ h)
            if down.a is not None and down.b is not None:
                y = y + down.b @ (down.a[:, part] @ h)
        rows.append(y if down.bias is None else y + down.bias)
    return torch.stack(rows)


@pytest.mark.parametrize("form", ["opt", "llama"])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(("bias", "active"), [(True, 2), (False, 1), (True, 4)])
def test_a_routed_network_is_its_loop_with_all_gradients(form: str, lora: bool, bias: bool, active: int) -> None:
    made, x = make(form, lora=lora, bias=bias, active=active), torch.randn(9, D, dtype=torch.float64, requires_grad=True)
    out, expected = made(x), loop(made, x)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    weights = [x, *(each for each in made.parameters() if each.requires_grad)]
    ours, theirs = (torch.autograd.grad(each.square().sum(), weights, materialize_grads=True) for each in (out, expected))
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=0)


@pytest.mark.parametrize("form", ["opt", "llama"])
def test_with_all_blocks_and_an_even_router_it_is_the_dense_network(form: str) -> None:
    made, x = make(form, active=4), torch.randn(5, D, dtype=torch.float64)
    with torch.no_grad():
        made.router.linear.weight.zero_()
        made.router.linear.bias.zero_()

    def dense(linear: nn.Module, rows: Tensor, low: bool) -> Tensor:
        weight, bias, a, b = map_of(linear)
        out = F.linear(rows, weight, bias)
        return out + F.linear(F.linear(rows, a), b) if low and a is not None and b is not None else out

    def whole(low: bool) -> Tensor:
        h = F.relu(dense(made.up, x, low)) if form == "opt" else F.silu(dense(made.gate, x, low)) * dense(made.up, x, low)
        return dense(made.down, h, low)

    torch.testing.assert_close(made(x), whole(True), atol=1e-12, rtol=0)
    with torch.no_grad():
        for linear in made.modules():
            if isinstance(linear, Lora):
                linear.lora_B["default"].weight.zero_()  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(made(x), whole(False), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", ["opt", "llama"])
def test_the_router_s_gradient_is_that_of_differences_and_frozen_weights_have_none(form: str) -> None:
    made, x = make(form), torch.randn(4, D, dtype=torch.float64)
    made(x).square().sum().backward()
    weight = made.router.linear.weight
    assert weight.grad.abs().max() > 0
    for place in [(0, 0), (2, 3)]:
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight[place] += step
                values.append(made(x).square().sum().item())
                weight[place] -= step
        assert weight.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-6)
    assert all(map_of(each).weight.grad is None for each in made.modules() if isinstance(each, Lora))


@pytest.mark.parametrize("form", ["opt", "llama"])
def test_operations_are_the_active_share_and_no_token_passes_another_block(form: str) -> None:
    made, x = make(form, lora=False, dtype=torch.float32), torch.randn(11, D)
    with count_flops() as flops, torch.no_grad():
        made(x)
    products = 2 if form == "opt" else 3
    assert flops.total == 2 * products * D * CHANNELS * 11 // 2 + 2 * 11 * D * 4
    seen: list[Tensor] = []
    whole = made._hidden
    made._hidden = lambda rows, c, part, tokens, maps: (seen.append(tokens), whole(rows, c, part, tokens, maps))[1]
    made(x)
    _, active = made.router(x)
    assert all(torch.equal(tokens, active[:, block].nonzero().squeeze(1)) for block, tokens in enumerate(seen))


def test_blocks_without_tokens_have_zero_gradients() -> None:
    made = make("llama", lora=False, dtype=torch.float32)
    with torch.no_grad():
        made.router.linear.bias.copy_(torch.tensor([9.0, 9.0, -9.0, -9.0]))
        made.router.linear.weight.zero_()
    made(torch.randn(3, D)).sum().backward()
    assert made.up.weight.grad is not None
    assert made.up.weight.grad[:8].any()
    assert not made.up.weight.grad[8:].any()
    assert made.load.tolist() == [1, 1, 0, 0]


def test_an_even_load_has_a_balance_of_one() -> None:
    p = torch.full((8, 4), 0.5)
    even = torch.tensor([[True, True, False, False], [False, False, True, True]] * 4)
    assert balance(p, even).item() == pytest.approx(1)
    skewed = torch.tensor([0.9, 0.8, 0.1, 0.1]).repeat(8, 1).requires_grad_()
    loss = balance(skewed, even[:1].repeat(8, 1))
    assert loss.item() > 1.2
    assert torch.autograd.grad(loss, skewed)[0][0, 0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_copies_pickles_and_single_rows(dtype: torch.dtype) -> None:
    exact = make("llama", lora=False)
    made, x = copy.deepcopy(exact).to(dtype), torch.randn(1, D, dtype=torch.float64).to(dtype)
    if torch.equal(made.router(x)[1], exact.router(x.double())[1]):
        torch.testing.assert_close(made(x).double(), exact(x.double()), atol=8 * torch.finfo(dtype).eps, rtol=8 * torch.finfo(dtype).eps)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x), made(x))
    wide = torch.randn(D, 7).to(dtype).T
    torch.testing.assert_close(made(wide), made(wide.contiguous()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"blocks": 5}, "16 channels do not divide into 5 blocks"),
        ({"active": 5}, "active is 5 and there are 4 blocks"),
        ({"active": 0}, "active is 0"),
    ],
)
def test_what_does_not_fit_is_refused(words: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("opt", **words)


def test_of_equal_probabilities_the_first_blocks_are_active() -> None:
    made = make("llama")
    with torch.no_grad():
        made.router.linear.weight.zero_()
        made.router.linear.bias.zero_()
    made(torch.randn(3, D, dtype=torch.float64))
    assert made.load.tolist() == [1, 1, 0, 0]
