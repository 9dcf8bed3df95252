"""The kernel's noise against the laws of scipy, the released recipe and closed forms; the posterior mean against a sum by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from fewer.diffusion.pfgmpp import perturb, posterior_mean, radius_quantiles, student_t_noise
from fewer.diffusion.pfgmpp import perturbation as module

DRAWS = 200_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_beta(N: int, D: float, count: int) -> torch.Tensor:
    """R / sigma as the paper draws it: R = r sqrt(b / (1 - b)), b ~ Beta(N / 2, D / 2), in float64 and without clipping."""
    b = np.random.default_rng(1).beta(N / 2, D / 2, size=count)
    return torch.from_numpy(math.sqrt(D) * np.sqrt(b / (1 - b)))


@pytest.mark.parametrize("D", [1, 3, 64, 1e6])
@pytest.mark.parametrize("N", [1, 8, 64])
def test_radii_follow_F_and_the_papers_beta_form(N, D):
    count = DRAWS
    radii = student_t_noise((count, N), D, generator(), torch.float64).norm(dim=1)
    assert stats.kstest((radii**2 / N).numpy(), stats.f(N, D).cdf).pvalue > 1e-3
    assert stats.ks_2samp(radii.numpy(), by_beta(N, D, count // 2).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("D", [1, 3.7, 64])
def test_one_coordinate_follows_students_t_and_all_share_one_chi_square(D):
    noise = student_t_noise((DRAWS, 8), D, generator(), torch.float64)
    assert stats.kstest(noise[:, 3].numpy(), stats.t(df=D).cdf).pvalue > 1e-3
    halves = noise.square()[:, :4].sum(1), noise.square()[:, 4:].sum(1)
    tied = stats.spearmanr(halves[0].numpy()[:20_000], halves[1].numpy()[:20_000]).statistic
    assert tied > 3 / (4 + D)  # independent coordinates give 0
    directions = noise / noise.norm(dim=1, keepdim=True)
    assert (directions.mean(0).abs() < 0.01).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_infinite_D_is_a_diffusion_models_noise_bit_for_bit(dtype):
    y, sigma = torch.zeros(5, 3, 4, dtype=dtype), torch.linspace(0.1, 80, 5, dtype=dtype)
    gaussian = torch.randn(5, 3, 4, generator=generator(), dtype=dtype)
    assert torch.equal(perturb(y, sigma, math.inf, generator()), sigma[:, None, None] * gaussian)
    assert torch.equal(student_t_noise((5, 3, 4), math.inf, generator(), dtype), gaussian)


def test_a_large_D_tends_to_the_gaussian_of_the_same_draw():
    gaussian = torch.randn(500, 64, generator=generator(), dtype=torch.float64)
    assert (student_t_noise((500, 64), 1e9, generator(), torch.float64) - gaussian).abs().max() < 1e-3
    assert (student_t_noise((500, 64), 16, generator(), torch.float64) - gaussian).abs().max() > 0.1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3000), st.floats(0.5, 1e8), st.floats(0.01, 0.99))
def test_quantiles_are_those_of_the_beta_form(N, D, q):
    b = stats.beta(N / 2, D / 2).ppf(q)
    assert float(radius_quantiles(N, D, q)) == pytest.approx(math.sqrt(D * b / (1 - b)), rel=1e-5)


def test_quantiles_tell_the_spread():
    draws = student_t_noise((DRAWS, 8), 3, generator(), torch.float64).norm(dim=1)
    q = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert torch.allclose(radius_quantiles(8, 3, q), draws.quantile(q), rtol=0.02)
    low, high = radius_quantiles(3072, 2048, [0.1587, 0.8413])
    assert float((high - low) / (high + low)) == pytest.approx(math.sqrt(1 / 6144 + 1 / 4096), rel=0.02)
    assert float(radius_quantiles(64, math.inf, 0.5)) == pytest.approx(float(radius_quantiles(64, 1e12, 0.5)), rel=1e-9)


def by_hand(x, sigma, data, D, weights=None):
    """The posterior mean, one term after the other."""
    rows, N = [], x[0].numel()
    for each, level in zip(x.double(), sigma.double(), strict=True):
        distances = torch.stack([(each - y).square().sum() for y in data.double()])
        logits = -0.5 * (N + D) * torch.log(distances + D * level**2) + (0 if weights is None else weights.double().log())
        shares = torch.exp(logits - logits.max())
        rows.append(sum(share * y for share, y in zip(shares / shares.sum(), data.double(), strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("D", [0.5, 1, 7.5, 64, 2048])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_posterior_mean_is_the_sum_by_hand_whatever_the_pieces(D, weighted, monkeypatch):
    data, x = torch.randn(40, 2, 3, dtype=torch.float64), 3 * torch.randn(9, 2, 3, dtype=torch.float64) + 5
    sigma, weights = torch.logspace(-1, 1, 9, dtype=torch.float64), (torch.arange(40.0) if weighted else None)
    exact = by_hand(x, sigma, data, D, weights)
    assert torch.allclose(posterior_mean(x, sigma, data, D, weights), exact, atol=1e-10, rtol=1e-10)
    monkeypatch.setattr(module, "PIECE", 42)  # seven points and five rows at a time
    assert torch.allclose(posterior_mean(x, sigma, data, D, weights), exact, atol=1e-10, rtol=1e-10)
    means = posterior_mean(x, sigma, data, D)
    assert (means >= data.amin(0) - 1e-12).all()
    assert (means <= data.amax(0) + 1e-12).all()


def test_a_large_D_weighs_as_a_gaussian():
    data, x = torch.randn(16, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    sigma = torch.tensor([0.3, 0.5, 1, 3, 10], dtype=torch.float64)
    gaussian = torch.softmax(-(torch.cdist(x, data) ** 2) / (2 * sigma[:, None] ** 2), 1) @ data
    assert (posterior_mean(x, sigma, data, 1e8) - gaussian).abs().max() < 1e-6
    assert (posterior_mean(x, sigma, data, 1e14) - gaussian).abs().max() < 1e-6, "1 + R^2 / r^2 has no digits left"
    assert torch.allclose(posterior_mean(x, sigma, data, math.inf), gaussian, atol=1e-12)
    assert (posterior_mean(x, sigma, data, 16) - gaussian).abs().max() > 1e-2


def test_at_D_1_the_field_is_PFGMs():
    data, x, sigma = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64), torch.tensor([0.2, 1.0, 5.0]).double()
    sizes = 1 / (torch.cdist(x, data) ** 2 + sigma[:, None] ** 2) ** ((4 + 1) / 2)  # r = sigma
    pfgm = sizes @ data / sizes.sum(1, keepdim=True)
    assert torch.allclose(posterior_mean(x, sigma, data, 1), pfgm, atol=1e-12)


def test_far_and_near_states_lose_no_digits():
    data = torch.randn(5, 6, generator=generator(), dtype=torch.float64)
    x, sigma = torch.stack([data[2] + 1e-4, 1e6 * data[3], data.mean(0)]), torch.tensor([0.002, 80.0, 0.3], dtype=torch.float64)
    exact = by_hand(x, sigma, data, 2)
    assert torch.allclose(posterior_mean(x, sigma, data, 2), exact, atol=1e-8)
    far = 2.0**20  # from the origin
    assert torch.allclose(posterior_mean(x + far, sigma, data + far, 2) - far, exact, atol=1e-6)
    charges = 1e6 * torch.randn(50, 40, generator=generator(), dtype=torch.float64)
    assert torch.allclose(posterior_mean(charges, torch.full((50,), 1e-6), charges, 2), charges)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest array that was made, beside those that were there."""

    def __init__(self, *there):
        super().__init__()
        self.there, self.bytes = {each.untyped_storage().data_ptr() for each in there}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self.there:
            self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("weights", [None, torch.linspace(0.1, 1, 400)])
