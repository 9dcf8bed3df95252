"""The digits' diffusion models: images, network, training, references, and the distance that judges samples."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from fewer.errors import UserError
from fewer.tasks import frechet_distance, load_digits_diffusion
from fewer.tasks.digit_denoiser import DenoiserRecipe, DigitDenoiser, draw_sigma, loss_weight, lr_at, preconditioning, train_denoiser
from fewer.tasks.digit_features import DigitFeatures, train_features
from fewer.tasks.digit_sampling import SIGMA_MAX, SIGMA_MIN, unipc
from fewer.tasks.digits_diffusion import RECIPES, DigitsDiffusion, digit_images
from fewer.tasks.tile_denoiser import TileDenoiser, TileRecipe, train_tiles

SMALL = DenoiserRecipe(side=8, width=32, blocks=1, classes=10, steps=40, batch=64, warm_up=5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def digits():
    return digit_images("digits8", "train")


@pytest.fixture
def small(tmp_path):
    """A model with random weights that are not zero anywhere."""
    torch.manual_seed(0)
    denoiser = DigitDenoiser(SMALL)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return DigitsDiffusion("mnist16", denoiser.eval().requires_grad_(False), tmp_path / "small")


def test_the_network_of_mnist16_has_two_million_parameters():
    assert sum(p.numel() for p in DigitDenoiser(RECIPES["mnist16"]).parameters()) == pytest.approx(2.07e6, rel=2e-3)


def test_the_preconditioning_keeps_inputs_and_targets_at_unit_size():
    sigma = torch.logspace(-2, 2, 20, dtype=torch.float64)
    c_in, c_skip, c_out = preconditioning(sigma)
    clean, noise = 0.5**2, sigma**2  # variances
    assert torch.allclose(c_in**2 * (clean + noise), torch.ones(20, dtype=torch.float64))
    target = ((1 - c_skip) ** 2 * clean + c_skip**2 * noise) / c_out**2
    assert torch.allclose(target, torch.ones(20, dtype=torch.float64))
    assert torch.allclose(loss_weight(sigma) * c_out**2, torch.ones(20, dtype=torch.float64))


def test_an_untrained_denoiser_answers_what_preconditioning_says(digits):
    x = digits[0][:5]
    assert torch.allclose(DigitDenoiser(SMALL)(x, 0.5), x / 2)


def test_noise_levels_are_mostly_log_normal_and_cover_a_wide_range():
    sigma = draw_sigma(SMALL, 100_000, torch.Generator().manual_seed(0)).log().numpy()
    assert np.median(sigma) == pytest.approx(-1.2, abs=0.1)
    assert (sigma > math.log(80)).mean() > 0.004
    assert sigma.max() < math.log(160) + 3


def test_the_learning_rate_rises_and_falls_in_lines():
    rates = [lr_at(SMALL, step) for step in range(SMALL.steps)]
    assert max(rates) == SMALL.lr
    assert rates[0] == SMALL.lr / 5
    assert rates[-1] == pytest.approx(SMALL.lr / 35)


def test_training_lowers_the_loss_and_is_the_same_again(digits):
    told: list[str] = []
    images, labels = digits
    model = train_denoiser(SMALL, images, labels, lambda step, steps, words: told.append(words))
    again = train_denoiser(SMALL, images, labels, lambda *_: None)
    sigma = torch.full((len(images),), 0.3)
    noisy = images + 0.3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))

    def error(denoiser: DigitDenoiser) -> float:
        return (denoiser(noisy, sigma, labels) - images).square().mean().item()

    longer = train_denoiser(dataclasses.replace(SMALL, steps=200), images, labels, lambda *_: None)
    assert error(longer) < error(model) < error(DigitDenoiser(SMALL))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert told[0].startswith("the digits' diffusion model learns")


def test_mnist16_has_the_deviation_that_the_preconditioning_expects():
    images, labels = digit_images("mnist16", "test")
    assert images.shape == (10_000, 1, 16, 16)
    assert labels.shape == (10_000,)
    assert digit_images("mnist16", "train")[0].std().item() == pytest.approx(0.5025, abs=5e-4)


def test_training_and_test_digits_share_no_image(digits):
    held_out, _ = digit_images("digits8", "test")
    assert (len(digits[0]), len(held_out)) == (1400, 397)
    assert digits[0].min() == -1
    assert digits[0].max() == 1


def test_the_noise_prediction_and_the_denoised_image_add_up(small):
    class Halfway:
        def time(self, timestep):
            return torch.as_tensor(timestep) / 1000

        def alpha(self, t):
            return torch.full_like(t, 0.8)

        def sigma(self, t):
            return torch.full_like(t, 0.6)

    x, label = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, -1, 9])
    model = small.epsilon(Halfway())
    clean = small.denoiser(x / 0.8, 0.75, label)
    for t in (500, torch.full((4,), 500)):
        assert torch.allclose(0.8 * clean + 0.6 * model(x, t, class_labels=label).sample, x, atol=1e-5)


def test_guidance_goes_from_no_label_through_the_label_and_on(small):
    x, label = torch.randn(3, 1, 8, 8), torch.tensor([0, 4, 9])
    plain, conditional = small.denoiser(x, 2.0), small.denoiser(x, 2.0, label)
    assert not torch.allclose(plain, conditional)
    assert torch.allclose(small.guided(0.0, label)(x, 2.0), plain, atol=1e-6)
    assert torch.allclose(small.guided(1.0, label)(x, 2.0), conditional, atol=1e-6)
    assert torch.allclose(small.guided(4.0, label)(x, 2.0), plain + 4 * (conditional - plain), atol=1e-5)


def test_the_reference_solver_follows_the_exact_flow_of_a_gaussian():
    mean, deviation = 0.3, 0.4
    x = SIGMA_MAX * torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(x, sigma):
        return (deviation**2 * x + sigma**2 * mean) / (deviation**2 + sigma**2)

    exact = mean + (x - mean) * math.sqrt((deviation**2 + SIGMA_MIN**2) / (deviation**2 + SIGMA_MAX**2))
    assert (unipc(denoise, x) - exact).abs().max() < 1e-4


def test_a_reference_is_made_once(small, monkeypatch):
    x = 80 * torch.randn(2, 1, 8, 8)
    first = small.reference(x, scale=2.0, label=torch.tensor([3, 5]))
    monkeypatch.setattr(small.denoiser, "forward", None)
    assert torch.equal(small.reference(x, scale=2.0, label=torch.tensor([3, 5])), first)
    with pytest.raises(TypeError):
        small.reference(x, scale=3.0, label=torch.tensor([3, 5]))


def test_the_judge_tells_digits_apart(digits):
    judge = train_features(*digits)
    images, labels = digit_images("digits8", "test")
    assert (judge(images).argmax(1) == labels).float().mean() > 0.85
    assert DigitFeatures(16).features(torch.zeros(3, 1, 16, 16)).shape == (3, 64)


def test_the_frechet_distance_is_the_one_with_a_matrix_root():
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(200, 6)) @ draw.normal(size=(6, 6)), draw.normal(size=(300, 6)) + 1
    c_a, c_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    by_root = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c_a + c_b - 2 * scipy.linalg.sqrtm(c_a @ c_b).real)
    assert frechet_distance(a, b) == pytest.approx(by_root, rel=1e-8)


def test_what_is_asked_for_wrongly_is_refused(small):
    with pytest.raises(UserError, match="no kind 'mnist17'; expected one of digits8, mnist16, mnist28"):
        load_digits_diffusion("mnist17")
    with pytest.raises(ValueError, match="expected 'train' or 'test'"):
        digit_images("digits8", "validation")
    with pytest.raises(ValueError, match="give label"):
        small.reference(torch.zeros(1, 1, 8, 8), scale=2.0)
    with pytest.raises(ValueError, match="knows no labels"):
        dataclasses.replace(small, kind="digits8").guided(2.0, torch.tensor([1]))


def test_the_model_of_pieces_learns_and_takes_any_size_a_flag_and_reaches_into_its_attention():
    images, labels = torch.randn(20, 1, 32, 32).clamp(-1, 1), torch.arange(20) % 10
    net = train_tiles(TileRecipe(steps=3, batch=8), images, labels, lambda *said: None)
    assert not net.training
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(456e3, rel=0.01)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, label, kept = torch.randn(2, 1, 20, 32), torch.tensor([3, -1]), []
    plain = net(x, 0.7, label, keep=lambda map_, grid: kept.append((map_, grid)))
    assert plain.shape == x.shape
    ((map_, grid),) = kept
    assert (grid, map_.shape) == ((5, 8), (2, 40, 4))
    torch.testing.assert_close(map_.sum(-1), torch.ones(2, 40))
    same = net(x, 0.7, label, mix=lambda out, values, grid: out)
    other = net(x, 0.7, label, mix=lambda out, values, grid: out + kept[0][0] @ values)
    assert torch.equal(same, plain)
    assert not torch.allclose(other, plain)
    assert not torch.allclose(net(x, 0.7, label, flag=1), plain)
    torch.testing.assert_close(net(x, 0.7, label, flag=torch.tensor([1, 0]))[1:], plain[1:])
    torch.testing.assert_close(net(x[1:], 0.7), plain[1:])


def test_the_model_of_pieces_has_images_twice_as_large_and_no_reference(small):
    made = dataclasses.replace(small, kind="mnist_tiles")
    assert made.shape == (1, 32, 32)
    with pytest.raises(ValueError, match="expected another kind"):
        made.reference(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="divisible by 4"):
        TileDenoiser(TileRecipe())(torch.zeros(1, 1, 30, 32), 1.0)
