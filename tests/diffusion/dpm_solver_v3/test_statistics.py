"""The statistics against what is known of Gaussians, numpy's regression and finite differences; files; the scheduler in diffusers; bad input."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from exact_flows import EDM, flow, grid, mixture, noise_of, randn, wavy
from PIL import Image

from fewer.diffusion import EMS, DPMSolverV3Scheduler, estimate_ems, model_hash, sample
from fewer.diffusion._shared import GaussianMixture, NoiseSchedule, as_epsilon
from fewer.diffusion.dpm_solver_v3.command import ems as ems_command
from fewer.diffusion.dpm_solver_v3.estimation import f_and_derivative, point_terms, regression

VP = NoiseSchedule.from_diffusers(DDPMScheduler())


@pytest.mark.parametrize("mode", ["forward", "double-backward"])
def test_the_statistics_of_a_gaussian_are_the_known_ones(mode):
    mu, deviation = torch.tensor([0.5, -1.0, 0.2]).double(), torch.tensor([0.3, 0.7, 1.1]).double()
    gaussian = GaussianMixture(mu[None], torch.ones(1).double(), deviation[None] ** 2)
    ems = estimate_ems(noise_of(gaussian), EDM, gaussian.draw(64), 120, 64, progress=False, mode=mode)
    l = 1 / (1 + deviation**2 * (2 * ems.lambdas[:, None]).exp())  # noqa: E741
    assert (ems.l - l).abs().max() < 1e-6
    assert torch.equal(ems.s, torch.zeros_like(ems.s))
    assert (ems.b - 2 * l * (1 - l) * mu)[1:-1].abs().max() < 2e-3  # l' is one-sided at the ends


def test_l_of_a_correlated_gaussian_is_the_diagonal_of_the_jacobian():
    root = randn(4, 4)
    covariance = root @ root.T

    def eps(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return t * torch.linalg.solve(covariance + t**2 * torch.eye(4).double(), x.T).T

    count, i = 256, 12
    ems = estimate_ems(eps, EDM, randn(count, 4) @ root.T, 24, count, progress=False)
    t = torch.exp(-ems.lambdas[i])
    jacobian = t * torch.autograd.functional.jacobian(lambda x: eps(x[None], t)[0], randn(4))
    others = (jacobian.square().sum(1) - jacobian.diagonal().square()).sqrt()  # deviation of one probe
    assert ((ems.l[i] - jacobian.diagonal()).abs() < 4 * others / math.sqrt(count)).all()


def test_s_and_b_are_numpys_line_through_the_samples():
    data, lambda_ = mixture(3, 4), torch.tensor(1.0, dtype=torch.float64)
    clean = data.draw(200, torch.Generator().manual_seed(0))
    terms = point_terms(noise_of(data), EDM, clean, randn(200, 3), torch.ones(200, 3).double(), lambda_)
    l, slope = torch.tensor([0.9, 0.5, 0.2]).double(), torch.tensor([-0.3, 0.4, 0.1]).double()  # noqa: E741
    f, derivative = f_and_derivative(terms, l, slope)
    s, b = regression(terms.moments().divided_by(200), l, slope)
    for i in range(3):
        line = np.polyfit(f[:, i].numpy(), derivative[:, i].numpy(), 1)
        assert [float(s[i]), float(b[i])] == pytest.approx(line.tolist(), rel=1e-8, abs=1e-8)


def test_the_total_derivative_of_f_is_its_slope_along_the_flow():
    data, lambda_, h = mixture(3, 4), torch.tensor(0.7, dtype=torch.float64), 1e-3
    x = data.draw(20, torch.Generator().manual_seed(0)) + math.exp(-0.7) * randn(20, 3)
    l, slope = 0.6, -0.3  # noqa: E741

    def f(at: float) -> torch.Tensor:
        sigma, moved = math.exp(-at), flow(data, x, math.exp(-0.7), math.exp(-at), 20)
        return sigma * noise_of(data)(moved, sigma) - (l + slope * (at - 0.7)) * moved

    terms = point_terms(noise_of(data), EDM, x, torch.zeros_like(x), torch.ones_like(x), lambda_)
    _, derivative = f_and_derivative(terms, torch.tensor(l).double(), torch.tensor(slope).double())
    assert torch.allclose(derivative, (f(0.7 + h) - f(0.7 - h)) / (2 * h), atol=1e-5)


def test_without_common_noise_l_is_a_noisy_curve():
    data = mixture(8, 6)
    draw = torch.Generator().manual_seed(0)
    points = data.draw(64, draw)

    def roughness(common: bool) -> float:
        ems = estimate_ems(noise_of(data), EDM, points, 40, 64, common_noise=common, generator=draw, progress=False)
        return float(ems.l.diff(n=2, dim=0).square().mean())

    assert roughness(True) < 0.1 * roughness(False)


def test_scalar_statistics_are_means_and_hold_for_every_shape(ems):
    scalar = ems.scalar()
    assert scalar.sample_shape == (1, 1, 1)
    assert torch.allclose(scalar.s.flatten(), ems.s.mean((1, 2, 3)))
    assert sample(lambda x, t: x, torch.ones(1, 3, 5, 5), VP, scalar, 4).shape == (1, 3, 5, 5)


# Bad input

LINEAR = NoiseSchedule.linear()
COARSE = EMS.data_prediction(grid(24, LINEAR))


def still(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize(
    ("ems", "schedule", "steps", "options", "words"),
    [
        (wavy(grid(24, LINEAR), 3), LINEAR, 5, {}, "samples are (2,), the EMS are for (3,); estimate EMS for this shape"),
        (COARSE, EDM, 5, {}, "use the schedule that they were estimated on"),
        (EMS.data_prediction(grid(24)), NoiseSchedule.edm(0.02, 80.0), 5, {}, "the schedule runs from sigma / alpha = 80"),
        (COARSE, LINEAR, 25, {}, "raise num_timesteps"),
        (COARSE, LINEAR, 20, {"spacing": "edm"}, "fall on one of the EMS' grid points"),
        (COARSE, LINEAR, 5, {"solver_order": 5}, "solver_order is 5; expected 1 to 4"),
        (COARSE, LINEAR, 5, {"solver_order": 0}, "solver_order is 0; expected 1 to 4"),
        (COARSE, LINEAR, 5, {"corrector": "some"}, "corrector is 'some'; expected one of none, full, half"),
        (COARSE, LINEAR, 0, {}, "steps is 0; expected a whole number of at least 1"),
    ],
)
def test_a_sampling_that_cannot_be_is_refused_with_the_remedy(ems, schedule, steps, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        sample(still, torch.zeros(1, 2), schedule, ems, steps, **options)


def test_statistics_that_are_not_finite_are_refused_with_their_place():
    bad = torch.zeros(25)
    bad[7] = torch.nan
    with pytest.raises(ValueError, match=f"s is not finite at lambda = {float(COARSE.lambdas[7]):.4f}"):
        replace(COARSE, s=bad)
    with pytest.raises(ValueError, match="expected \\[N \\+ 1\\]"):
        replace(COARSE, s=torch.zeros(24))
    with pytest.raises(ValueError, match="equal steps"):
        replace(COARSE, lambdas=COARSE.lambdas.flip(0))


def test_another_models_statistics_are_refused(tmp_path, unet, ems):
    ems.save_pretrained(tmp_path)
    torch.manual_seed(1)
    other = UNet2DModel.from_config(unet.config)
    with pytest.raises(ValueError, match="estimate EMS for this checkpoint"):
        EMS.from_pretrained(tmp_path, model=other)
    with pytest.raises(FileNotFoundError, match="has no ems.safetensors"):
        EMS.from_pretrained(tmp_path / "nowhere")


def test_data_that_the_model_does_not_take_are_refused(unet):
    with pytest.raises(ValueError, match="does not take samples .*give data of its own shape"):
        estimate_ems(as_epsilon(unet, VP), VP, torch.zeros(64, 3, 8, 8), 8, 64, progress=False)
    with pytest.raises(ValueError, match="expected the shape of x"):
        estimate_ems(lambda x, t: x[:, :1], VP, torch.zeros(64, 3), 8, 64, progress=False)
    with pytest.raises(ValueError, match="expected float32 or float64 samples"):
        estimate_ems(still, VP, torch.zeros(64, 3, dtype=torch.uint8), 8, 64, progress=False)
    with pytest.raises(ValueError, match="derivatives in half precision are noise"):
        estimate_ems(still, VP, torch.zeros(64, 3, dtype=torch.bfloat16), 8, 64, progress=False)


class NoForward(torch.autograd.Function):
    """A tanh that has a backward alone."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (1 - torch.tanh(ctx.saved_tensors[0]) ** 2)


