"""Operators on fields that go to frequency once and stay there: T1, in place of the Fourier Neural Operator.

For people who train surrogates of simulators (weather, flow, smoke) on a modest machine, or who ask one very often.

When to use it: fields of high resolution whose targets are made of few modes, and thousands of samples or little time. When not: few
samples with jumps, where an FNO errs less for as many epochs (it does on Darcy's flow), or targets that need most of their modes: look at
the floor that `select_modes` tells.

- Each input is transformed once, by orthonormal cosines (or Fourier's for periodic fields), and cut to the lowest m_1 x ... x m_d modes.
- A layer mixes channels mode by mode, act, then modes along each axis: real weights on a small block, z <- z + B A act(W z).
- The loss is taken on modes, where it has the full field's value (Parseval); only who asks for a field transforms back, at any resolution.
- Weights start so that the variance that cutting takes away is given back once.

Source: arXiv 2211.14453.

>>> import torch
>>> from fewer.signals import T1, ModeDataset, ModeLoss, navier_stokes
>>> before, after = navier_stokes(8, 32, T=0.2)
>>> model = T1((8, 8), 16, resolution=(32, 32))
>>> data, loss = ModeDataset(before[:, None], after[:, None], model), ModeLoss()
>>> optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
>>> for _ in range(30):
...     for z, targets in data.batches(4):
...         error = loss(model.forward_modes(z), targets)
...         optimizer.zero_grad()
...         error.backward()
...         optimizer.step()
>>> model(before[:, None]).shape, error.item() < 0.5
(torch.Size([8, 1, 32, 32]), True)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
