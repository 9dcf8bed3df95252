"""Fine-tune a language model by training a few whole heads and channels of it in place.

For anyone fine-tuning on one GPU or a CPU who wants less memory than LoRA at equal parameters: the trained part of a weight is one dense
submatrix, its gradient needs only the matching slice of the input, nothing is added to the forward pass, and the change is an exact
adapter that is merged, switched, added to others, or exported as LoRA.

When to use it: activations or the optimizer's state are what does not fit, and the model is a Llama, Mistral, Qwen2, Gemma, OPT or GPT-2.
When not: LoRA's learning rates are tuned already and its memory fits (S2FT wants about three times the rate), or all weights must move.

- y = W x, S = W[:, a:b] a view: dx = dy W, dS = dy^T x[..., a:b] (columns of o and down); S = W[a:b]: dS = dy[..., a:b]^T x (v and up).
- permuting the rows of gate and up and the columns of down together leaves the block's output unchanged, so that any channels can be a:b.

Source: S2FT, arXiv 2412.06289 (NeurIPS 2024).

>>> import torch
>>> from fewer.language import S2FTConfig, get_s2ft_model
>>> from fewer.tasks import micro_lm
>>> model = get_s2ft_model(micro_lm(), S2FTConfig(d_ratio=0.05, seed=1))
>>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
>>> ids = torch.arange(20)[None]
>>> losses = []
>>> for _ in range(5):
...     loss = model(input_ids=ids, labels=ids).loss
...     optimizer.zero_grad()
...     loss.backward()
...     optimizer.step()
...     losses.append(loss.item())
>>> losses[-1] < losses[0]
True
>>> model.save_pretrained("adapter")
>>> plain = model.merge_and_unload()
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