def test_a_network_without_forward_derivatives_is_differentiated_the_other_way():
    with pytest.raises(ValueError, match='mode="double-backward"'):
        estimate_ems(lambda x, t: NoForward.apply(x), LINEAR, randn(64, 2), 8, 64, progress=False, mode="forward")
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    ours = estimate_ems(lambda x, t: NoForward.apply(x), LINEAR, randn(64, 2), 8, 64, generator=draws[0], progress=False)
    twin = estimate_ems(lambda x, t: torch.tanh(x), LINEAR, randn(64, 2), 8, 64, generator=draws[1], progress=False)
    assert torch.allclose(ours.s, twin.s, atol=1e-5)


def test_of_diffusers_u_nets_statistics_can_be_estimated_by_default(unet):
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ems = estimate_ems(as_epsilon(unet, VP), VP, images, 2, 64, progress=False)
    assert ems.sample_shape == (1, 8, 8)


def test_labels_follow_their_samples_through_the_batches():
    """A network whose answer is its label's: batches of 24, 24 and 16 of 64 labels."""
    labels, seen = torch.arange(64), []
    data = labels.double()[:, None].expand(64, 2)

    def network(x, timestep, class_labels):
        seen.append(class_labels)
        return x * class_labels[:, None]

    eps = as_epsilon(network, DDPMScheduler(), class_labels=labels)
    ems = estimate_ems(eps, VP, data, 2, 64, 24, progress=False)
    assert torch.cat(seen[3:9:2]).sort().values.tolist() == labels.tolist()  # after the trials, each batch twice
    sigma = VP.sigma(VP.inverse(ems.lambdas))
    assert torch.allclose(ems.l[:, 0].double(), sigma * labels.double().mean(), rtol=1e-5)
    one = as_epsilon(lambda x, t, y: x * y, DDPMScheduler(), y=torch.ones(1, 1).double())
    assert estimate_ems(one, VP, data, 2, 64, 24, progress=False).l.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gaussian_has_no_slope_whatever_the_precision(dtype):
    """What varies by no more than its own type rounds does not vary."""
    draw = torch.Generator().manual_seed(0)
    data = 0.5 * torch.randn(512, 4, generator=draw, dtype=dtype)
    edm = NoiseSchedule.edm()
    ems = estimate_ems(lambda x, t: x * t.to(x) / (0.25 + t.to(x) ** 2), edm, data, 60, 512, generator=draw, progress=False)
    assert ems.s.abs().max() < 1e-6
    noise = 80 * torch.randn(64, 4, generator=draw, dtype=dtype)
    end = sample(lambda x, t: x * t.to(x) / (0.25 + t.to(x) ** 2), noise, edm, ems, 5)
    assert torch.allclose(end, noise * math.sqrt((0.25 + 0.002**2) / (0.25 + 80**2)), atol=1e-2)


