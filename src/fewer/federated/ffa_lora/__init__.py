"""FFA-LoRA: clients fine-tune a large model together by half of LoRA's bytes, exactly averaged, and with noise for privacy that adds once.

For peft users with a few silos, with or without a privacy budget. LoRA's A is drawn from a seed that all clients know and frozen; B alone
is trained and sent.

When to use it: bytes up count, or clients must keep (epsilon, delta) differential privacy towards the server itself. When not: neither
counts (LoRA with both factors fits a little better at the same rank), or clients need another rank each.

- W = W0 + s B A, s = alpha / r; A drawn from (seed, layer) and frozen, B = 0; local SGD on B, then B <- mean_i B_i. As A is shared, the mean
  of the B_i A is the mean of the B_i times A; for LoRA the products' mean misses mean((B_i - mean B)(A_i - mean A)).
- Privacy (in the client, of its own examples): each example enters a step with probability q, its gradient over all layers together is
  clipped to C, and N(0, sigma^2 C^2 I) is added to the sum, which is divided by the expected batch.
- One noisy step changes the product by xi_B A; LoRA's by xi_B A + B xi_A + xi_B xi_A.

Source: Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", arXiv 2403.12313 (ICLR 2024). No official code was found.

>>> import torch
>>> from peft import LoraConfig, get_peft_model
>>> from torch import nn
>>> from fewer.federated import FedLoRA, Independent, LoRARoundsConfig, PrivacyConfig, Shards, freeze_a, iid, simulate
>>> _ = torch.manual_seed(0)
>>> x = torch.randn(1500, 8); y = (x[:, 0] > 0).long()
>>> def model():
...     torch.manual_seed(1)
...     net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
...     return freeze_a(get_peft_model(net, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])), seed=0)
>>> privacy = PrivacyConfig(epsilon=8.0, delta=1e-3, clip=1.0)
>>> config = LoRARoundsConfig(batch_size=100, lr=2.0, privacy=privacy, rounds=20)
>>> history = simulate(FedLoRA(config), model, Shards(x, y, iid(y, clients=3)), rounds=20, sampler=Independent(1.0))
>>> float((history.flat.predict(history.server.x, x).argmax(1) == y).float().mean()) > 0.7
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
