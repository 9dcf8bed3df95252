"""Small mixtures for the tests of MoE++, and the layer written down token by token and expert by expert."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewer.language.moe_plus_plus.layer import MoEPlusPlus

D, INNER = 12, 20


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **words: Any) -> MoEPlusPlus:
    torch.manual_seed(seed)
    words = {"num_ffn_experts": 4, "num_constant": 2} | words
    return MoEPlusPlus(D, INNER, **words).to(dtype)


def forced(layer: MoEPlusPlus) -> MoEPlusPlus:
    """The layer with a router that gives back its gate residual: its logits can be set by hand."""
    with torch.no_grad():
        for weight in layer.router.wg.parameters():
            weight.zero_()
        assert layer.router.gate_map is not None
        layer.router.gate_map.weight.copy_(torch.eye(layer.num_experts))
    return layer


def ffn(layer: MoEPlusPlus, expert: int, x: Tensor) -> Tensor:
    gate, value = (layer.experts.up_proj[expert] @ x).chunk(2)
    return layer.experts.down_proj[expert] @ (F.silu(gate) * value)


def loop(layer: MoEPlusPlus, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """[T, D] -> [T, D], as the equations say it: one token, one expert at a time."""
    logits = layer.router(x, residual)
    experts, k = layer.num_experts, layer.top_k
    valid = [True] * len(x) if mask is None else mask.tolist()
    chosen = [sorted(range(experts), key=lambda e: (-logits[t, e].item(), e))[:k] for t in range(len(x))]
    gates = []
    for t in range(len(x)):
        p = [logits[t].softmax(-1)[e] for e in chosen[t]]
        if layer.gating == "released":
            p = [value * 0 if e >= experts - layer.num_zero else value for value, e in zip(p, chosen[t], strict=True)]
        if layer.gating != "paper":
            p = [value / max(sum(p), torch.tensor(1e-9, dtype=x.dtype)) for value in p]  # pyright: ignore[reportArgumentType, reportCallIssue]
        gates.append(p)
    room: list[float] = [math.inf] * experts
    if layer.training and layer.capacity_factor is not None:
        base = sum(valid) * (k if layer.capacity_base == "assignments" else 1)
        share = layer.capacity_factor * base / (layer.tau * layer.num_ffn + layer.num_zc)
        room = [math.ceil((layer.tau if e < layer.num_ffn else 1.0) * share - 1e-9) for e in range(experts)]
    asks = [(t, j) for t in range(len(x)) for j in range(k) if valid[t]]
    if layer.capacity_priority == "score":
        asks.sort(key=lambda ask: -gates[ask[0]][ask[1]].item())
    y = [x[t] * 0 for t in range(len(x))]
    for t, j in asks:
        e = chosen[t][j]
        if room[e] <= 0:
            continue
        room[e] -= 1
        seen = x[t] * k if layer.gating == "released" else x[t]
        if e < layer.num_ffn:
            out = ffn(layer, e, seen)
        elif e < layer.num_ffn + layer.num_constant:
            assert layer.constants is not None
            c = e - layer.num_ffn
            a = (layer.constants.wg[c] @ seen).softmax(-1)
            out = a[0] * seen + a[1] * layer.constants.constant[c]
        elif e < experts - layer.num_zero:
            out = seen
        else:
            out = seen * 0
        y[t] = y[t] + gates[t][j] * out
    return torch.stack(y)
