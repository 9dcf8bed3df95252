"""The Monarch form of the DFT: order, signs, numbers, skipped frequencies, and what it multiplies."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch

from fewer.meters import counting
from fewer.signals.flash_fft_conv import make_plan, monarch_dft, monarch_idft
from fewer.signals.flash_fft_conv.monarch import (
    frequencies,
    kept_mask,
    kept_weights,
    multiplications,
    real_dft,
    real_idft,
    roots,
)
from fewer.signals.flash_fft_conv.plan import RELEASED, Constants, balanced, good_size, stage_seconds

FACTORS = [(8, 8), (4, 4, 4), (2, 8, 4), (16, 4), (3, 5, 7), (12,)]


@pytest.mark.parametrize("factors", FACTORS)
def test_each_entry_is_numpys_at_its_frequency_and_the_inverse_comes_back(factors):
    n = math.prod(factors)
    x = torch.randn(3, n, dtype=torch.float64)
    spectrum = monarch_dft(x, factors)
    assert spectrum.shape == (3, *factors)
    wanted = np.fft.fft(x.numpy())
    for place in np.ndindex(*factors):
        k = sum(each * math.prod(factors[:i]) for i, each in enumerate(place))
        np.testing.assert_allclose(spectrum[:, *place].numpy(), wanted[:, k], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(monarch_idft(spectrum, factors), x.to(torch.complex128), rtol=0, atol=1e-13)


@pytest.mark.parametrize("length", [1, 20, 32, 33, 64])
def test_rows_of_zeros_are_not_multiplied(length):
    x, factors = torch.randn(2, length, dtype=torch.float64), (8, 8)
    padded = torch.nn.functional.pad(x, (0, 64 - length))
    with counting() as short:
        spectrum = monarch_dft(x, factors)
    with counting() as whole:
        torch.testing.assert_close(spectrum, monarch_dft(padded, factors), rtol=1e-12, atol=1e-12)
    rows = -(-length // 8)
    assert whole["multiplications"] - short["multiplications"] == 2 * 64 * (8 - rows)
    with counting() as back:
        torch.testing.assert_close(monarch_idft(spectrum, factors, length).real, x, rtol=0, atol=1e-13)
    assert back["multiplications"] == short["multiplications"]


@pytest.mark.parametrize(("factors", "keep"), [((8, 8), (5, 3)), ((4, 4, 4), (3, 2, 2)), ((4, 4, 4), (2,)), ((8, 8), (8, 8))])
def test_kept_entries_are_those_of_the_whole_and_the_products_those_of_the_formula(factors, keep):
    n, x = math.prod(factors), torch.randn(3, 64, dtype=torch.float64)
    with counting() as counted:
        spectrum = monarch_dft(x, factors, keep)
        monarch_idft(spectrum, factors)
    kept = (*keep, *factors[len(keep) :])
    box = tuple(slice(0, each) for each in kept)
    torch.testing.assert_close(spectrum, monarch_dft(x, factors)[(slice(None), *box)], rtol=1e-12, atol=1e-12)
    share = np.cumprod(np.array(kept) / np.array(factors))
    assert counted["multiplications"] == 3 * 2 * round(sum(n * size * left for size, left in zip(factors, share, strict=True)))
    assert counted["multiplications"] == 3 * 2 * multiplications(factors, keep)
    assert make_plan(n, 3, keep=keep, factors=factors).multiplications == 2 * multiplications(factors, keep)


@pytest.mark.parametrize(("factors", "keep"), [((8, 8), (5, 3)), ((4, 4, 4), (3, 2, 2)), ((3, 5), (2, 2))])
def test_weights_make_what_the_mask_makes(factors, keep):
    n = math.prod(factors)
    spectrum = torch.fft.fft(torch.randn(n, dtype=torch.float64))
    k, c = frequencies(factors, keep), kept_weights(factors, keep)
    weighted = torch.zeros(n, dtype=torch.complex128)
    weighted[k] = c * spectrum[k]
    masked = torch.fft.irfft(spectrum[: n // 2 + 1] * kept_mask(factors, keep), n=n)
    torch.testing.assert_close(torch.fft.ifft(weighted).real, masked, rtol=0, atol=1e-13)
    assert set(c.tolist()) == {1.0, 2.0}


@pytest.mark.parametrize("factors", [(4, 4), (2, 3, 5), (1,), (7,)])
def test_a_real_transform_through_half_the_size_is_rfft(factors):
    half = math.prod(factors)
    x = torch.randn(3, 2 * half, dtype=torch.float64)
    spectrum = real_dft(x, factors)
    order = torch.cat([frequencies(factors), torch.tensor([half])])
    torch.testing.assert_close(spectrum, torch.fft.rfft(x)[:, order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(real_idft(spectrum, factors), x, rtol=0, atol=1e-13)


def test_twiddles_of_large_sizes_are_right_to_the_last_bits():
    n = 2**22
    places = torch.randint(0, n * n, (1000,), generator=torch.Generator().manual_seed(0))
    found = roots(places, n).numpy()
    with mpmath.workdps(40):
        exact = [mpmath.expjpi(mpmath.mpf(-2 * (place % n)) / n) for place in places.tolist()]
        worst = max(float(abs(mpmath.mpc(each) - right)) for each, right in zip(found.tolist(), exact, strict=True))
    assert worst < 1e-15


def test_sizes_have_small_factors_and_are_even():
    for least in (1, 2, 7, 100, 1999, 65_537, 10**6):
        n = good_size(least)
        left = n
        for prime in (2, 3, 5):
            while left % prime == 0:
                left //= prime
        assert left == 1
        assert n % 2 == 0
        assert least <= n <= max(2, 1.2 * least + 2)


@pytest.mark.parametrize("n", sorted(RELEASED))
def test_with_a_gpus_rates_the_released_factors_are_no_dearer_than_balanced_pairs(n):
    gpu = Constants(matrix=2e14, general=2e13, fft=1e12, cache=2e13, memory=2e12, cache_bytes=10**7)
    assert stage_seconds(n, RELEASED[n], gpu) <= stage_seconds(n, balanced(n, 2), gpu) * 1.01
    small = stage_seconds(n, (2, n // 2), gpu)
    assert stage_seconds(n, RELEASED[n], gpu) < small


def test_the_model_finds_that_a_cpu_has_a_faster_transform_than_matrix_products():
    assert {make_plan(n, 64).backend for n in (256, 1024, 4096, 32768)} == {"fft"}
