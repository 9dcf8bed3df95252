"""FedSpeed: federated training in fewer rounds. Clients train long between rounds and still agree.

For people who train one model over many clients with unlike data (with Flower, or simulated) and pay for rounds or bytes. Each local step
takes its gradient at a slightly worse point nearby, and a correction that each client keeps removes the bias of the proximal term.

When to use it: rounds are dear and local computation is cheap. When not: clients cannot keep a model-sized state, rarely come back, or
computation is the price (each local step takes two gradients).

- local: q = grad F_i(y + rho g1/|g1|; B), y <- y - eta (q - g_i + (y - x)/lambda), K times; then g_i <- g_i - (y - x)/lambda.
- sent: y. Server: x <- the mean of the sampled clients' y minus lambda times the mean of all clients' g_i, which it follows from the y
  (the authors' rule; the paper writes the mean of the sampled clients' y - lambda g_i, which has no fixed point when clients are sampled).

Source: FedSpeed, arXiv 2302.10429 (ICLR 2023), and the authors' released simulator for its defaults.

>>> import torch
>>> from torch import nn
>>> from fewer.federated import FedSpeedAlgorithm, FedSpeedConfig, Independent, Shards, dirichlet, simulate
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(400, 4); y = (x[:, 0] > 0).long()
>>> shards = Shards(x, y, dirichlet(y, clients=10, alpha=0.3))
>>> algorithm = FedSpeedAlgorithm(FedSpeedConfig(local_epochs=2, batch_size=10))
>>> history = simulate(algorithm, lambda: nn.Linear(4, 2), shards, rounds=10, sampler=Independent(0.5), seed=0, executor="vmap")
>>> float((history.flat.predict(history.server.x, x).argmax(1) == y).float().mean()) > 0.85
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
