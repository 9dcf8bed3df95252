"""SFPrompt: a device trains the ends of a frozen transformer, the server lends it the middle, and few activations travel.

For silos and devices with little memory and few examples each, that hold their own labels and images.

When to use it: devices cannot hold the model, and each has fewer examples to send than the break-even (`wire_cost` says it). When not: a
device can hold the model (federated prompt tuning sends prompt and tail alone), or has many examples (full fine-tuning then sends less).
Activations can be inverted after one block: that images stay on the device is no guarantee of privacy.

- Model = tail(body(head(x, p))); head and body frozen, prompt p and tail W_t trained. The client holds head, tail, p, examples, labels.
- Phase 1: U_l epochs of SGD on p and W_t by the shortcut tail(head(x, p)), without the wire.
- Pruning: e_j = |softmax(z_j) - onehot(y_j)|, by the shortcut; the keep n largest stay.
- Phase 2: one pass over these: a = head(x, p) up, b = body(a) down, dL/db up, dL/da down; 4 T numbers an example.
- Phase 3: p and W_t up, the mean by n_i.

Source: Cao, Zhu and Gong, "SFPrompt", arXiv 2407.17533. No official code was found. The prompt at the cut, what travels then, scores after
phase 1, and the settings by default are ours.

>>> import torch
>>> from transformers import ViTConfig, ViTForImageClassification
>>> from fewer.federated import Independent, SFPrompt, SFPromptConfig, Shards, Wire, iid, simulate, split_vit
>>> _ = torch.manual_seed(0)
>>> config = ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4, num_channels=1)
>>> split = split_vit(ViTForImageClassification(config))
>>> x, y = torch.randn(60, 1, 8, 8), torch.arange(60) % 2
>>> x[y == 1] += 1
>>> algorithm = SFPrompt(SFPromptConfig(keep=0.5, batch_size=10), wire := Wire(split.server()))
>>> history = simulate(algorithm, split.client, Shards(x, y, iid(y, clients=3)), rounds=20, sampler=Independent(1.0))
>>> _ = split.load_state_dict(history.state_dict(), strict=False)
>>> float((split.eval()(x).argmax(1) == y).float().mean()) > 0.8, sorted(wire.bytes)
(True, ['model_down', 'model_up', 'output', 'output_gradient', 'returned_gradient', 'smashed'])
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