def test_the_field_of_many_images_takes_little_memory(weights, monkeypatch):
    """No working array is larger than a piece, whatever the sizes; ten pieces are less than 256 MiB."""
    assert 10 * 8 * module.PIECE < 256 * 2**20
    monkeypatch.setattr(module, "PIECE", 2**12)
    x, data = torch.randn(40, 150), torch.randn(400, 150)
    with Largest(x, data) as watched:
        answer = posterior_mean(x, torch.ones(40), data, 8, weights)
    assert answer.nbytes <= watched.bytes <= 8 * 2**12


def test_single_numbers_and_no_states_are_samples_too():
    data, sigma = torch.randn(5, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    flat, column = (posterior_mean(each, sigma, data.reshape(shape), 2) for each, shape in ((data[:3], (5,)), (data[:3, None], (5, 1))))
    assert torch.equal(flat, column[:, 0])
    assert posterior_mean(torch.zeros(0, 2), torch.zeros(0), torch.ones(4, 2), 2).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_and_layout_is_right_to_its_precision(dtype):
    y = torch.randn(4, 3, 5, 2, dtype=torch.float64).transpose(1, 3)  # not contiguous
    sigma = torch.full((4,), 0.5)
    given_y = y.to(dtype)
    x = perturb(given_y, sigma, 64, generator())
    assert x.dtype == dtype
    assert torch.equal(given_y, y.to(dtype))
    exact = y.to(dtype).double() + 0.5 * student_t_noise(
        y.shape, 64, generator(), torch.float64 if dtype == torch.float64 else torch.float32
    )
    assert torch.allclose(x.double(), exact, atol=8 * torch.finfo(dtype).eps)
    mean = posterior_mean(x, sigma, given_y, 64)
    assert mean.dtype == dtype
    assert torch.allclose(mean.double(), by_hand(x, sigma, given_y, 64), atol=8 * torch.finfo(dtype).eps)
    assert perturb(given_y[:1], sigma[:1], 64).shape == (1, 2, 5, 3)


def test_a_generator_replays_and_two_ranks_differ():
    one, again, other = (student_t_noise((8, 4), 2.5, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("D", [0, -3, math.nan, -math.inf, "64", True])
def test_a_D_that_is_no_number_above_0_is_refused(D):
    x = torch.zeros(2, 3)
    for call in (
        lambda: student_t_noise((2, 3), D),
        lambda: perturb(x, torch.ones(2), D),
        lambda: posterior_mean(x, torch.ones(2), x, D),
        lambda: radius_quantiles(3, D, 0.5),
    ):
        with pytest.raises(ValueError, match="D is .*; expected a number above 0"):
            call()


@pytest.mark.parametrize(
    ("sigma", "words"),
    [
        (torch.tensor([1.0, 0.0]), "sigma holds 0.0"),
        (torch.tensor([1.0, -1.0]), "sigma holds -1.0"),
        (torch.tensor([1.0, math.nan]), "sigma holds nan"),
        (torch.ones(3), r"sigma is \(3,\); expected a tensor \(2,\)"),
        (torch.ones(2, 1), r"sigma is \(2, 1\)"),
        (1.0, "sigma is '?1.0"),
    ],
)
def test_noise_levels_that_cannot_be_are_refused(sigma, words):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=words):
        perturb(x, sigma, 2)
    with pytest.raises(ValueError, match=words):
        posterior_mean(x, sigma, x, 2)


def test_data_that_cannot_be_are_refused():
    x, ones = torch.zeros(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="y is .*uint8; expected floating-point"):
        perturb(torch.zeros(2, 3, dtype=torch.uint8), ones, 2)
    with pytest.raises(ValueError, match="data is .*int64; expected floating-point"):
        posterior_mean(x, ones, torch.zeros(4, 3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"data is \(4, 2\); expected \(M, 3\)"):
        posterior_mean(x, ones, torch.zeros(4, 2), 2)
    for weights in (torch.ones(3), torch.tensor([1.0, -1]), torch.zeros(2), torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match="weights are"):
            posterior_mean(x, ones, x, 2, weights)
    with pytest.raises(ValueError, match="q is"):
        radius_quantiles(3, 2, 1.0)
    with pytest.raises(ValueError, match="N is"):
        radius_quantiles(0, 2, 0.5)
    with pytest.raises(ValueError, match="shape"):
        student_t_noise((), 2)
    with pytest.raises(ValueError, match="dtype"):
        student_t_noise((2,), 2, dtype=torch.int64)
