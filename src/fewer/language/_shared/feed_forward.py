"""The decoder layers of a language model and the gated feed-forward network in each (gate, up and down), which can be cut to fewer channels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

PARTS = ("gate_proj", "up_proj", "down_proj")


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, first to last.

    Raises:
        ValueError: the model has none, or a layer's `mlp` has no gate, up and down of its own.
        TypeError: the weights are quantised.
    """
    found = getattr(getattr(model, "model", model), "layers", None)
    if not isinstance(found, nn.ModuleList) or not len(found):
        raise ValueError(f"{type(model).__name__} has no `model.layers`; expected a causal language model such as LlamaForCausalLM")
    for layer in found:
        _check_mlp(layer)
    check_unshared(model, (linear for layer in found for linear in parts_of(layer)))
    return list(found)


def _check_mlp(layer: nn.Module) -> None:
    mlp = getattr(layer, "mlp", None)
    missing = [part for part in PARTS if not hasattr(mlp, part)]
    if missing:
        fused = "; split its fused gate_up_proj into the two first" if hasattr(mlp, "gate_up_proj") else ""
        raise ValueError(f"{type(mlp).__name__} has no {', '.join(missing)}; expected a gated MLP as in Llama, Mistral, Qwen2{fused}")
    for part in PARTS:
        linear = getattr(mlp, part)
        weight = getattr(linear, "weight", None)
        if type(linear) is not nn.Linear or not isinstance(weight, Tensor) or not weight.is_floating_point():
            kept = getattr(weight, "dtype", "no plain weight")
            raise TypeError(
                f"{part} is a {type(linear).__name__} of {kept}; expected an unquantised torch.nn.Linear: load the model without quantisation"
            )


def check_unshared(model: nn.Module, linears: Iterable[nn.Module]) -> None:
    """ValueError naming two places where one weight of these maps is used: a change for one of them would change the other.

    Embeddings that are tied to the output layer are none of them, and do no harm.
    """
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for parameter in (parameter for linear in linears for parameter in linear.parameters()):
        names = places.get(id(parameter), [])
        if len(names) > 1:
            raise ValueError(f"{names[0]} and {names[1]} are one weight; expected weights of their own: give each a copy first")


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
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = _cut(gate, 0, kept), _cut(up, 0, kept), _cut(down, 1, kept)
    mlp.intermediate_size = len(kept)


def _cut(linear: nn.Linear, axis: int, kept: Tensor) -> nn.Linear:
    """A linear map with some rows or columns of another, in memory of its own; what wanted a gradient wants one."""
    weight, bias, kept = linear.weight, linear.bias, kept.to(linear.weight.device)
    made = nn.Linear(1, 1, bias=bias is not None, device="meta").train(linear.training)
    made.weight = nn.Parameter(weight.detach().index_select(axis, kept).contiguous(), requires_grad=weight.requires_grad)
    made.out_features, made.in_features = made.weight.shape
    if bias is not None:
        own = bias.detach().index_select(0, kept) if axis == 0 else bias.detach().clone()
        made.bias = nn.Parameter(own, requires_grad=bias.requires_grad)
    return made


def ffn_flops(hidden_size: int, widths: Sequence[int]) -> int:
    """Multiplications and additions of all gated MLPs for one token: three products of hidden_size x width a layer."""
    return sum(6 * hidden_size * width for width in widths)


def count_parameters(model: nn.Module) -> int:
    """Numbers in the model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
