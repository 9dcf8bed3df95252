"""Races of a layer of 134 MB (d = 2,048, 64 experts of 128): against the dense maps, against transformers' mixture, against memory itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewer.language.block_ffn.layer.block_ffn import BlockFFN, Kernel
from fewer.language.block_ffn.model import BlockFFNConfig, BlockFFNForCausalLM
from fewer.language.block_ffn.speculative import speculative_generate
from fewer.language.block_ffn.study import WIDE, draw_active, routed
from fewer.study import Bench

bench = Bench("block-ffn")
Work = Callable[[], object]
TLS, CLS_8, CLS_32 = 0.80, 0.70, 0.70  # the paper's: 80.5 % and 71.4 % at 0.1B, 69.1 % for 32 tokens at 2.8B


@functools.cache
def _layer() -> BlockFFN:
    torch.manual_seed(0)
    return BlockFFN(*WIDE).requires_grad_(False)


def _ours(tokens: int, unused: float, kernel: Kernel) -> tuple[Work, Tensor]:
    """(a pass whose tokens together leave a share of the experts unused, its input)."""
    draw, layer = torch.Generator().manual_seed(0), _layer()
    x = torch.randn(tokens, layer.hidden_size, generator=draw)
    active = draw_active(tokens, layer.num_experts, 1 - TLS, 1 - unused, draw)
    gates = torch.rand(active.shape, generator=draw) * active
    return lambda: routed(layer, x, gates, active, kernel), x


def _dense(x: Tensor) -> Work:
    up, down = _layer().up_proj, _layer().down_proj.contiguous()
    return lambda: F.linear(F.silu(F.linear(x, up)), down)


def _mixtral(x: Tensor, active: int) -> Work:
    """transformers' Mixtral block of as many experts and weights: its experts have a gate, so two thirds of the channels."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    hidden, experts, size = WIDE
    config: Any = MixtralConfig(
        hidden_size=hidden, intermediate_size=round(size * 2 / 3), num_local_experts=experts, num_experts_per_tok=active
    )
    config._experts_implementation = "eager"
    block = MixtralSparseMoeBlock(config).eval().requires_grad_(False)
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return lambda: block(x[None])


@bench.race("1 token, 80 % of the experts unused", peer="the dense pair of maps", reach=(1 - TLS) * 1.35 + 0.03)
def one_token() -> tuple[Work, Work]:
    ours, x = _ours(1, TLS, "sparse")
    return ours, _dense(x)


@bench.race("8 tokens, 70 % of the experts unused together", peer="the dense pair of maps", reach=(1 - CLS_8) * 1.35 + 0.03)
def eight_tokens() -> tuple[Work, Work]:
    ours, x = _ours(8, CLS_8, "union")
    return ours, _dense(x)


@bench.race("32 tokens, 70 % of the experts unused together", peer="the dense pair of maps", reach=(1 - CLS_32) * 1.35 + 0.03)
def many_tokens() -> tuple[Work, Work]:
    ours, x = _ours(32, CLS_32, "union")
    return ours, _dense(x)


@bench.race("1 token, 13 of 64 experts active", peer="transformers' Mixtral block of as many weights", reach=1.0)
def against_mixtral() -> tuple[Work, Work]:
    ours, x = _ours(1, TLS, "sparse")
    return ours, _mixtral(x, round((1 - TLS) * WIDE[1]))


@bench.race("1 token, 13 of 64 experts active", peer="reading as many bytes once (a sum)", reach=1 / 0.65)
def against_memory() -> tuple[Work, Work]:
    ours, _ = _ours(1, TLS, "sparse")
    hidden, experts, size = WIDE
    whole = torch.ones(experts, 2 * size * hidden)
    read = whole[: round((1 - TLS) * experts)]
    return ours, lambda: (whole[-1].sum(), read.sum())[1]


@bench.race("writing 48 tokens with n-gram drafts", peer="transformers' prompt lookup", reach=1.0)
def against_prompt_lookup() -> tuple[Work, Work]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = BlockFFNConfig(**sizes, num_experts=24, expert_size=32, eos_token_id=None, pad_token_id=0)  # pyright: ignore[reportCallIssue]
    model = BlockFFNForCausalLM(config).eval()
    prompt = torch.arange(12).repeat(2)[None]
    words: dict[str, Any] = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 48, "do_sample": False}
    return (
        lambda: speculative_generate(model, "ngram", prompt, 48),
        lambda: model.generate(prompt, prompt_lookup_num_tokens=8, **words),
    )
