"""Kernels for the CPU give the torch path's values, bit for bit, and draw as they should."""

from __future__ import annotations

import pytest
import torch

from fewer.lowbit._shared import kernels
from fewer.lowbit._shared.blocks import FORMATS, BlockFormat, fake_quantize


@pytest.mark.parametrize(
    "fmt", [*FORMATS, BlockFormat("e2m1", 16, "ue5m3", scale_floor="one"), BlockFormat("int5_asymmetric", 8, "bf16")], ids=str
)
def test_nearest_is_the_torch_paths(fmt, monkeypatch):
    for shape, dim in [((37, 64), 1), ((64, 37), 0), ((33, 50), 1), ((5, 33, 7), 1), ((1, 16), 1)]:
        x = torch.randn(shape) * torch.exp2(torch.randint(-40, 40, shape).float())
        x[0].zero_()
        x.view(-1)[-1], x.view(-1)[3], x.view(-1)[-2] = -0.0, float("nan"), float("inf")
        ours = fake_quantize(x, fmt, dim)
        with monkeypatch.context() as changed:
            changed.setattr(kernels, "on_cpu", lambda _: None)
            theirs = fake_quantize(x, fmt, dim)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.nan_to_num().view(torch.int32), theirs.nan_to_num().view(torch.int32))


@pytest.mark.parametrize("bits", [None, 8])
def test_what_is_drawn_is_fair_and_the_generators_own(bits):
    x = torch.full((20_000, 16), 2.3)
    fmt = BlockFormat("e2m1", 16, "e8m0")
    ours = fake_quantize(x, fmt, 1, "stochastic", torch.Generator().manual_seed(3), random_bits=bits)
    up = (ours == 2.5).float() if (ours == 2.5).any() else (ours == 3.0).float()
    low, high = ours.unique().tolist()
    share = (2.3 - low) / (high - low)
    assert abs(up.mean().item() - share) < 4 * (share * (1 - share) / x.numel()) ** 0.5 + (0 if bits is None else 2**-9)
    for lag in (1, 2, 16, 256):  # neighbours are drawn apart
        deviation = up.flatten() - up.mean()
        assert abs((deviation[lag:] * deviation[:-lag]).mean().item()) < 5 * share * (1 - share) / x.numel() ** 0.5
    draw = torch.Generator().manual_seed(3)
    again = [fake_quantize(x, fmt, 1, "stochastic", draw, random_bits=bits) for _ in range(2)]
    assert torch.equal(again[0], ours)
    assert not torch.equal(again[1], ours)


def test_threads_change_nothing():
    x = torch.randn(1 << 12, 256)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append([fake_quantize(x, "nvfp4", dim, "stochastic", torch.Generator().manual_seed(0)) for dim in (0, 1)])
    torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
