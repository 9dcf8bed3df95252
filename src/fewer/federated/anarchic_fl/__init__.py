"""Anarchic federated learning: each device decides when it takes part and how many local steps it makes, and the server waits for nobody.

For people who train one model over devices of very unlike speed (with Flower, or simulated), some of them on battery or offline at times. A
round of FedAvg lasts as long as its slowest client, and a client that can do only 2 of the 10 demanded steps is lost.

When to use it: waiting is the price. When not: all clients are about as fast, or gradients are the price: old models cost some.

- worker, at a time of its choosing: fetch x_mu, make K >= 1 local steps, send G = (x_mu - y_K) / (eta_L K), the mean of its gradients.
- server, when m returns are in: x_{t+1} = x_t - eta eta_L G_t, where G_t is the mean of the m returns (AFA-CD, for many devices: nothing is
  kept about them) or of the last G of *every* worker (AFA-CS, for a few silos: not biased towards those who come often).

Source: Anarchic Federated Learning, arXiv 2108.09875 (ICML 2022). The paper's text was not at hand: the rules follow its abstract and what
others say of it; eta in units of local steps, zeros for workers not heard of yet, `max_delay` and the memory on the server are ours.

>>> import torch
>>> from torch import nn
>>> from fewer.federated import AnarchicAlgorithm, AnarchicConfig, Clock, Shards, iid, schedule, simulate_anarchic
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(400, 4); y = (x[:, 0] > 0).long()
>>> shards = Shards(x, y, iid(y, clients=4))
>>> updates = schedule(Clock([1.0, 1.0, 3.0, 10.0], steps=(1, 10)), workers=4, buffer=2, updates=60)
>>> history = simulate_anarchic(AnarchicAlgorithm(AnarchicConfig(variant="cs", lr=0.1)), lambda: nn.Linear(4, 2), shards, updates)
>>> float((history.flat.predict(history.server.x, x).argmax(1) == y).float().mean()) > 0.85
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
