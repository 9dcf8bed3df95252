"""Masks by their formula, gradients straight through, and the Fourier operator against ideal filters, sampled waves and a double loop."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.signals.pfnr import FourierSubneuralOperator, SubnetConv2d, SubnetLinear
from fewer.signals.pfnr.net.subnetworks import winning_mask

SHARES = (1, 0.9, 0.5, 0.3, 0.1)


def operator(modes, stride=1, placement="centred", channels=(1, 1), identity=True, dtype=torch.float64):
    """A Fourier operator of all its entries, R = 1 and I = 0."""
    layer = FourierSubneuralOperator(*channels, modes, stride, capacity=1.0, placement=placement).to(dtype)
    if identity:
        for i, weight in enumerate(layer.weights):
            weight.data.fill_(float(i in (0, 2)))
    return layer


@pytest.mark.parametrize("n", [10, 108, 999])
@pytest.mark.parametrize("share", SHARES)
def test_as_many_entries_as_the_formula_says(n, share):
    score = torch.from_numpy(np.random.default_rng(n).permutation(n).astype(np.float64))
    kept = int(winning_mask(score, share).sum())
    assert kept == n - round((1 - share) * (n - 1))
    assert winning_mask(score, share)[score.argmax()]
    tied = int(winning_mask(torch.floor(score / 3), share).sum())
    assert tied >= kept
    assert int(winning_mask(torch.zeros(n), share).sum()) == n
    assert torch.equal(winning_mask(score.half(), share), winning_mask(score.half().double(), share))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=60), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_smaller_share_is_part_of_a_larger(scores, one, other):
    score = torch.tensor(scores, dtype=torch.float64)
    small, large = winning_mask(score, min(one, other)), winning_mask(score, max(one, other))
    assert bool((large | ~small).all())
    assert not small.all() or len(set(scores)) == 1 or small.sum() == len(scores)


def test_convolution_scores_are_magnitudes_and_the_operators_are_signed():
    layer, spectral = SubnetLinear(20, 30, capacity=0.3), FourierSubneuralOperator(2, 3, (4, 5), capacity=0.3)
    assert torch.equal(layer.masks()[0], winning_mask(layer.rho[0].abs(), 0.3))
    for mask, rho in zip(spectral.masks(), spectral.rho, strict=True):
        assert torch.equal(mask, winning_mask(rho, 0.3))
        assert not torch.equal(mask, winning_mask(rho.abs(), 0.3))


def straight_through(layer, x, target):
    """The gradients on a graph written by hand: masks as constants, the score's gradient put in by m + score - score.detach()."""
    weights = [weight.detach().clone().requires_grad_() for weight in layer.weights]
    rho = [each.detach().clone().requires_grad_() for each in layer.rho]
    effective = []
    for weight, each, mask in zip(weights, rho, layer.masks(), strict=True):
        score = each.abs() if layer.absolute else each
        effective.append(weight * (mask.to(weight.dtype) + score - score.detach()))
    ((layer.run(x, effective) - target) ** 2).sum().backward()
    return [each.grad for each in (*weights, *rho)]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (SubnetLinear(6, 5, capacity=0.4), (7, 6)),
        (SubnetConv2d(2, 3, 2, capacity=0.4), (2, 2, 6, 8)),
        (FourierSubneuralOperator(2, 3, (2, 3), 2, capacity=0.4), (2, 2, 6, 8)),
    ],
    ids=["linear", "convolution", "operator"],
)
def test_gradients_pass_the_mask_by(layer, shape):
    layer = copy.deepcopy(layer).double()
    x = torch.randn(shape, dtype=torch.float64)
    target = torch.randn_like(layer(x))
    ((layer(x) - target) ** 2).sum().backward()
    for found, expected in zip((*layer.weights, *layer.rho), straight_through(layer, x, target), strict=True):
        assert found.grad is not None
        assert torch.allclose(found.grad, expected, atol=1e-6)
    weight, rho, mask = layer.weights[0], layer.rho[0], layer.masks()[0]
    assert (weight.grad[~mask] == 0).all(), "dw = g m"
    assert (rho.grad[~mask] != 0).any(), "d rho = g w at every entry"


def low_pass(x, rows, columns):
    """The ideal filter that keeps rows -M1..M1-1 and columns 0..M2-1 (and their mirrors) of the spectrum."""
    spectrum = np.fft.rfft2(x)
    spectrum[..., rows:-rows, :] = 0
    spectrum[..., columns:] = 0
    return np.fft.irfft2(spectrum, s=x.shape[-2:])


