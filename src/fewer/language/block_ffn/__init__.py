"""A mixture of many narrow experts that is sparse for chunks of tokens, not only for single ones, so that one device gains from it.

For people who train a small language model for a device with one user. A dense network, or a top-K mixture, gives way to narrow experts
behind a ReLU router, which is differentiable and lets each token use as many experts as it needs. Two losses make neighbouring tokens use the same
experts, and a chunk of tokens few: weights that no token of a chunk needs are not read, whether one token is written at a time or a
draft's tokens are verified at once, so that sparsity multiplies with speculative decoding.

When to use it: you train from scratch and decode for one user, where weight bytes are what takes time. When not: the model is
trained already (see cfsp for a pruned one), or many users' tokens are batched: their union is nearly all experts.

- router: A0 = W_r x, A1 = ReLU(A0), A = w A1 / sqrt(mean A1^2 + eps); y = sum_i A_i W_down_i SiLU(W_up_i x).
- locality: L_al = mean BCE(sigma(alpha A0_t), sigma(alpha A0_{t+1})).
- chunks: p = A1 / sum A1, L_cs = mean_i (1 - prod_{t in chunk} (1 - p_it)); its factor follows how it falls.

Source: BlockFFN, arXiv 2507.08771 (COLM 2025).

>>> import torch
>>> from fewer.language import BlockFFNConfig, BlockFFNForCausalLM, speculative_generate
>>> config = BlockFFNConfig(vocab_size=64, hidden_size=32, num_experts=12, expert_size=8, num_hidden_layers=2, num_attention_heads=2,
...                         chunk_len=16, eos_token_id=None)
>>> model = BlockFFNForCausalLM(config)
>>> ids = torch.randint(64, (2, 32))
>>> model.train()(ids, labels=ids).loss.backward()
>>> out = speculative_generate(model, "ngram", ids[:1], max_new_tokens=8)
>>> out.sequences.shape, len(out.union_shares) == len(out.accepted)
(torch.Size([1, 40]), True)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
