"""The sampler on fields that are known exactly: transport in one dimension, a single charge, and the order of the solvers."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import solve_ivp
from torch import nn

from fewer.diffusion.pfgmpp import EDMPrecond, posterior_mean, sample, student_t_noise
from fewer.diffusion.pfgmpp.sampling import noise_grid

DOUBLE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact(data, D, weights=None):
    """The denoiser of a finite set."""
    return lambda x, sigma: posterior_mean(x, sigma, data, D, weights)


@pytest.mark.parametrize("D", [1, 2, 5, 50, 1e6])
def test_in_one_dimension_the_ode_keeps_the_mass_to_the_left(D):
    """sum_i w_i T_D((x - y_i) / sigma) is constant along it."""
    data, weights = torch.tensor([[-1.0], [2.0]], dtype=DOUBLE), torch.tensor([0.3, 0.7], dtype=DOUBLE)

    def left(x, sigma):
        return float(weights.numpy() @ stats.t(df=D).cdf((x - data[:, 0].numpy()) / sigma))

    def slope(sigma, x):
        state, level = torch.from_numpy(x)[None], torch.tensor([sigma], dtype=DOUBLE)
        return ((state - posterior_mean(state, level, data, D, weights)) / sigma)[0].numpy()

    end = solve_ivp(slope, (20.0, 0.05), np.array([7.0]), rtol=1e-10, atol=1e-12).y[0, -1]
    assert left(end, 0.05) == pytest.approx(left(7.0, 20.0), abs=1e-7)


@pytest.mark.parametrize("solver", ["heun", "euler"])
@pytest.mark.parametrize("D", [1, 64.5, math.inf])
def test_around_a_single_charge_the_way_is_straight(solver, D):
    y = torch.randn(1, 3, 2, dtype=DOUBLE)
    words = {"steps": 18, "sigma_min": 0.02, "sigma_max": 20.0, "solver": solver}
    states = sample(exact(y, D), (5, 3, 2), D, generator=generator(), return_trajectory=True, dtype=DOUBLE, **words)
    for state, sigma in zip(states, noise_grid(18, 0.02, 20.0, 7.0), strict=True):
        assert (state - (y + (states[0] - y) * sigma / 20)).abs().max() < 1e-12 * max(1.0, float(states[0].abs().max()))


@functools.cache
def near_zero(D, steps, solver):
    """States at sigma_min, in the field of 16 points."""
    data = torch.randn(16, 8, generator=generator(), dtype=DOUBLE)
    words = {"steps": steps, "sigma_min": 0.5, "sigma_max": 20.0, "solver": solver, "dtype": DOUBLE}
    return sample(exact(data, D), (20, 8), D, generator=generator(1), return_trajectory=True, **words)[-2]


@pytest.mark.parametrize("D", [4, 64])
@pytest.mark.parametrize(("solver", "low", "high"), [("heun", 1.9, 2.2), ("euler", 0.9, 1.2)])
def test_the_error_falls_with_the_solvers_order(D, solver, low, high):
    """At sigma_min, before the step to 0, where every solver stands on a data point; of the median trajectory, as one near a border
    between points, which falls to another side, outweighs all others in a mean."""
    converged = near_zero(D, 4096, "heun")
    errors = [float((near_zero(D, steps, solver) - converged).norm(dim=1).median()) for steps in (32, 64, 128)]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert ((low <= slopes) & (slopes <= high)).all(), slopes


def test_it_is_edms_heun_at_D_inf_from_its_own_sigma_max():
    """The loop of the paper, written out."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()
    denoiser = EDMPrecond(lambda x, c_noise: net(x) + c_noise[:, None])
    n, low, high, rho = 9, 0.01, 5.0, 7
    sigmas = [(high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)] + [0.0]
    x = high * torch.randn(4, 6, generator=generator(), dtype=DOUBLE)
    with torch.no_grad():
        for now, then in pairwise(sigmas):
            d = (x - denoiser(x, now)) / now
            ahead = x + (then - now) * d
            if then > 0:
                ahead = x + (then - now) * (d + (ahead - denoiser(ahead, then)) / then) / 2
            x = ahead
    found = sample(denoiser, (4, 6), math.inf, n, low, high, rho, generator=generator(), dtype=DOUBLE)
    assert torch.allclose(found, x, atol=1e-12)


def test_the_prior_is_heavy_tailed_and_of_the_samplers_own_sigma_max():
    states = sample(lambda x, sigma: 0 * x, (6, 5), 3, sigma_max=7.0, generator=generator(), return_trajectory=True)
    assert torch.equal(states[0], 7 * student_t_noise((6, 5), 3, generator(), DOUBLE))


class Counted(nn.Module):
    """Notes its calls; float32, in training mode."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(2, 2), []

    def forward(self, x, sigma, label=None):
        self.seen.append((x.dtype, tuple(sigma.shape), self.training, torch.is_grad_enabled(), label))
        return self.layer(x)


def test_the_network_is_called_in_its_own_dtype_2n_minus_1_times_in_eval_mode():
    for dtype in (torch.float32, torch.bfloat16, DOUBLE):
        net = Counted().to(dtype)
        ends = sample(net, (3, 2), 8, steps=5, generator=generator(), label=1)
        assert len(net.seen) == 9
        assert set(net.seen) == {(dtype, (3,), False, False, 1)}
        assert net.training
        assert ends.dtype == DOUBLE
    net = Counted()
    sample(net, (1, 2), 8, steps=5, solver="euler")
    assert len(net.seen) == 5


def test_noise_of_alpha_sigma_is_added_before_every_step():
    states = sample(
        lambda x, sigma: x, (20_000, 1), math.inf, steps=3, sigma_max=2.0, injected=0.5, generator=generator(), return_trajectory=True
    )
    grid = noise_grid(3, 0.002, 2.0, 7.0)
    for i in range(3):  # a denoiser that changes nothing leaves what was added
        assert float((states[i + 1] - states[i]).std()) == pytest.approx(0.5 * float(grid[i]), rel=0.03)


def test_a_denoiser_of_another_shape_or_without_end_is_refused():
    with pytest.raises(ValueError, match=r"answers \(3, 1\); expected a tensor \(3, 2\)"):
        sample(lambda x, sigma: x[:, :1], (3, 2), 8)

    def bursts(x, sigma):
        return x / 0 if float(sigma[0]) < 1 else 0 * x

    with pytest.raises(FloatingPointError, match="not finite after step [0-9]+ .sigma = "):
        sample(bursts, (3, 2), 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"steps": 1}, "steps is 1"),
        ({"steps": 4.0}, "steps is 4.0"),
        ({"sigma_min": 80.0}, "sigma_min is 80.0, sigma_max 80.0; expected sigma_min below"),
        ({"sigma_min": -1.0}, "sigma_min is -1.0"),
        ({"sigma_max": math.nan}, "sigma_max is nan"),
        ({"solver": "huen"}, "did you mean 'heun'"),
        ({"injected": -0.1}, "injected is -0.1"),
        ({"rho": 0}, "rho is 0"),
        ({"dtype": torch.int64}, "dtype is torch.int64"),
        ({"D": 0}, "D is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        sample(lambda x, sigma: x, (2, 2), **({"D": 8} | words))
