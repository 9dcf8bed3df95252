"""Half precision: what comes out is right to the precision of what went in; sums and states are float32 or better."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fewer.optimization import MFAC, InverseFisher, SlidingInverseFisher, obs_scores, prune_module

HALVES = [torch.float16, torch.bfloat16]
DAMPING = 1e-5  # 1 / DAMPING is beyond float16


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("method", ["cholesky", "recursion"])
@pytest.mark.parametrize("block_size", [None, 3])
def test_the_inverse_of_half_precision_gradients_is_that_of_the_same_numbers(dtype, method, block_size):
    grads, x = draw(4, 6).to(dtype), draw(6).to(dtype)
    half = InverseFisher(grads, DAMPING, block_size=block_size, method=method)
    exact = InverseFisher(grads.double(), DAMPING, block_size=block_size)
    largest = float(exact.diagonal().max())
    torch.testing.assert_close(half.diagonal().double(), exact.diagonal(), rtol=1e-3, atol=1e-2 * largest)
    torch.testing.assert_close((half @ x).double(), exact @ x.double(), rtol=1e-3, atol=1e-2 * largest)
    assert half.element(0, 1) == pytest.approx(exact.element(0, 1), rel=1e-3, abs=1e-2 * largest)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_window_gives_products_that_half_precision_could_not_hold(dtype):
    grads, x = draw(3, 8).to(dtype), draw(8).to(dtype)
    window = SlidingInverseFisher(3, 8, DAMPING, storage_dtype=dtype)
    for g in grads[:2]:
        window.push(g)
    applied = window.push_and_apply(grads[2])
    exact = InverseFisher(grads.double(), DAMPING)
    torch.testing.assert_close((window @ x).double(), exact @ x.double(), rtol=1e-5, atol=1e-5 / DAMPING)
    torch.testing.assert_close(applied.double(), exact @ grads[2].double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 1e-2}])
def test_half_precision_weights_move_as_float32_ones_to_their_own_precision(dtype, options):
    start, gradients = draw(5), draw(6, 5).to(dtype)  # the window is not full: its inverse is 1 / damping in most directions

    def run(dtype: torch.dtype) -> torch.Tensor:
        w = nn.Parameter(start.to(dtype))
        optimizer = MFAC([w], lr=1e-7, window=64, damping=1e-6, **options)
        for g in gradients:
            w.grad = g.to(dtype)
            optimizer.step()
        assert all(state["momentum_buffer"].dtype == torch.float32 for state in optimizer.state.values())
        return w.detach().float()

    torch.testing.assert_close(run(dtype), run(torch.float32), rtol=0, atol=8 * float(start.abs().max()) * torch.finfo(dtype).eps)


def test_a_half_precision_state_in_the_middle_continues_bit_for_bit(tmp_path):
    def run(interrupt: bool) -> torch.Tensor:
        w = nn.Parameter(draw(5).half())
        optimizer = MFAC([w], lr=1e-3, window=4, damping=1e-2, momentum=0.9)
        for step, g in enumerate(draw(9, 5).half()):
            if interrupt and step == 5:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                optimizer = MFAC([w], lr=1.0, window=4, damping=1e-2, momentum=0.9)
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            w.grad = g
            optimizer.step()
        return w.detach()

    assert torch.equal(run(interrupt=True), run(interrupt=False))


def classes_and_net() -> tuple[torch.Tensor, torch.Tensor, nn.Module]:
    """A network that has learnt to tell four clouds apart."""
    torch.manual_seed(0)
    y = torch.arange(400) % 4
    x = 2.0 * torch.eye(4).repeat(1, 4)[y] + torch.randn(400, 16)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return x, y, net


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("update", ["independent", "joint"])
def test_pruning_in_half_precision_costs_no_more_than_in_float32(dtype, update):
    x, y, net = classes_and_net()

    def accuracy_after(dtype: torch.dtype) -> float:
        pruned = copy.deepcopy(net).to(dtype)
        batches = [(x[i : i + 2].to(dtype), y[i : i + 2]) for i in range(0, 256, 2)]
        report = prune_module(pruned, nn.functional.cross_entropy, batches, 0.6, num_grads=128, update=update)
        assert torch.isfinite(torch.tensor(report.loss_increase))
        assert all(parameter.dtype == dtype for parameter in pruned.parameters())
        return float((pruned(x.to(dtype)).argmax(1) == y).float().mean())

    assert accuracy_after(dtype) >= accuracy_after(torch.float32) - 0.03


def test_scores_of_half_precision_weights_order_them_as_float32_does():
    _, _, net = classes_and_net()
    grads = draw(20, 640)
    scores = {dtype: obs_scores(net.to(dtype), grads.to(dtype), DAMPING, None)["0.weight"] for dtype in (torch.float32, torch.float16)}
    assert bool((scores[torch.float16] > 0).all())
    order = [scores[dtype].flatten().argsort().argsort().float() for dtype in scores]
    assert float(torch.corrcoef(torch.stack(order))[0, 1]) > 0.999
