"""DFedSAM: federated training without a server; every client averages with its neighbours alone, and their models stay together.

For sites that train one model over their data and have no server that all trust, or none whose link could carry everybody's traffic.
Where each averages with a few neighbours only, models drift apart and overfit their own data. Here local steps take their gradient at a
worse point nearby (flat minima survive averaging better), and the exchange with the neighbours may be repeated Q times a round.

When to use it: there is no server, or its link is the bottleneck; graphs are sparse and clients unlike. When not: a server is there and
quick, for one average over all is the best gossip there is; or many clients are away for long.

- local: g = grad F_i(y; B), y <- y - eta grad F_i(y + rho g/|g|; B), the same batch, K times from y = x_i; z_i = y.
- gossip: x_i <- sum over neighbours j and i itself of w_ij z_j; Q times in a row that is X <- W^Q Z (DFedSAM-MGS).
- W: symmetric, rows that sum to 1 (Metropolis weights), so the mean over clients is kept; the distance to it shrinks by at least
  lambda^Q, lambda being W's second largest eigenvalue. Each step costs every client one model to every neighbour.

What is the model? The mean of all is what is usually judged and nobody holds; each client holds its own. Both are told here.

Not by Flower: its server stands in the middle of every message. `simulate_decentralized` runs all clients here, `run_peer` is one client
in a process of its own (torch.distributed). rho = 0 is DFedAvg; rho = 0 and local_steps = 1 is D-PSGD.

Source: arXiv 2302.04083 (ICML 2023); the Metropolis weights and the defaults are this library's choice.

>>> import torch
>>> from torch import nn
>>> from fewer.federated import DFedSAMAlgorithm, DFedSAMConfig, Shards, dirichlet, ring, simulate_decentralized
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(400, 4); y = (x[:, 0] > 0).long()
>>> shards = Shards(x, y, dirichlet(y, clients=8, alpha=0.3))
>>> algorithm = DFedSAMAlgorithm(DFedSAMConfig(gossip_steps=4, local_epochs=2, batch_size=10))
>>> history = simulate_decentralized(algorithm, lambda: nn.Linear(4, 2), shards, rounds=10, topology=ring(8), executor="vmap")
>>> right = [(history.flat.predict(model, x).argmax(1) == y).float().mean() for model in (history.mean(), *history.x)]
>>> bool(min(right) > 0.85)
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
