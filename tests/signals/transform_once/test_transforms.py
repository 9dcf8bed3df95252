"""Bases and transforms against scipy, and fields at other resolutions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import fft

from fewer.signals import dct, idct, spectral_resize, truncated_dct
from fewer.signals.transform_once import transforms
from fewer.signals.transform_once.transforms import basis_matrix


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("norm", ["ortho", "backward"])
@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (256,), (257,), (300,), (512,), (5, 8), (3, 260), (4, 3, 5)])
def test_it_is_scipys(shape, norm):
    x, dims = draw(2, *shape), tuple(range(1, 1 + len(shape)))
    np.testing.assert_allclose(dct(x, dims, norm), fft.dctn(x.numpy(), axes=dims, norm=norm), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(idct(x, dims, norm), fft.idctn(x.numpy(), axes=dims, norm=norm), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(idct(dct(x, dims, norm), dims, norm), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 9, 16, 31])
def test_products_and_ffts_agree_and_pass_gradients(n, monkeypatch):
    x = draw(2, n)
    by_matrix = dct(x, 1), idct(x, 1)
    monkeypatch.setattr(transforms, "MATRIX_MOST", 0)
    for one, other in zip((dct(x, 1), idct(x, 1)), by_matrix, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for transform in (dct, idct):
        assert torch.autograd.gradcheck(lambda x, t=transform: t(x, 1), draw(2, n).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [8, 300])
def test_half_precision_is_near(dtype, n):
    x = torch.randn(3, n).to(dtype)
    for transform in (dct, idct, lambda x, axis: spectral_resize(x, 2 * n)):
        found, exact = transform(x, 1), transform(x.double(), 1)
        assert found.dtype == dtype
        assert (found.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm()


def test_what_was_kept_in_inference_passes_gradients_later():
    basis_matrix.cache_clear()
    with torch.inference_mode():
        dct(torch.randn(2, 13), 1)
    dct(x := torch.randn(2, 13, requires_grad=True), 1).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("basis", ["dct", "fourier"])
@pytest.mark.parametrize("n", [1, 2, 5, 8, 1000])
def test_bases_are_orthonormal(basis, n):
    matrix = basis_matrix(basis, n, n, n)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("basis", ["dct", "fourier"])
def test_the_lowest_modes_are_those_of_the_whole(basis):
    x = draw(2, 3, 12, 20)
    whole = truncated_dct(x, (12, 20), basis)
    torch.testing.assert_close(truncated_dct(x, (5, 7), basis), whole[..., :5, :7], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.square().sum(), x.square().sum(), rtol=1e-12, atol=0)
    if basis == "dct":
        torch.testing.assert_close(whole, dct(x, (2, 3)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("old", "new"), [(8, 16), (7, 12), (8, 8), (9, 15)])
def test_a_periodic_field_keeps_its_waves(old, new):
    def waves(n):
        x = torch.arange(n, dtype=torch.float64) / n
        return 1 + torch.cos(2 * math.pi * x)[:, None] * torch.sin(2 * math.pi * 3 * x)

    torch.testing.assert_close(spectral_resize(waves(old), (new, new)), waves(new), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(spectral_resize(waves(new), (old, old)), waves(old), rtol=1e-12, atol=1e-12)


def test_the_fastest_wave_of_an_even_length_stands_for_two():
    fastest = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    finer = spectral_resize(fastest, 16)
    torch.testing.assert_close(finer[::2], fastest, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(spectral_resize(finer, 8), fastest, rtol=1e-12, atol=1e-12)
