"""A small U-Net of diffusers and its statistics."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from fewer.diffusion import EMS, estimate_ems
from fewer.diffusion._shared import NoiseSchedule, as_epsilon

VP = NoiseSchedule.from_diffusers(DDPMScheduler())


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
def ems(unet) -> EMS:
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return estimate_ems(as_epsilon(unet, VP), VP, images, 24, 64, 64, progress=False, model=unet, mode="double-backward")
