"""Gumbel-Softmax flow and score matching: generators of DNA, proteins and peptides, guided by any classifier of clean sequences.

The path from noise to letters is a softmax that cools, x_t = softmax((e_k + g / beta) / tau(t)), g Gumbel noise, tau = 10 e^(-3 t), so that
no Beta functions are needed at any number of letters. A model learns the letter's posterior by cross-entropy; the velocity is
(lambda / tau) x (p - <p, x>). `STGuidance` steers sampling by a classifier that was trained on clean sequences: letters are drawn, the
classifier's gradient at their one-hots is averaged and pulled back to the simplex. Nothing is trained again.

When to use it: many letters, a classifier at hand that knows nothing of noise. When not: the law itself must be met closely (given its
noise the path only cools, and leaves an error that more steps do not remove), or a single logit's pull matters to the digit.

Source: arXiv 2503.17361.

>>> import torch
>>> from fewer.diffusion.gumbel_flow import GumbelSoftmaxPath, SequenceCNN, STGuidance, gumbel_flow_loss, sample
>>> draw = torch.Generator().manual_seed(0)
>>> tokens = torch.randint(2, (64, 12), generator=draw)  # of four letters, only the first two occur
>>> path, model = GumbelSoftmaxPath(4), SequenceCNN(4, width=16, dilations=(1,))
>>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
>>> for _ in range(100):
...     optimizer.zero_grad()
...     gumbel_flow_loss(model, path, tokens, generator=draw).backward()
...     _ = optimizer.step()
>>> plain = sample(model, path, 12, 50, steps=20, generator=draw)
>>> float((plain.tokens < 2).float().mean()) > 0.9
True
>>> first_letters = STGuidance(lambda one_hot: one_hot[..., 0].sum(1), None, gamma=1.0, generator=draw)
>>> guided = sample(model, path, 12, 50, steps=20, guidance=first_letters, generator=draw)
>>> bool((guided.tokens == 0).float().mean() > (plain.tokens == 0).float().mean() + 0.2)
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
