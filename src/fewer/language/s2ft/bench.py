"""Races: a training step against peft's LoRA at equal trained parameters and against full fine-tuning; adapters in parallel against LoRA's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from fewer.language._shared.lora import with_lora
from fewer.language._shared.structure import structure_of
from fewer.language.s2ft.adapters.serving import add_slice
from fewer.language.s2ft.config import S2FTConfig
from fewer.language.s2ft.model import get_s2ft_model
from fewer.meters import measure, saved_bytes
from fewer.study import Bench

bench = Bench("s2ft")
Work = Callable[[], object]
EQUAL = S2FTConfig(d_ratio=0.03125)  # 829,440 parameters of the model below, as many as LoRA of rank 4 trains


def _plain(layers: int = 30) -> Any:
    """A model of the shape of SmolLM2-135M with random weights: time and memory do not depend on them. Fewer layers are enough to race."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096 if layers < 30 else 49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def _s2ft(layers: int = 30) -> Any:
    return get_s2ft_model(_plain(layers), EQUAL).train()


def _lora(layers: int = 30) -> Any:
    model = _plain(layers)
    return with_lora(model, 4, structure_of(model))


IDS = torch.randint(4096, (2, 128), generator=torch.Generator().manual_seed(0))


def _loss(model: Any) -> Any:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def _step(model: Any) -> Work:
    """A step of training at rate 0, so that the work stays what it is."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0)

    def step() -> None:
        _loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@bench.race("a step on 2 x 128 tokens, a sixth of SmolLM2-135M's layers", peer="peft LoRA of as many parameters", reach=0.95)
def step_against_lora() -> tuple[Work, Work]:
    return _step(_s2ft(5)), _step(_lora(5))


@bench.race("a step on 2 x 128 tokens, a sixth of SmolLM2-135M's layers", peer="full fine-tuning", reach=0.6)
def step_against_full() -> tuple[Work, Work]:
    return _step(_s2ft(5)), _step(_plain(5))


def _saved(model: Any) -> int:
    with saved_bytes(model) as saved:
        loss = _loss(model)
    del loss
    return saved.total


@bench.quantity(
    "kept for the backward pass, SmolLM2-135M's shape, 2 x 128 tokens", peer="peft LoRA of as many parameters", unit="bytes", reach=0.8
)
def saved_against_lora() -> tuple[float, float]:
    return _saved(_s2ft()), _saved(_lora())


def _peak(make: Callable[[], Any]) -> float:
    """Peak resident memory of this process over two steps."""
    model = make()
    step = _step(model)
    with measure(time=False, energy=False) as cost:
        step()
        step()
    return cost.figures()["peak_memory"]


@bench.quantity("peak resident memory of a step, SmolLM2-135M's shape, 2 x 128 tokens", peer="full fine-tuning", unit="bytes", reach=0.6)
def peak_against_full() -> tuple[float, float]:
    return _peak(_s2ft), _peak(_plain)


@bench.race("what 16 adapters add to one linear map of width 2,048, a row each", peer="LoRA of as many parameters")
def parallel_adapters() -> tuple[Work, Work]:
    """The paper's serving of adapters in parallel: 22 % less latency than LoRA. Without the base's product, which is the same for both."""
    rows, width, rank = 16, 2048, 16
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, width, generator=draw)
    y = torch.zeros(rows, 1, width)
    index = torch.stack([torch.randperm(width, generator=draw)[: 2 * rank] for _ in range(rows)])
    delta = torch.randn(rows, width, 2 * rank, generator=draw)
    a, b = torch.randn(rows, rank, width, generator=draw), torch.randn(rows, width, rank, generator=draw)

    def ours() -> None:
        for row in range(rows):
            add_slice(x[row], y[row], "columns", index[row], delta[row])

    def lora() -> None:
        for row in range(rows):
            torch.add(y[row], F.linear(F.linear(x[row], a[row]), b[row]))

    return lambda: torch.no_grad()(ours)(), lambda: torch.no_grad()(lora)()
