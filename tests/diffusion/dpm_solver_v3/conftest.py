"""Statistics of the small U-Net."""

from __future__ import annotations

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from fewer.diffusion import EMS, estimate_ems
from fewer.diffusion._shared import NoiseSchedule, as_epsilon

VP = NoiseSchedule.from_diffusers(DDPMScheduler())


@pytest.fixture(scope="session")
def ems(unet) -> EMS:
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return estimate_ems(as_epsilon(unet, VP), VP, images, 24, 64, 64, progress=False, model=unet, mode="double-backward")
