"""Several samples of one reasoning prompt, stopped as soon as the first has ended: a shorter wait and fewer tokens than voting.

For whoever serves a reasoning model, in this process (transformers) or behind any OpenAI-compatible server. Reasoning models are more often
right where they are brief, so n samples race and the first to end is the answer: no verifier, no parser, less waiting than for one sample.

When to use it: the lengths of your model's answers vary for one prompt, and its brief ones are as often right; `diagnose` tells this
from a few recorded traces. When not: its wrong answers are sometimes much briefer than its right ones (then accuracy falls with n), or tokens
cost more than waiting.

- FFS-k@n: stop all n samples when k have ended, and vote among these k (k = 1: the first). LFS-k@n, the control: vote among the k longest.
- tokens one after the other: the k-th smallest length s; tokens in all: the sum of min(length, s) over the n samples.
- P(right) = integral of n a f1 (1 - a F1 - (1 - a) F2)^(n - 1), lengths of right traces (share a) being of F1, those of wrong ones of F2.

Source: First Finish Search, arXiv 2505.18149; FFS-k@n and LFS as in its authors' later study, arXiv 2512.02008.

>>> import torch
>>> from fewer.language import ffs_generate
>>> from fewer.tasks import micro_lm
>>> result = ffs_generate(micro_lm(), torch.arange(5), n=4, max_new_tokens=8, seed=1)[0]
>>> result.finished, result.sequential_tokens, result.total_tokens, len(result.rows)
(False, 8, 32, 4)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
