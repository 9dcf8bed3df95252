"""A mixture of experts of which some cost nothing, so that a token uses as many feed-forward networks as it needs: 0, 1 or 2.

For people who train or serve mixtures of experts: beside the usual experts stand some that give zero, the input itself, or a mix of the
input and a learned vector. They take part in routing and cost no products, so that at equal parameters fewer networks run; they need no
messages when experts are spread over machines. Each layer's router also sees the logits of the layer before.

When to use it: a mixture is trained from scratch (there is no way to add free experts to a trained one). When not: one dense network a
layer is small enough.

- G^1 = W^1 x, G^j = W^j x + W_g^j G^(j-1); y = sum over the top K of softmax(G)_i E_i(x).
- E_zero(x) = 0, E_copy(x) = x, E_const(x) = a1 x + a2 v with [a1, a2] = softmax(W_c x).
- L_b = sum_i eta_i f_i P_i, eta = tau < 1 for free experts; in training their capacity is 1 / tau of the others'.

Source: MoE++, arXiv 2410.07348 (ICLR 2025).

>>> import torch
>>> from fewer.language import MoEPlusPlus
>>> layer = MoEPlusPlus(hidden_size=16, intermediate_size=32, num_ffn_experts=8, num_constant=2)
>>> first = layer(torch.randn(2, 5, 16))
>>> second = layer(first.hidden_states, gate_residual=first.router_logits)
>>> second.hidden_states.shape, 0 <= second.stats.ffn_after <= 2
(torch.Size([2, 5, 16]), True)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
