"""Convolutions with filters as long as the sequence, done block by block where the cache is: FlashFFTConv.

For people who train or run long-convolution models (Hyena, H3, S4, M2, HyenaDNA) on text, DNA or audio, and for whoever filters long
signals of many channels: in place of `irfft(rfft(u, 2L) * rfft(k, 2L))[..., :L]` and the gates around it.

When to use it: filters of more than some tens of taps. When not: short ones, where `depthwise_conv1d` or torch's `conv1d` is quicker.

- y = postgate * ((pregate * u) conv k): a few rows go gate, pad, transform, product, inverse, slice, gate before the next ones come, so
  that nothing but u, k, the gates and y is ever in main memory; the backward pass keeps no spectrum and makes them anew.
- On matrix units the DFT is the Monarch form: products with N_1 x N_1, ..., N_p x N_p matrices and twiddles between them, in an order of
  frequencies that needs no permutation. A cost model measured once a machine chooses; on a CPU that is the machine's own FFT.
- Filters shorter than the sequence go in overlapping frames (L log K), and stream; frequencies that are not kept are skipped.

Source: arXiv 2311.05908.

>>> import torch
>>> from fewer.signals import fft_conv
>>> u, k = torch.randn(2, 3, 1000), torch.randn(3, 1000)
>>> y = fft_conv(u, k, pregate=torch.sigmoid(u), postgate=torch.sigmoid(u))
>>> spectra = torch.fft.rfft(torch.sigmoid(u) * u, n=2000) * torch.fft.rfft(k, n=2000)
>>> torch.allclose(y, torch.sigmoid(u) * torch.fft.irfft(spectra, n=2000)[..., :1000], atol=1e-4)
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
