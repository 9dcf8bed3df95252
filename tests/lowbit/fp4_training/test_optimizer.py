"""StableSPAM: AdamW on the normalised gradient where its guards are off, a written loop where they are on."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch

from fewer.lowbit.fp4_training import StableSPAM


def test_without_memory_it_is_adamw_on_the_normalised_gradient():
    g = torch.randn(5, 3, dtype=torch.float64)
    start = torch.randn(5, 3, dtype=torch.float64)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    words = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
    a = StableSPAM([ours], **words, gamma1=0.0, gamma2=0.0, theta=0.0, reset_every=0)
    b = torch.optim.AdamW([theirs], **words)
    for _ in range(30):
        ours.grad, theirs.grad = g.clone(), g / g.norm()
        a.step()
        b.step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def written(start, gradients, lr, betas, eps, decay, gamma1, gamma2, theta, every):
    """The algorithm in plain float64 numbers."""
    w = [float(each) for each in start]
    m, v, M, n1, n2, t = [0.0] * len(w), [0.0] * len(w), 0.0, 0.0, 0.0, 0
    for step, g in enumerate(gradients, 1):
        g = [float(each) for each in g]
        t += 1
        if step % every == 0:
            m, v, t = [0.0] * len(w), [0.0] * len(w), 1
        top = max(map(abs, g))
        M = theta * M + (1 - theta) * top
        limit = M / (1 - theta**t)
        g = [each * limit / top if abs(each) > limit else each for each in g]
        norm = math.sqrt(sum(each**2 for each in g))
        n1, n2 = gamma1 * n1 + (1 - gamma1) * norm, gamma2 * n2 + (1 - gamma2) * norm**2
        factor = n1 / (1 - gamma1**t) / (math.sqrt(n2 / (1 - gamma2**t)) + eps) / norm
        for i, each in enumerate(g):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * each * factor
            v[i] = betas[1] * v[i] + (1 - betas[1]) * (each * factor) ** 2
            w[i] = w[i] * (1 - lr * decay) - lr * (m[i] / (1 - betas[0] ** t)) / (math.sqrt(v[i] / (1 - betas[1] ** t)) + eps)
    return w


def test_fifty_steps_are_those_of_a_written_loop():
    start = torch.randn(7, dtype=torch.float64)
    gradients = [torch.randn(7, dtype=torch.float64) * (50 if step % 9 == 8 else 1) for step in range(50)]  # spikes
    ours = torch.nn.Parameter(start.clone())
    optimizer = StableSPAM([ours], lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, theta=0.9, reset_every=20)
    for g in gradients:
        ours.grad = g.clone()
        optimizer.step()
    expected = written(start, gradients, 3e-3, (0.9, 0.95), 1e-8, 0.1, 0.7, 0.9, 0.9, 20)
    assert torch.allclose(ours.data, torch.tensor(expected, dtype=torch.float64), rtol=1e-6)


def test_its_state_is_saved_and_taken_up():
    def run(optimizer, weight, steps):
        for g in steps:
            weight.grad = g.clone()
            optimizer.step()

    gradients = list(torch.randn(20, 4))
    one = torch.nn.Parameter(torch.zeros(4))
    whole = StableSPAM([one], reset_every=7)
    run(whole, one, gradients)
    other = torch.nn.Parameter(torch.zeros(4))
    first = StableSPAM([other], reset_every=7)
    run(first, other, gradients[:10])
    again = StableSPAM([other], reset_every=7)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    run(again, other, gradients[10:])
    assert torch.equal(one, other)


def test_it_takes_a_closure_zero_gradients_and_bfloat16():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = StableSPAM([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.float().square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert (weight < 1).all()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_keep_their_state_in_thirty_two_and_save_it_so(dtype):
    start, gradients = torch.randn(50), list(1e-3 + 1e-3 * torch.randn(60, 50))
    exact, coarse = torch.nn.Parameter(start.double()), torch.nn.Parameter(start.to(dtype))
    wide, narrow = StableSPAM([exact], lr=1e-2), StableSPAM([coarse], lr=1e-2)
    for i, g in enumerate(gradients):
        coarse.grad, exact.grad = g.to(dtype), g.to(dtype).double()
        wide.step()
        narrow.step()
        if i == 30:
            again = StableSPAM([coarse])
            again.load_state_dict(narrow.state_dict())
            narrow = again
    for name, value in narrow.state[coarse].items():
        if isinstance(value, torch.Tensor):
            assert torch.allclose(value.double(), wide.state[exact][name], rtol=1e-4, atol=1e-12), name
    assert (coarse.double() - exact).norm() < 0.2 * (exact - start).norm()


def test_an_empty_parameter_is_left():
    empty, full = torch.nn.Parameter(torch.zeros(0)), torch.nn.Parameter(torch.ones(2))
    empty.grad, full.grad = torch.zeros(0), torch.ones(2)
    StableSPAM([empty, full], lr=0.1).step()
    assert (full < 1).all()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"lr": -1}, "lr is -1"), ({"theta": 1.0}, "theta is 1.0; expected a number of at least 0 and below 1"),
        ({"gamma1": -0.1}, "gamma1 is -0.1"), ({"betas": (0.9, 2)}, "betas[1] is 2"), ({"reset_every": -1}, "reset_every is -1"),
    ],
)  # fmt: skip
def test_odd_numbers_are_told(words, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        StableSPAM([torch.nn.Parameter(torch.ones(1))], **words)


def test_a_sparse_gradient_is_refused():
    table = torch.nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient; expected a dense one"):
        StableSPAM(table.parameters()).step()
