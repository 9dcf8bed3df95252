"""FZooS: one point that is best for several owners of black boxes, found with few calls and without sharing them.

For parties that each own a simulator, a paid service, a metric such as macro F1 or somebody else's model: no gradient exists and every call
costs. Each client keeps all its past calls in a Gaussian process whose derivative is the gradient estimate, so that a gradient takes no call
and a step six (its end, and five points where the gradient is least certain) instead of the 21 of finite differences. A summary in shared random features lets every client correct its own gradient towards everybody's, where it stands.

When to use it: calls are dear, the functions are smooth in tens to hundreds of numbers, clients are unlike. When not: bytes are dear (M numbers more
each way a round), functions are noisy or jump, or clients are alike (`correction=False` then takes fewer calls).

- local: mu(z) = mean + range k(z)' a, a = (K + s2 I)^-1 y~; grad mu(z) = - range sum_n h(|z - x_n|) a_n (z - x_n).
- step: z <- clip(z - Adam(grad mu_i(z) + (1/t) [grad(z; w_mean) - grad(z; w_i)])), then f_i(z) and where the gradient is most uncertain.
- shared: phi(x) = sqrt(2/M) cos(x W + b); w_i = range Phi' (Phi Phi' + s2' I)^-1 y~; the server averages points and weights.

Source: FZooS, arXiv 2308.04077, its released code (read for facts), and the abstract; `FedZO` is what it is held against.

>>> import numpy as np
>>> from fewer.federated import FZooSConfig, minimize
>>> centres = np.random.default_rng(0).uniform(0.2, 0.8, (3, 8))
>>> boxes = [lambda x, c=c: float(((x - c) ** 2).sum()) for c in centres]
>>> found = minimize(boxes, np.full(8, 0.5), rounds=6, config=FZooSConfig(local_steps=5, features=500, lr=0.05, active_round=10))
>>> bool(np.abs(found.x - centres.mean(axis=0)).max() < 0.05)
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
