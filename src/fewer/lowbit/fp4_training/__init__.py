"""Train with four-bit matrix products, in simulation on any machine, and see which stabiliser pays on your model.

For whoever would train in FP4 and must choose formats, scales, rounding and rotations before the hardware is rented: one frozen recipe,
one linear layer, a ledger of what each fix costs, and a study that says which of them pay.

When to use it: to choose a recipe, or to train a model so that it stands four-bit operands. When not: for speed here. The casts are
simulated, and a step takes about twice the time of one in full precision.

- Y = Q(X) Q(W)^T, dX = Q(dY) Q(W^T)^T, dW = Q(dY^T) Q(X^T)^T, each operand in blocks along its own contraction; sums in float32.
- x^ = s q(x / s): g_x[j] = g[j] Q'(u_j) + [j = m] sign(x_m) / 6 sum_i g[i] (q_i - u_i Q'(u_i)), the straight-through gradient being g.

Source: Elucidating the design space of FP4 training, arXiv 2509.17791.

>>> import torch
>>> from fewer.lowbit.fp4_training import FP4Recipe, convert, revert
>>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
>>> convert(model, FP4Recipe.preset("paper"))
['0', '2']
>>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
>>> x, y = torch.randn(64, 64), torch.randint(10, (64,))
>>> losses = []
>>> for _ in range(30):
...     loss = torch.nn.functional.cross_entropy(model(x), y)
...     optimizer.zero_grad()
...     loss.backward()
...     optimizer.step()
...     losses.append(loss.item())
>>> losses[-1] < losses[0] / 2
True
>>> revert(model)
['0', '2']
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
