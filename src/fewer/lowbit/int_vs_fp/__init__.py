"""INT v.s. FP: which of two block formats of equal bits loses less on a tensor, a layer, a model, and the one number that predicts it.

MXINT8 and MXFP8 cost the same bits, but on real tensors the integers are some 9 dB better; at 4 bits it is the other way round, unless a
16-wide Hadamard rotation comes first. What decides is the crest factor of a block,

    kappa = max |x| / rms(x),

below a crossover (7.55 at 8 bits, 1.96 at 6, 2.04 and 2.39 at 4) integers win. `analyse_tensor` and `analyse_model` measure it and the
signal over noise; `convert` casts a model's linear layers, `divergence` says how far its next-token distribution has moved.

When to use it: a format is to be picked for inference, fine-tuning or an accelerator. When not: the hardware has one format, or weights
alone are to be stored small (there, methods that look at the data lose less).

Source: arXiv 2510.25602.

>>> import torch
>>> from fewer.lowbit import analyse_tensor, crossover
>>> x = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
>>> report = analyse_tensor(x)
>>> round(report.kappa["mxint8"], 1), round(crossover("mx8"), 2), report.winner["mx8"]
(2.4, 7.55, 'mxint8')
>>> report.qsnr["mxint8"] - report.qsnr["mxfp8_e4m3"] > 9
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
