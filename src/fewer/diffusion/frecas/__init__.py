"""FreCaS: an image above the model's training size, sampled through growing sizes, each begun at the noise level that its size needs.

Early steps fix low frequencies only, so they are taken at the training size, where they are cheap and the model is at home. A stage's
predicted clean image is enlarged and noised to the first time whose SNR is low enough for the larger image, and the next stage goes on:

    SNR(start_{j+1}) = SNR(e_j) (S_j / S_{j+1})^gamma
    eps = eps_u + w_l low(eps_c - eps_u) + w_h high(eps_c - eps_u)     low(v): v resized to the former size and back
    attention = (1 - w_c) attention + w_c M V                          M: the former stage's cross-attention maps

When to use it: a text-to-image model of 1024 pixels is to give 2048 or 4096. When not: the training size will do, or an upscaler's
invented detail will.

Source: arXiv 2410.18410.

With a pipeline of diffusers:

    large = FreCaSPipeline.from_pipe(pipe, FreCaSConfig.preset("sdxl-2048"))
    image = large("a red house by a lake").images[0]

With a denoiser of pixels, here of white noise on EDM's schedule:

>>> import torch
>>> from fewer.diffusion import FreCaSConfig, Stage, cascade
>>> from fewer.diffusion._shared import NoiseSchedule
>>> from fewer.diffusion.frecas import enlarge
>>> config = FreCaSConfig((Stage(8, 4, 1.0), Stage(16, 3, 0)), map_weight=0)
>>> noise, seen = torch.randn(2, 1, 8, 8), []
>>> def denoise(x, sigma, stage, maps):
...     seen.append((x.shape[-1], round(sigma, 2)))
...     return x / (1 + sigma**2)
>>> cascade(denoise, config, NoiseSchedule.edm(0.02, 80.0), enlarge, initial=noise).shape
torch.Size([2, 1, 16, 16])
>>> seen
[(8, 80.0), (8, 24.59), (8, 5.95), (8, 1.0), (16, 2.0), (16, 0.29), (16, 0.02)]
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
