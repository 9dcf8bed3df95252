"""2-rectified flow++: a trained diffusion model becomes a flow that samples in 1 to 4 calls, can be inverted, and still gains by more steps.

With x_t = (1 - t) x + t z the teacher is a flow already (t = sigma / (1 + sigma)):

    v(x_t, t) = (x_t - D(x_t / (1 - t); t / (1 - t))) / t.

One round of pairs (noise, what the teacher's flow makes of it), then v is fitted to z - x with times of a U-shaped law, p(t) ~ e^{a t} +
e^{a (1 - t)}, under (1 - t) Huber + LPIPS(x_t - t v, x) / t. When to use it: a trained model is sampled often, in 1 to 4 calls, or its
images are inverted. When not: no training is affordable, or one call alone matters (a regression from noise to image is nearer there).

Source: arXiv 2405.20320.

>>> import tempfile, torch
>>> from fewer.diffusion.rectified_flow_plus import EDMSampler, ReflowConfig, VelocityFromEDM, generate_pairs, sample, train_reflow
>>> from fewer.tasks.digit_denoiser import DenoiserRecipe, DigitDenoiser
>>> teacher = VelocityFromEDM(DigitDenoiser(DenoiserRecipe(side=8, width=16)), sigma_max=80.0)  # a trained one would stand here
>>> with tempfile.TemporaryDirectory() as folder:
...     pairs = generate_pairs(teacher, 64, EDMSampler(steps=4), folder, (1, 8, 8))
>>> student = train_reflow(teacher, pairs, ReflowConfig(steps=2, batch_size=16))
>>> sample(student, torch.randn(5, 1, 8, 8), steps=1).shape
torch.Size([5, 1, 8, 8])
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
