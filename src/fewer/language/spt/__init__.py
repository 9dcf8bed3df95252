"""Fine-tune a language model with less work and memory: half of each feed-forward network, an eighth of the attention weights.

For people who fine-tune with LoRA on small machines: LoRA shrinks what is trained, and this shrinks what is computed. A router lets each
token pass half of the blocks of a feed-forward network, forward and backward; attention keeps the keys whose short codes agree most with a
query's, so that its memory grows with n^2 / 8. What is left is an adapter; there is no dense model to merge it into.

When to use it: feed-forward networks are most of the time (they are, up to some thousand tokens). When not: torch's fused attention is at
hand and memory is what counts: it keeps no attention weights at all.

- p = sigmoid(W_r x + b_r), the largest half active, c_i = 2 p_i times every frozen product of block i.
- score(q, k) = agreeing codes of M subspaces (nearest of 16 codewords, L1); a = clamp(q.k / sqrt(d), -10, 10) over the kept keys.

Source: SPT, arXiv 2312.10365.

>>> import torch
>>> from fewer.language import SPTConfig, get_spt_model
>>> from fewer.tasks import micro_lm
>>> model, ids = get_spt_model(micro_lm(), SPTConfig(lora_r=4)), torch.arange(48)[None]
>>> loss = model.train()(input_ids=ids, labels=ids).loss
>>> loss.backward()
>>> round(sum(model.stats()[0].load), 3), model.stats()[0].recall > 0
(2.0, True)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
