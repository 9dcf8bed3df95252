"""The peers of the area's samplers: their order on exact flows, their calls, the error after N of them, and pipelines as flows."""

from __future__ import annotations

import itertools

import pytest
import torch
from PIL import Image
from small_mixture import ENDS, typical

from fewer.diffusion._shared.peers import PEERS, by_diffusers, by_heun, errors_after, solve_by
from fewer.diffusion._shared.pipelines import GUIDANCE, open_pipeline
from fewer.diffusion._shared.problems import exact_ends
from fewer.diffusion._shared.spacing import noise_levels

pytestmark = pytest.mark.usefixtures("cache")


class Counted:
    """A denoiser that counts its calls."""

    def __init__(self, denoise):
        self.denoise, self.calls = denoise, 0

    def __call__(self, x, sigma):
        self.calls += 1
        return self.denoise(x, sigma)


@pytest.mark.parametrize("name", [name for name in PEERS if name != "heun"])
def test_a_peer_follows_the_exact_flow_with_one_call_a_step(name, flow, noise):
    exact, counted = flow.reference(noise), Counted(flow.denoise)
    few, many = (typical(by_diffusers(name, counted, noise, noise_levels(*ENDS, steps)), exact) for steps in (20, 160))
    assert counted.calls == 180
    order = 1 if name == "ddim" else 2
    assert many < few / (0.6 * 8**order)
    assert many < 0.02


def test_ddim_is_the_exact_step_for_a_constant_answer(flow, noise):
    levels = noise_levels(*ENDS, 7)
    x = noise
    for sigma, following in itertools.pairwise(levels.tolist()):
        clean = flow.denoise(x, sigma)
        x = clean + following / sigma * (x - clean)
    torch.testing.assert_close(by_diffusers("ddim", flow.denoise, noise, levels), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("calls", [9, 10, 40])
def test_heun_makes_the_calls_it_is_given(calls, flow, noise):
    counted = Counted(flow.denoise)
    end = by_heun(counted, noise, *ENDS, calls)
    assert counted.calls == calls
    if calls == 40:
        assert typical(end, flow.reference(noise)) < typical(by_heun(flow.denoise, noise, *ENDS, 20), flow.reference(noise)) / 3


def test_exact_ends_are_those_of_the_flow_and_are_made_once(mixture, noise, monkeypatch):
    ends = exact_ends(mixture, noise, *ENDS)
    torch.testing.assert_close(ends, mixture.transport(noise, *ENDS))
    monkeypatch.setattr(type(mixture), "transport", lambda *_: pytest.fail("made twice"))
    assert torch.equal(exact_ends(mixture, noise, *ENDS), ends)


def test_the_error_after_calls_is_the_distance_to_the_reference(flow, noise):
    found = dict(errors_after(solve_by("dpm++2m"), flow, noise, (5, 10)))
    end = by_diffusers("dpm++2m", flow.denoise, noise, noise_levels(*ENDS, 10))
    assert found[10] == float((end - flow.reference(noise)).square().mean().sqrt())
    assert found[10] < found[5]
    with pytest.raises(ValueError, match="name is 'dpm'; expected one of dpm"):
        solve_by("dpm")


# A user's own pipeline


@pytest.mark.parametrize(("kind", "guided"), [("plain", False), ("labels", False), ("dit", True), ("text", True)])
def test_a_pipeline_is_a_flow_with_its_own_conditions(pipelines, kind, guided):
    pipeline = open_pipeline(pipelines / kind)
    flow = pipeline.flow()
    x = flow.noise(3, *pipeline.shape, generator=torch.Generator().manual_seed(0))
    t = pipeline.schedule.time(pipeline.schedule.timestep(pipeline.schedule.inverse(torch.tensor(0.0).double())))
    alpha, sigma = (float(each(t)) for each in (pipeline.schedule.alpha, pipeline.schedule.sigma))
    said = pipeline.network(alpha * x, pipeline.schedule.timestep(t).expand(3), **pipeline.plain(3)).sample[:, : x.shape[1]]
    noise = said if pipeline.prediction_type == "epsilon" else alpha * said + sigma * alpha * x
    torch.testing.assert_close(flow.denoise(x, 1.0), x - noise, rtol=1e-4, atol=1e-4)
    assert flow.ends == pytest.approx(pipeline.ends)
    assert pipeline.can_be_guided == guided
    assert solve_by("dpm++2m")(flow, x, 3).isfinite().all()
    if guided:
        draw = torch.Generator().manual_seed(1)
        towards = pipeline.guided(3, draw)
        conditional = pipeline.denoiser(lambda _: pipeline.drawn(3, torch.Generator().manual_seed(1)))
        nothing, scale = flow.denoise(x, 1.0), GUIDANCE["text" if kind == "text" else "labels"]
        torch.testing.assert_close(towards.denoise(x, 1.0), nothing + scale * (conditional(x, 1.0) - nothing), rtol=1e-4, atol=1e-3)


def test_a_pipelines_images_are_read_as_its_network_sees_them(pipelines, tmp_path):
    for i in range(3):
        Image.new("RGB", (16, 16), (255, 0, 40 * i)).save(tmp_path / f"{i}.png")
    assert open_pipeline(pipelines / "dit").read(tmp_path).shape == (3, 4, 8, 8)
    with pytest.raises(ValueError, match="expected 8 x 8"):
        open_pipeline(pipelines / "plain").read(tmp_path)


def test_a_directory_that_is_no_pipeline_of_ours_is_refused(pipelines, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a diffusers pipeline"):
        open_pipeline(tmp_path)
    for part in ("unet", "scheduler"):
        (tmp_path / part).mkdir()
        for file in (pipelines / "plain" / part).iterdir():
            (tmp_path / part / file.name).write_bytes(file.read_bytes())
    weights, config = (tmp_path / "unet" / name for name in ("diffusion_pytorch_model.safetensors", "config.json"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="unet cannot be opened"):
        open_pipeline(tmp_path)
    weights.write_bytes(whole)
    config.write_text(config.read_text().replace("UNet2DModel", "StableCascadeUNet"))
    with pytest.raises(ValueError, match="names the class 'StableCascadeUNet'; expected one of UNet2DModel"):
        open_pipeline(tmp_path)
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ValueError, match="scheduler_config.json is not JSON"):
        open_pipeline(tmp_path)
