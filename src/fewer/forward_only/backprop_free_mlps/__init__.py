"""Train networks without backpropagation: Mono-Forward, Forward-Forward and Cascaded-Forward, each beside its backpropagation twin.

Every layer learns from what it sees itself, so no activation waits for a backward pass and no graph spans two layers. For people who
train MLP heads, learn on small devices, or design hardware, and want to know what is gained and what it costs on their own data.

When to use it: memory for gradients and optimiser state is tight (sequential Mono-Forward holds those of one layer at a time), or
layers shall be trained apart from each other. When not: a deep network whose accuracy counts most; early layers do not learn what
later ones need.

- Mono-Forward: a_i = ReLU(W_i a_{i-1} + b_i), G_i = a_i M_i^T, each layer's loss is the cross-entropy of G_i.
- Forward-Forward: goodness g_i = sum(a_i^2), pushed above the layer's width for images with their true label written into them, and
  below it for a wrong one; a class is predicted by trying all labels.
- Cascaded-Forward: convolution blocks, random or trained by direct feedback, each with a linear predictor; logits are summed.

Source: arXiv 2509.19063 and 2511.01061, and the papers they take the algorithms from (Hinton 2022; Zhao et al. 2023; Gong et al. 2025).

>>> import torch
>>> from sklearn.datasets import load_digits
>>> from fewer.forward_only import MonoForwardConfig, MonoForwardMLP, fit_mono_forward
>>> x, y = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
>>> x = x.float() / 16
>>> _ = torch.manual_seed(0)
>>> model = MonoForwardMLP(in_features=64, hidden_sizes=(128, 128), num_classes=10)
>>> config = MonoForwardConfig(epochs_per_layer=10)
>>> history = fit_mono_forward(model, x[:1200], y[:1200], validation=(x[1200:1500], y[1200:1500]), config=config)
>>> float((model(x[1500:]).argmax(1) == y[1500:]).float().mean()) > 0.85
True
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
