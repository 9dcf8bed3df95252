"""Make a Llama-like language model smaller and faster in minutes: whole feed-forward channels are removed after one forward pass.

For people who have a model directory and want a smaller one without gradients: a little text goes through the dense model once; how far
each block turns the residual stream decides how much it keeps (coarse), and each channel's weights and activations, relative to its
competitors', decide which channels (fine). What is left is a dense model that is faster on any hardware. Short training with adapters
whose ranks follow block importance recovers part of the loss.

When to use it: the feed-forward networks are most of the model, and a loss of some tenths of a nat (more than unstructured pruning costs)
is a fair price for real speed. When not: the model is quantised, or its attention is what you want smaller.

- coarse: I_l = mean angle(h_in, h_out) / pi, S_l = sigmoid(a kappa (I_l - mean I)), keep_l = (1 - p) S_l / mean S.
- fine: F_i = [sum_j |Wd_ji| X_i / sum_i' |Wd_ji'| X_i' + the same of |Wu| and |Wg|] X_i, X the norm of down_proj's input i.

Source: CFSP, arXiv 2409.13199 (COLING 2025).

>>> import torch
>>> from fewer.language import calibrate, prune
>>> from fewer.tasks import micro_lm
>>> model = micro_lm()
>>> stats = calibrate(model, [torch.randint(2048, (2, 64))])
>>> report = prune(model, stats, ratio=0.5, multiple_of=16)
>>> sum(report.widths), report.parameters < report.dense_parameters, model(torch.arange(5)[None]).logits.shape
(256, True, torch.Size([1, 5, 2048]))
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
