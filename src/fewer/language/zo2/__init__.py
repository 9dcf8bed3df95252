"""Fine-tune a language model that does not fit into memory: two forward passes a step, its blocks streamed from disk or host memory.

For people whose model is larger than what they have: no activations and no optimizer's state are kept, and of the weights three blocks at
a time are where they are computed with. The numbers are MeZO's, bit for bit; what is saved is memory. A fine-tuned model is also a
journal of some kilobytes, from which `replay` makes it again.

When to use it: inference of the model would need too much memory already, and many cheap steps are a fair price. When not: the model can
be trained by back-propagation or LoRA, which learn in tens of steps what this takes thousands for.

- g = (l(theta + eps z) - l(theta - eps z)) / (2 eps), theta -= lr (g z + wd theta), z ~ N(0, I) drawn again from a seed.
- per block: the update of the step before; + eps z, first pass; - 2 eps z, second pass; + eps z; back it goes.

Source: ZO2, arXiv 2503.12668 (COLM 2025).

>>> import torch
>>> from fewer.language import ZO2, ZO2Config
>>> from fewer.tasks import micro_lm
>>> zo2 = ZO2(micro_lm(), ZO2Config(lr=1e-4, store="cpu", working_device="cpu"))
>>> ids = torch.randint(2048, (2, 32))
>>> steps = [zo2.step(ids) for _ in range(2)]
>>> zo2.flush()
>>> zo2.steps, zo2.pending is None, zo2.store.most_attached <= 3
(2, True, True)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
