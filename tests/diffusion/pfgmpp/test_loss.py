"""The loss and the preconditioning against EDM's formulas, the paper's regression and the exact minimiser."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fewer.diffusion.pfgmpp import EDMPrecond, PFGMPPLoss, perturb, posterior_mean
from fewer.tasks.digit_denoiser import DenoiserRecipe, DigitDenoiser, loss_weight, preconditioning


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Watched:
    """A denoiser that keeps what it is given."""

    def __call__(self, x, sigma, **cond):
        self.x, self.sigma, self.cond = x, sigma, cond
        return 0.3 * x


def test_the_loss_is_edms_on_the_kernels_noise():
    y, denoiser = torch.randn(64, 1, 4, 4), Watched()
    found = PFGMPPLoss(D=8)(denoiser, y, generator=generator(), label=3)
    draw = generator()
    sigma = (-1.2 + 1.2 * torch.randn(64, generator=draw)).exp()
    x = perturb(y, sigma, 8, draw)
    assert torch.equal(denoiser.x, x)
    assert denoiser.cond == {"label": 3}
    assert torch.allclose(found, loss_weight(sigma) * (0.3 * x - y).square().flatten(1).mean(1))
    gaussian = PFGMPPLoss(D=math.inf)(denoiser, y, generator=generator())
    noise = generator()
    sigma = (-1.2 + 1.2 * torch.randn(64, generator=noise)).exp()
    x = y + sigma[:, None, None, None] * torch.randn(y.shape, generator=noise)
    assert torch.equal(denoiser.x, x)
    assert torch.allclose(gaussian, loss_weight(sigma) * (0.3 * x - y).square().flatten(1).mean(1))


def test_the_ve_loss_is_the_papers_regression():
    """To (x - y) / (r / sqrt(D)), with sigma log-uniform."""
    y, denoiser, D = torch.randn(5000, 3, dtype=torch.float64), Watched(), 5
    found = PFGMPPLoss(D, schedule="ve")(denoiser, y, generator=generator())
    x, r = denoiser.x, denoiser.sigma * math.sqrt(D)
    field = (x - 0.3 * x) / denoiser.sigma[:, None]
    assert torch.allclose(found, (field - (x - y) / (r / math.sqrt(D))[:, None]).square().mean(1))
    low, middle, high = denoiser.sigma.log().quantile(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert math.log(0.02) <= float(low) < math.log(0.021)
    assert math.log(99) < float(high) <= math.log(100) + 1e-6
    assert float(middle) == pytest.approx(math.log(math.sqrt(2)), abs=0.2)


@pytest.mark.parametrize("D", [2, 8])
def test_the_posterior_mean_is_the_minimiser(D):
    data = torch.randn(7, 4, dtype=torch.float64)
    y, loss = data.repeat(3000, 1), PFGMPPLoss(D, P_mean=0.0)

    def of(shift, other=D):
        def denoiser(x, sigma):
            return posterior_mean(x, sigma, data, other) + shift

        return float(loss(denoiser, y, generator=generator()).mean())

    best = of(0.0)
    assert all(of(shift) > best for shift in (-0.05, 0.05))
    assert of(0.0, math.inf) > best  # the Gaussian kernel's


def test_a_stable_target_has_the_same_minimiser_and_less_variance():
    data, D, x_of = torch.randn(16, 4, dtype=torch.float64), 8, Watched()
    y = data[:4]
    found = PFGMPPLoss(D)(x_of, y, generator=generator(), reference=data[4:])
    target = posterior_mean(x_of.x, x_of.sigma, data, D)
    weight = PFGMPPLoss(D).weight(x_of.sigma)
    assert torch.allclose(found, weight * (0.3 * x_of.x - target).square().mean(1))

    def exact(x, sigma):
        return posterior_mean(x, sigma, data, D)

    assert float(PFGMPPLoss(D)(exact, data, generator=generator(), reference=data[:0]).max()) < 1e-20
    assert float(PFGMPPLoss(D)(exact, data, generator=generator()).max()) > 1e-3


def test_the_preconditioning_is_edms():
    recipe = DenoiserRecipe(side=4, width=16)
    model = DigitDenoiser(recipe)
    for part in model.parameters():
        nn.init.normal_(part, std=0.2)
    x, sigma = torch.randn(5, 1, 4, 4), torch.logspace(-2, 1.9, 5)

    def raw(rows, c_noise):
        return model.network(rows.flatten(1), c_noise, None).reshape(rows.shape)

    assert torch.allclose(EDMPrecond(raw)(x, sigma), model(x, sigma), atol=1e-6)
    for level in (0.01, 0.5, 80.0):  # the effective target has unit variance
        c_in, c_skip, c_out = preconditioning(torch.tensor(level))
        assert float(c_in**2 * (0.25 + level**2)) == pytest.approx(1, rel=1e-5)
        assert float((1 - c_skip) ** 2 * 0.25 + c_skip**2 * level**2) == pytest.approx(float(c_out) ** 2, rel=1e-4)


def test_it_wraps_diffusers_unet_and_keeps_its_state(unet, tmp_path):
    denoiser = EDMPrecond(unet)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 5.0])
    with torch.no_grad():
        found = denoiser(x, sigma)
        assert torch.allclose(denoiser(x[1:], 5.0), found[1:], atol=1e-6)
        for twin in (copy.deepcopy(denoiser), pickle.loads(pickle.dumps(denoiser))):
            assert torch.equal(twin(x, sigma), found)
    assert set(denoiser.state_dict()) == {f"net.{name}" for name in unet.state_dict()}
    half = EDMPrecond(copy.deepcopy(unet).bfloat16())
    with torch.no_grad():
        kept = half(x, sigma)
        assert kept.dtype == torch.float32
        assert half(x.bfloat16(), sigma).dtype == torch.bfloat16
    assert torch.allclose(kept, found, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_loss_of_every_dtype_is_near_that_of_float32(dtype):
    y = torch.randn(32, 6)
    loss = PFGMPPLoss(D=16)
    exact = loss(Watched(), y, generator=generator())
    found = loss(Watched(), y.to(dtype), generator=generator())
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype != torch.float64:
        assert torch.allclose(found, exact, rtol=0.1)
    assert loss(Watched(), y[:1], generator=generator()).shape == (1,)


def test_a_heavy_tail_that_overflows_is_reported_not_hidden():
    found = PFGMPPLoss(D=0.01)(lambda x, sigma: x, torch.randn(2000, 1), generator=generator())
    assert not found.isfinite().all()


def test_two_ranks_and_two_runs():
    y, loss = torch.randn(8, 3), PFGMPPLoss(D=4)
    one, again, other = (loss(Watched(), y, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(Watched(), y, generator=generator()), one)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"D": 0}, "D is 0"),
        ({"D": math.nan}, "D is nan"),
        ({"P_std": 0}, "P_std is 0"),
        ({"P_mean": math.inf}, "P_mean is inf"),
        ({"sigma_data": -1}, "sigma_data is -1"),
        ({"schedule": "vp"}, "schedule is 'vp'; expected one of edm, ve"),
        ({"sigma_range": (2.0, 1.0)}, "sigma_min is 2.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        PFGMPPLoss(**({"D": 8} | words))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, torch.tensor([1.0, 0.0]), torch.ones(3), torch.ones(1), torch.ones(2, 1)])
def test_a_denoiser_refuses_noise_levels_that_cannot_be(sigma):
    with pytest.raises(ValueError, match="sigma (is|holds) .*; expected"):
        EDMPrecond(lambda x, c_noise: x)(torch.zeros(2, 3), sigma)


def test_a_denoiser_is_compiled_whole():
    denoiser, x, sigma = EDMPrecond(lambda x, c_noise: c_noise[:, None] * x), torch.ones(2, 3), torch.tensor([0.5, 2.0])
    assert torch.allclose(torch.compile(denoiser, fullgraph=True, backend="eager")(x, sigma), denoiser(x, sigma))


def test_an_empty_batch_has_no_losses():
    assert PFGMPPLoss(D=8)(Watched(), torch.zeros(0, 1, 4, 4)).shape == (0,)


def test_data_and_answers_that_cannot_be_are_refused():
    loss = PFGMPPLoss(D=8)
    with pytest.raises(ValueError, match="y is .*uint8; expected floating-point"):
        loss(Watched(), torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"answers \(2, 1\); expected a tensor \(2, 3\)"):
        loss(lambda x, sigma: x[:, :1], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="answers NoneType"):
        loss(lambda x, sigma: None, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="reference is .*uint8; expected floating-point"):
        loss(Watched(), torch.zeros(2, 3), reference=torch.zeros(4, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"reference is \(4, 2\); expected \[M, ...\] with rows as y's \(2, 3\)"):
        loss(Watched(), torch.zeros(2, 3), reference=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="x is .*int64; expected floating-point"):
        EDMPrecond(lambda x, c_noise: x)(torch.zeros(2, 3, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match=r"answers \(2,\)"):
        EDMPrecond(lambda x, c_noise: x[:, 0])(torch.zeros(2, 3), 1.0)
    with pytest.raises(ValueError, match="sigma_data is 0"):
        EDMPrecond(nn.Identity(), 0)
