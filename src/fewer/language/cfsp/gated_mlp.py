"""The decoder layers of a Llama-like model and the gated feed-forward network in each: gate, up and down."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

PARTS = ("gate_proj", "up_proj", "down_proj")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, first to last.

    Raises:
        ValueError: the model has none, or a layer's `mlp` has no gate, up and down.
        TypeError: the weights are quantised.
    """
    found = getattr(getattr(model, "model", model), "layers", None)
    if not isinstance(found, nn.ModuleList) or not len(found):
        raise ValueError(f"{type(model).__name__} has no `model.layers`; expected a causal language model such as LlamaForCausalLM")
    for layer in found:
        _check_mlp(layer)
    return list(found)


def _check_mlp(layer: nn.Module) -> None:
    mlp = getattr(layer, "mlp", None)
    missing = [part for part in PARTS if not hasattr(mlp, part)]
    if missing:
        fused = "; split its fused gate_up_proj into the two first" if hasattr(mlp, "gate_up_proj") else ""
        raise ValueError(f"{type(mlp).__name__} has no {', '.join(missing)}; expected a gated MLP as in Llama, Mistral, Qwen2{fused}")
    for part in PARTS:
        linear = getattr(mlp, part)
        if type(linear) is not nn.Linear or not linear.weight.is_floating_point():
            raise TypeError(
                f"{part} is a {type(linear).__name__} of {linear.weight.dtype}; expected an unquantised torch.nn.Linear: load the model without quantisation"
            )


def parts_of(layer: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """(gate, up, down) of a decoder layer."""
    mlp = cast(Any, layer).mlp
    return mlp.gate_proj, mlp.up_proj, mlp.down_proj


def width_of(layer: nn.Module) -> int:
    """How many channels a layer's MLP has."""
    return parts_of(layer)[2].in_features


@torch.no_grad()
def keep_channels(layer: nn.Module, kept: Tensor) -> None:
    """Cut a layer's MLP down to these channels: rows of gate and up, columns of down."""
    gate, up, down = parts_of(layer)
    mlp = cast(Any, layer).mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = _rows(gate, kept), _rows(up, kept), _columns(down, kept)
    mlp.intermediate_size = len(kept)


def _rows(linear: nn.Linear, kept: Tensor) -> nn.Linear:
    return _linear(linear.weight[kept.to(linear.weight.device)], None if linear.bias is None else linear.bias[kept.to(linear.bias.device)])


def _columns(linear: nn.Linear, kept: Tensor) -> nn.Linear:
    return _linear(linear.weight[:, kept.to(linear.weight.device)], linear.bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear map with these weights; the memory of larger ones that they were cut from is let go."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone().contiguous(), requires_grad=weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return made


def ffn_flops(hidden_size: int, widths: Sequence[int]) -> int:
    """Multiplications and additions of all gated MLPs for one token: three products of hidden_size x width a layer."""
    return sum(6 * hidden_size * width for width in widths)