def test_with_r_1_and_weights_1_it_is_a_low_pass():
    x = torch.randn(2, 1, 8, 10, dtype=torch.float64)
    layer = operator((3, 4))
    assert np.allclose(layer(x).detach().numpy(), low_pass(x.numpy(), 3, 4), atol=1e-6)
    constant = torch.full((1, 1, 8, 10), 0.7, dtype=torch.float64)
    assert torch.allclose(layer(constant), constant)
    y = torch.randn_like(x)
    assert torch.allclose(layer(2 * x - 3 * y), 2 * layer(x) - 3 * layer(y))
    nothing = [torch.zeros_like(mask) for mask in layer.masks()]
    assert (layer(x, nothing) == 0).all()


def wave(height, width, f, g, rows, columns):
    y, x = np.arange(rows)[:, None] * height / rows, np.arange(columns) * width / columns
    return torch.from_numpy(np.cos(2 * math.pi * (f * y / height + g * x / width) + 0.4))[None, None]


def test_centred_it_interpolates_waves_and_released_it_mirrors_some():
    height, width, (rows, columns) = 8, 10, (3, 4)
    centred, released = (operator((rows, columns), 2, placement) for placement in ("centred", "released"))
    for f in range(-rows + 1, rows):
        for g in range(columns):
            coarse, fine = wave(height, width, f, g, 8, 10), wave(height, width, f, g, 16, 20)
            assert torch.allclose(centred(coarse), fine, atol=1e-5), (f, g)
            error = float((released(coarse) - fine).detach().abs().max())
            if (f >= 0 and g > 0) or f == 0:
                assert error < 1e-5, (f, g)
            else:
                assert error > 0.9, (f, g)


@pytest.mark.parametrize("placement", ["centred", "released"])
def test_it_equals_a_double_loop_over_modes(placement):
    height, width, rows, columns, r = 6, 8, 2, 3, 2
    layer = operator((rows, columns), r, placement, channels=(2, 3), identity=False)
    x = torch.randn(1, 2, height, width, dtype=torch.float64)
    low = (layer.weights[0] + 1j * layer.weights[1]).detach().numpy()
    high = (layer.weights[2] + 1j * layer.weights[3]).detach().numpy()
    spectrum = np.fft.rfft2(x.numpy()[0]) / (height * width)
    v, u = np.meshgrid(np.arange(r * height) / (r * height), np.arange(r * width) / (r * width), indexing="ij")
    expected = np.zeros((3, r * height, r * width))
    for out in range(3):
        modes = [(row, row, low[:, out, row]) for row in range(rows)]
        start = (r * height if placement == "centred" else height) - rows
        modes += [(height - rows + row, start + row, high[:, out, row]) for row in range(rows)]
        whole = np.zeros((r * height, r * width // 2 + 1), dtype=complex)
        for source, target, weight in modes:
            for column in range(columns):
                whole[target, column] += (spectrum[:, source, column] * weight[:, column]).sum()
        for row in range(r * height):
            for column in range(columns):  # a real field holds each mode and its mirror
                term = whole[row, column] * np.exp(2j * math.pi * (row * v + column * u))
                expected[out] += term.real * (1 if column == 0 else 2)
    assert np.abs(layer(x).detach().numpy()[0] - expected).max() < 1e-10


def test_layers_survive_copies_types_and_strided_inputs():
    for layer, shape in (
        (SubnetLinear(6, 5), (3, 6)),
        (SubnetConv2d(2, 3, 2), (1, 2, 6, 8)),
        (FourierSubneuralOperator(2, 3, (2, 3), 2), (1, 2, 6, 8)),
    ):
        x = torch.randn(shape)
        found = layer(x)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), found)
        fresh = copy.deepcopy(layer)
        fresh.reset_scores()
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(fresh(x), found)
        assert torch.equal(layer(x, layer.masks()), found)
        assert torch.allclose(layer(x.repeat_interleave(2, -1)[..., ::2]), found, atol=1e-6)
        assert torch.allclose(copy.deepcopy(layer).double()(x.double()).float(), found, atol=1e-5)
        for dtype in (torch.bfloat16, torch.float16):
            half = copy.deepcopy(layer).to(dtype)
            close = half(x.to(dtype), layer.masks())
            assert close.dtype == dtype
            assert torch.allclose(close.float(), found, atol=0.05)


def test_what_is_no_layer_is_refused():
    for share in (0, 1.5, -0.1, float("nan"), "half"):
        with pytest.raises(ValueError, match="capacity is .*; expected a share of the weights above 0 and up to 1"):
            SubnetLinear(3, 3, capacity=share)
    with pytest.raises(ValueError, match=r"modes\[0\] is 0; expected a whole number of at least 1"):
        FourierSubneuralOperator(1, 1, (0, 3))
    with pytest.raises(ValueError, match="placement is 'center'; expected one of centred, released: did you mean 'centred'"):
        FourierSubneuralOperator(1, 1, (2, 3), placement="center")
    with pytest.raises(ValueError, match="x is 4 x 8; expected at least 6 x 6, two of each mode"):
        FourierSubneuralOperator(1, 1, (3, 3))(torch.zeros(1, 1, 4, 8))
