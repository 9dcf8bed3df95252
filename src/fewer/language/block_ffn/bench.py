"""Races of a layer of 134 MB (d = 2,048, 64 experts of 128): against the dense maps, against transformers' mixture, against memory itself."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewer.language.block_ffn.layer import BlockFFN, Kernel
from fewer.language.block_ffn.model import BlockFFNConfig, BlockFFNForCausalLM
from fewer.language.block_ffn.speculative import speculative_generate
from fewer.language.block_ffn.study import WIDE, dense_pair, draw_active, routed
from fewer.study import Bench

bench = Bench("block-ffn")
Work = Callable[[], object]
TLS, CLS = 0.80, 0.70  # the paper's: 80.5 % at 0.1B; 71.4 % for 8 tokens at 0.1B, 69.1 % for 32 at 2.8B


@functools.cache
def _layer() -> BlockFFN:
    torch.manual_seed(0)
    return BlockFFN(*WIDE).requires_grad_(False)


def _ours(tokens: int, unused: float, kernel: Kernel) -> tuple[Work, Tensor]:
    """(a pass whose tokens together leave a share of the experts unused, its input)."""
    draw, layer = torch.Generator().manual_seed(0), _layer()
    x = torch.randn(tokens, layer.hidden_size, generator=draw)
    return routed(layer, x, draw_active(tokens, layer.num_experts, 1 - TLS, 1 - unused, draw), kernel), x


def _against_dense(tokens: int, unused: float, kernel: Kernel) -> tuple[Work, Work]:
    ours, x = _ours(tokens, unused, kernel)
    return ours, dense_pair(_layer(), x)


PATTERNS: tuple[tuple[int, float, Kernel], ...] = ((1, TLS, "sparse"), (8, CLS, "union"), (32, CLS, "union"))
for tokens, unused, kernel in PATTERNS:
    name = f"{tokens} token{'s' if tokens > 1 else ''}, {unused:.0%} of the experts unused"
    declare = bench.race(name, peer="the dense pair of maps", reach=(1 - unused) * 1.35 + 0.03)
    declare(functools.partial(_against_dense, tokens, unused, kernel))


@bench.race("1 token, 13 of 64 experts active", peer="transformers' Mixtral block of as many weights", reach=1.0)
def against_mixtral() -> tuple[Work, Work]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    ours, x = _ours(1, TLS, "sparse")
    hidden, experts, size = WIDE
    config: Any = MixtralConfig(
        hidden_size=hidden, num_local_experts=experts, num_experts_per_tok=round((1 - TLS) * experts),
        intermediate_size=round(size * 2 / 3),  # its experts have a gate, a third map
    )  # fmt: skip
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).eval().requires_grad_(False)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return ours, lambda: block(x[None])


@bench.race("1 token, 13 of 64 experts active", peer="reading as many bytes once (a sum)", reach=1 / 0.65)
def against_memory() -> tuple[Work, Work]:
    ours, _ = _ours(1, TLS, "sparse")
    hidden, experts, size = WIDE
    whole = torch.ones(experts, 2 * size * hidden)  # as large as all experts, so that no cache keeps the part that is read
    parts = itertools.cycle(whole.split(round((1 - TLS) * experts))[:-1])
    return ours, lambda: next(parts).sum()


@bench.race("writing 48 tokens with n-gram drafts, a small model", peer="transformers' prompt lookup", reach=1.0)
def against_prompt_lookup() -> tuple[Work, Work]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = BlockFFNConfig(**sizes, num_experts=24, expert_size=32, eos_token_id=None, pad_token_id=0)  # pyright: ignore[reportCallIssue]
    model: Any = BlockFFNForCausalLM(config).eval()
    prompt = torch.arange(12).repeat(2)[None]
    words: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 48, "do_sample": False}
    return (
        lambda: speculative_generate(model, "ngram", prompt, 48),
        lambda: model.generate(prompt, prompt_lookup_num_tokens=8, **words),
    )
