"""The Hadamard rotation against SciPy's matrix, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import hadamard as matrix

from fewer.lowbit import crest_factor, hadamard


@pytest.mark.parametrize("n", [1, 2, 16, 32, 64, 128, 512])
def test_it_is_scipys_matrix_and_its_own_inverse(n):
    draw = torch.Generator().manual_seed(n)
    x = torch.randn(5, 2 * n, generator=draw)
    h = torch.from_numpy(matrix(n) / math.sqrt(n)).float()
    turned = hadamard(x, n)
    torch.testing.assert_close(turned.view(5, 2, n), x.view(5, 2, n) @ h, rtol=1e-5, atol=1e-6 * math.sqrt(n))
    torch.testing.assert_close(hadamard(turned, n), x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(turned.norm(), x.norm())
    for signs in (torch.randint(0, 2, (n,), generator=draw) * 2 - 1, torch.randint(0, 2, (2 * n,), generator=draw) * 2 - 1):
        signed = hadamard(x, n, signs=signs)
        torch.testing.assert_close(signed, hadamard(x * signs.repeat(2 * n // len(signs)), n))
        torch.testing.assert_close(hadamard(signed, n, signs=signs, inverse=True), x, rtol=1e-5, atol=1e-5)


def test_both_operands_turned_make_the_same_product():
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(7, 96, generator=draw), torch.randn(11, 96, generator=draw)
    signs = torch.randint(0, 2, (96,), generator=draw) * 2 - 1
    product = x @ w.T
    turned = hadamard(x, 32, signs=signs) @ hadamard(w, 32, signs=signs).T
    assert (turned - product).norm() <= 1e-5 * product.norm()
    torch.testing.assert_close(hadamard(x.T, 32, dim=0), hadamard(x, 32).T)


def test_an_outlier_is_spread_and_equal_entries_gather():
    one_hot = torch.zeros(1, 32)
    one_hot[0, 3] = 5.0
    assert crest_factor(one_hot, 32).item() == pytest.approx(math.sqrt(32))
    assert crest_factor(hadamard(one_hot, 32), 32).item() == pytest.approx(1)
    assert crest_factor(hadamard(torch.ones(1, 32), 32), 32).item() == pytest.approx(math.sqrt(32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_gradients_and_empty_input(dtype):
    x = torch.randn(3, 64).to(dtype)
    assert hadamard(x, 64).dtype == dtype
    torch.testing.assert_close(hadamard(x, 64), hadamard(x.float(), 64).to(dtype), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6)
    assert hadamard(x[:0], 16).shape == (0, 64)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(hadamard(x, 16).square().sum(), x)
    torch.testing.assert_close(grad, 2 * x.detach(), rtol=0.02 if dtype.itemsize == 2 else 1e-6, atol=0.02 if dtype.itemsize == 2 else 1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"n": 12}, "n is 12 and dimension -1 has length 96; expected a power of two that divides it"),
        ({"n": 64}, "n is 64 and dimension -1 has length 96"),
        ({"n": 0}, "n is 0"),
        ({"n": 32, "dim": 2}, "dim is 2 and x has 2 dimensions"),
        ({"n": 32, "signs": torch.ones(5)}, r"signs have shape \(5,\); expected \(32,\) or \(96,\)"),
    ],
)
def test_what_is_refused(words, message):
    with pytest.raises(ValueError, match=message.replace("(5,)", "(5,)")):
        hadamard(torch.ones(2, 96), **words)
