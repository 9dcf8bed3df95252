"""The baseline is neuralop's FNO, and what the solver makes is right."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from fewer.data import load_burgers, load_darcy
from fewer.errors import DataUnavailable
from fewer.signals import FNO, burgers, navier_stokes, spectral_resize
from fewer.signals.transform_once.peers import neuralop_fno, with_weights_of


@pytest.mark.skipif(
    importlib.util.find_spec("neuralop") is None, reason="neuralop is not installed; pip install --no-deps neuraloperator==0.3.0"
)
@pytest.mark.parametrize(("n_modes", "points"), [((6,), (16,)), ((6, 4), (12, 20)), ((4, 4, 4), (6, 8, 6))])
@torch.no_grad()
def test_with_its_weights_it_is_neuralops(n_modes, points):
    torch.manual_seed(0)
    peer = neuralop_fno(n_modes, 6, in_channels=2, out_channels=3, n_layers=2)
    ours = with_weights_of(peer, FNO(n_modes, 6, 2, 3, 2, positional_embedding=False))
    x = torch.randn(2, 2, *points)
    torch.testing.assert_close(ours(x), peer(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_spectral_layer_is_its_sum_over_modes():
    layer = FNO((4, 4), 3).double().spectral[0]
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    spectrum, out = torch.fft.rfft2(x), torch.zeros(2, 3, 8, 4, dtype=torch.complex128)
    weight = torch.view_as_complex(layer.weight)
    for p in range(-2, 2):
        for q in range(3):
            out[:, :, p % 8, q] = spectrum[:, :, p % 8, q] @ weight[p + 2, q]
    torch.testing.assert_close(layer(x), torch.fft.irfft2(out, s=(8, 6)) + layer.bias, rtol=1e-12, atol=1e-12)


def test_it_takes_coordinates_other_resolutions_and_three_starts():
    for init in ("neuralop", "naive", "vp"):
        model = FNO((4, 4), 8, init=init, resolution=(16, 16), lifting_channels=None)
        assert model(torch.randn(2, 1, 16, 16)).shape == (2, 1, 16, 16)
        assert model(torch.randn(2, 1, 8, 24)).shape == (2, 1, 8, 24)
    with pytest.raises(ValueError, match="init is 'vp' and resolution None; expected the fields' resolution"):
        FNO((4, 4), 8, init="vp")


def test_half_the_step_changes_little_and_the_mean_stays():
    w0, coarse = navier_stokes(3, 32, T=1.0, dt=0.02, dtype=torch.float64)
    _, fine = navier_stokes(3, 32, T=1.0, dt=0.01, dtype=torch.float64)
    assert (coarse - fine).norm() < 1e-4 * fine.norm()
    assert (coarse - w0).norm() > 0.1 * w0.norm()
    torch.testing.assert_close(coarse.mean((1, 2)), w0.mean((1, 2)), rtol=0, atol=1e-12)


def test_a_single_wave_decays_as_it_must():
    x = torch.arange(32, dtype=torch.float64) / 32
    w0 = torch.cos(2 * math.pi * x)[None, :, None].expand(1, 32, 32)
    _, w = navier_stokes(1, 32, viscosity=1e-2, T=1.0, dt=0.01, forcing=0.0, w0=w0, dtype=torch.float64)
    torch.testing.assert_close(w, w0 * math.exp(-4 * math.pi**2 * 1e-2), rtol=0, atol=1e-5)
    _, w = navier_stokes(1, 32, viscosity=1e-3, T=1.0, dt=0.01, forcing=0.0, w0=w0, dtype=torch.float64)
    torch.testing.assert_close(w, w0 * math.exp(-4 * math.pi**2 * 1e-3), rtol=0, atol=1e-6)


def test_two_waves_are_carried_by_each_other():
    """dw/dt at the start, by differences, is -u . grad w + f with u from the stream function."""
    x = torch.arange(32, dtype=torch.float64) / 32
    a, b = 2 * math.pi * x[:, None], 2 * math.pi * x
    w0 = (torch.cos(a) + torch.cos(2 * b))[None].expand(1, 32, 32)
    small = 1e-4
    _, w = navier_stokes(1, 32, viscosity=0.0, T=small, dt=small / 4, w0=w0, dtype=torch.float64)
    two = 2 * math.pi  # psi = cos a / two^2 + cos 2b / (2 two)^2; u = psi_y, v = -psi_x
    u, v = -torch.sin(2 * b) / (2 * two), torch.sin(a) / two
    forced = 0.1 * (torch.sin(a + b) + torch.cos(a + b))
    wanted = -(u * -two * torch.sin(a) + v * -2 * two * torch.sin(2 * b)) + forced
    torch.testing.assert_close((w - w0)[0] / small, wanted.expand(32, 32), rtol=0, atol=1e-3)


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark's files, where they can be had."""
    try:
        return load_burgers(), load_darcy()
    except DataUnavailable as reason:
        pytest.skip(str(reason))


def test_burgers_solves_what_the_benchmark_solved(benchmark):
    """Somebody else's solver: viscosity 1/100, 17 times from 0 to 1."""
    states, moved = (torch.from_numpy(each).double() for each in benchmark[0])
    assert (states.shape, moved.shape) == ((1200, 16), (1200, 17, 16))
    assert torch.equal(moved[:, 0], states)
    for place, near in ((4, 0.02), (8, 0.035), (16, 0.04)):
        _, fine = burgers(30, 64, 1e-2, T=place / 16, dt=2e-3, u0=spectral_resize(states[:30], 64), dtype=torch.float64)
        wanted = moved[:30, place]
        assert (spectral_resize(fine, 16) - wanted).norm() < near * wanted.norm()
        assert (states[:30] - wanted).norm() > 10 * near * wanted.norm()


def test_darcys_files_are_as_they_say(benchmark):
    parts = benchmark[1]
    assert {name: part.x.shape for name, part in parts.items()} == {
        "train": (1000, 16, 16), "test": (50, 16, 16), "test_32": (50, 32, 32),
    }  # fmt: skip
    for part in parts.values():
        assert part.x.shape == part.y.shape
        assert set(part.x.flat) == {0.0, 1.0}


def test_burgers_keeps_its_mean_and_loses_energy():
    u0, coarse = burgers(4, 64, T=0.5, dt=2e-3, dtype=torch.float64)
    _, fine = burgers(4, 64, T=0.5, dt=1e-3, dtype=torch.float64)
    assert (coarse - fine).norm() < 1e-3 * fine.norm()
    torch.testing.assert_close(fine.mean(1), u0.mean(1), rtol=0, atol=1e-12)
    assert (fine.square().mean(1) < u0.square().mean(1)).all()
