"""What the tests of samplers share: a small mixture, its flow, noise to start from, and a cache of the tests' own."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from hosts import write_pipelines
from small_mixture import ENDS

from fewer.diffusion._shared.problems import mixture_flow, random_mixture


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FEWER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def mixture():
    return random_mixture(4, 3)


@pytest.fixture
def noise():
    return ENDS[0] * torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def flow(mixture):
    return mixture_flow(mixture, *ENDS)


@pytest.fixture(scope="session")
def unet() -> UNet2DModel:
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory):
    """Directories of tiny pipelines: "plain", "labels", "dit" (with labels), "text"."""
    root = tmp_path_factory.mktemp("pipelines")
    write_pipelines(root)
    return root