def test_few_samples_are_warned_of():
    with pytest.warns(UserWarning, match="63 samples give noisy statistics"):
        estimate_ems(still, LINEAR, randn(63, 2), 4, 63, progress=False)


# `fewer ems`


@pytest.fixture
def files(tmp_path, unet):
    """A model's directory and one of images."""
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def test_the_verb_writes_statistics_that_the_scheduler_takes(files, unet, monkeypatch, capsys):
    monkeypatch.chdir(files)
    ems_command(Path("model"), Path("images"), Path("ems"), timesteps=8, samples=64, as_json=True)
    assert json.loads(capsys.readouterr().out) == {
        "out": "ems",
        "timesteps": 8,
        "samples": 64,
        "shape": [1, 8, 8],
        "model": model_hash(unet),
    }
    written = EMS.from_pretrained(files / "ems", model=unet)
    DPMSolverV3Scheduler(written).set_timesteps(5)


def test_what_is_no_model_and_a_directory_of_the_users_own_are_refused(files):
    with pytest.raises(FileNotFoundError, match="has no unet/config.json"):
        ems_command(files / "images", files / "images", files / "ems")
    with pytest.raises(FileNotFoundError, match="no pictures"):
        ems_command(files / "model", files / "model", files / "ems")
    assert not (files / "ems").exists()
    (files / "ems").mkdir()
    (files / "ems" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError):
            ems_command(files / "model", files / "images", files / "ems", overwrite=overwrite)
    assert (files / "ems" / "mine.txt").read_text() == "mine"
