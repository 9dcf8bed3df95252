"""Cut a trained model's feed-forward networks into experts of which each token sees a few, and adapt it to a task in minutes.

For people who have a model directory and want it cheaper on one kind of text: cutting changes no weight and can be undone; a small router
for each layer learns which slices come nearest to the whole network (the prior-approximate loss), and then experts and routers are tuned
together. With 2 of 4 experts, half of the feed-forward operations and of the weights that one token reads are saved.

When to use it: writing is slow because weights must be read, and there is text of the task to tune on. When not: no tuning is possible;
untouched halves lose more than pruning does.

- E_i(x) = W_d[:, G_i] (SiLU(W_g[G_i] x) * W_u[G_i] x), so that sum_i E_i(x) = F(x); y = (N / K) sum over the K chosen of E_i(x).
- d_i = mean (E_i(x) - (K/N) F(x))^2, t = 1 for the K smallest, L_PA = KL(softmax(router logits) || softmax(t)).

Source: FactorLLM, arXiv 2408.11855.

>>> import torch
>>> from fewer.language import FactorLoss, factorize, unfactorize
>>> from fewer.tasks import micro_lm
>>> dense, ids = micro_lm(), torch.arange(24).reshape(2, 12)
>>> model = factorize(micro_lm(), num_experts=4, top_k=4)
>>> torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)
True
>>> torch.equal(unfactorize(model)(ids).logits, dense(ids).logits)
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
