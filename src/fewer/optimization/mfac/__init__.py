"""Matrix-free products with the inverse of the empirical Fisher matrix: a second-order optimizer, a pruner, and the products themselves.

F = lambda I + (1/m) G^T G for m gradients as rows of G is d x d, but F^{-1} x, single elements and the diagonal of F^{-1} need G only,
in time linear in the number of weights d.

- Static (`InverseFisher`): F^{-1} x = (x - G^T M^{-1} G x) / lambda with M = lambda m I + G G^T, one m x m Cholesky factor, or block by block.
- Sliding (`SlidingInverseFisher`): the factor follows as the oldest of m gradients is replaced, in O(m^2) beside one pass over G.
- `MFAC`: w <- w - lr F^{-1} g with the window of the last m gradients.
- `prune_module`: optimal brain surgeon, rho_i = w_i^2 / (2 [F^{-1}]_ii), and the update of the weights that stay.

When to use it: fine-tuning or training with few epochs where curvature beyond a diagonal pays; one-shot pruning of a trained network;
inverse-Hessian-vector products for influence functions. When not: window * d numbers do not fit into memory, or a step of the network
itself is so cheap that two passes over the window outweigh it.

Source: arXiv 2107.03356.

>>> import torch
>>> from fewer.optimization import InverseFisher
>>> grads = torch.randn(64, 10_000, generator=torch.Generator().manual_seed(0))
>>> fisher = InverseFisher(grads, damping=1e-2)
>>> x = torch.ones(10_000)
>>> y = fisher @ x
>>> back = 1e-2 * y + grads.T @ (grads @ y) / 64  # F y
>>> torch.allclose(back, x, atol=1e-2)
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
