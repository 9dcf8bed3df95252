"""PSNR and SSIM by hand and by a loop over windows, the curve of the learning rate, the embedding, and the quantiser."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.signals.pfnr import psnr, ssim
from fewer.signals.pfnr.net.network import embedding
from fewer.signals.pfnr.quality import learning_rate, mse_loss, ssim_loss
from fewer.signals.pfnr.storage import pack_codes, quantise, unpack_codes


def test_psnr_by_hand():
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    b[0], b[1] = 0.1, 0.01
    assert psnr(a, b) == pytest.approx((20 + 40) / 2, abs=1e-4)
    assert psnr((a * 255).to(torch.uint8), torch.full((2, 3, 4, 4), 51, dtype=torch.uint8)) == pytest.approx(
        -20 * math.log10(0.2), abs=1e-4
    )
    assert psnr(a, a) == math.inf


def test_ssim_equals_a_loop_over_windows():
    rng = np.random.default_rng(0)
    a, b = rng.random((1, 3, 16, 16)), rng.random((1, 3, 16, 16))
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for channel in range(3):
        for i in range(6):
            for j in range(6):
                p, q = a[0, channel, i : i + 11, j : j + 11], b[0, channel, i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq, c = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum(), (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 0.01**2) * (2 * c + 0.03**2) / ((mp**2 + mq**2 + 0.01**2) * (vp + vq + 0.03**2)))
    assert float(ssim(torch.from_numpy(a), torch.from_numpy(b))) == pytest.approx(np.mean(values), abs=1e-10)
    assert float(ssim(torch.from_numpy(a), torch.from_numpy(a))) == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="frames are 10 x 16; expected at least 11 x 11"):
        ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


def test_frames_that_do_not_fit_are_refused():
    a = torch.zeros(2, 3, 12, 12)
    for compare in (psnr, ssim, ssim_loss, mse_loss):
        for b in (a[:1], a[..., :11], a[0], a[:0]):
            with pytest.raises(ValueError, match=r"frames are \[2, 3, 12, 12\] and \[.*\]; expected twice the same"):
                compare(a, b)
        with pytest.raises(ValueError, match=r"frames are torch.int64; expected uint8, or floats in \[0, 1\]"):
            compare(a, a.long())
    with pytest.raises(ValueError, match="T >= 1"):
        psnr(a[:0], a[:0])


def test_losses_are_the_weighted_sums_that_they_say():
    a, b = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 12, 12)
    l1 = (a - b).abs().mean()
    assert torch.isclose(ssim_loss(a, b), 0.7 * l1 + 0.3 * (1 - ssim(a, b)))
    assert torch.isclose(mse_loss(a, b), 0.7 * l1 + 3 * ((a - b) ** 2).mean())


def test_the_learning_rate_warms_up_and_falls_to_zero():
    assert learning_rate(5e-4, 0, 150) == pytest.approx(0.5e-4)
    assert learning_rate(5e-4, 30, 150) == pytest.approx(5e-4)
    assert learning_rate(5e-4, 150, 150) == pytest.approx(0)
    assert learning_rate(1, 15, 150) == pytest.approx(0.55)
    assert learning_rate(1, 90, 150) == pytest.approx(0.5)


def test_the_embedding_is_interleaved_sines_and_cosines():
    found = embedding(torch.tensor([0.3], dtype=torch.float64))
    assert found.shape == (1, 80)
    assert found[0, :4].tolist() == pytest.approx([0.809017, 0.587785, 0.923880, 0.382683], abs=1e-6)
    assert found[0, 2 * 7].item() == pytest.approx(math.sin(1.25**7 * math.pi * 0.3))


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 16), st.integers(1, 60), st.integers(0, 2**31))
def test_the_quantiser_is_within_half_a_step_and_idempotent(bits, n, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers, groups = torch.randn(n, generator=generator), torch.randint(4, (n,), generator=generator)
    found = quantise(numbers, groups, 5, bits)
    back = found.numbers(groups)
    assert ((back - numbers).abs() <= 0.5 * found.step[groups] * (1 + 1e-3) + 1e-6).all()
    assert int(found.codes.min()) >= 0
    assert int(found.codes.max()) <= 2**bits - 1
    again = quantise(back, groups, 5, bits)
    assert torch.equal(again.codes, found.codes)
    assert torch.allclose(again.numbers(groups), back, atol=1e-6)
    assert torch.equal(unpack_codes(pack_codes(found.codes, bits), bits, n), found.codes)


def test_constant_and_empty_channels_do_not_divide_by_zero():
    numbers = torch.tensor([0.7, 0.7, 0.7, -1.0])
    groups = torch.tensor([0, 0, 0, 2])
    found = quantise(numbers, groups, 4, 8)
    assert torch.equal(found.numbers(groups), numbers)
    assert found.step.tolist() == [0, 0, 0, 0]
    assert quantise(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 3, 8).codes.shape == (0,)
    ends = quantise(torch.tensor([0.0, 1.0]), torch.zeros(2, dtype=torch.int64), 1, 3)
    assert ends.codes.tolist() == [0, 7], "both ends are codes, so 2^b are enough"
