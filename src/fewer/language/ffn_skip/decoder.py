"""The decoder of a language model, and whether its layers are what skipping takes them for: told by what they do, not by their names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
EXPECTED = "expected pre-norm layers, attention then FFN, each added to what came in, as Llama, Mistral and Qwen have them"
_checked: WeakSet[nn.Module] = WeakSet()


def decoder_of(model: nn.Module) -> Any:
    """The module whose `layers` the tokens pass, of a causal language model, with or without adapters, or the decoder itself."""
    found = model if isinstance(getattr(model, "layers", None), nn.ModuleList) else None
    if found is None and hasattr(model, "get_decoder"):
        found = cast(Any, model).get_decoder()
    layers = getattr(found, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        inside = sorted({type(each[0]).__name__ for each in model.modules() if isinstance(each, nn.ModuleList) and len(each)})
        raise ValueError(f"{type(model).__name__} ({', '.join(inside) or 'no layers'}) has no `model.layers`; {EXPECTED}")
    return found


def layers_of(decoder: nn.Module) -> list[Any]:
    """Its layers, first to last."""
    return list(cast(Any, decoder).layers)


def ffn_linears(layer: nn.Module) -> list[Any]:
    """The linear maps of a layer's FFN, whatever they are called (quantised ones too)."""
    return [child for child in cast(Any, layer).mlp.children() if hasattr(child, "in_features") and hasattr(child, "out_features")]


def ffn_flops(layer: nn.Module) -> int:
    """Multiplications and additions of a layer's FFN for one token: 6 H I with gate, up and down."""
    return sum(2 * linear.in_features * linear.out_features for linear in ffn_linears(layer))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the block; each module has its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_structure(decoder: nn.Module) -> None:
    """ValueError naming the class unless h' = h + Attn(norm1(h)) and h_out = h' + FFN(norm2(h')) hold, bit for bit, in every layer.

    They are held against the layers' own forward in one pass over two tokens, once for each decoder: classes of the same parts differ in
    how they put them together (Granite scales both sums, Gemma 2 normalises what is added).
    """
    if decoder in _checked:
        return
    layers = layers_of(decoder)
    for layer in layers:
        missing = [part for part in PARTS if not isinstance(getattr(layer, part, None), nn.Module)]
        if missing:
            raise ValueError(f"{type(layer).__name__} has no {', '.join(missing)}; {EXPECTED}")
        if len(ffn_linears(layer)) < 2:
            raise ValueError(f"{type(layer.mlp).__name__} of {type(layer).__name__} has no two linear maps (experts?); {EXPECTED}")
    for layer, seen in zip(layers, _seen(decoder, layers), strict=True):
        h, attended, middle, added, h_out = (seen.get(name) for name in ("h", "attended", "middle", "added", "h_out"))
        if h is None or attended is None or middle is None or added is None or h_out is None:
            raise ValueError(f"{type(layer).__name__} does not pass its own attention, norm and FFN; {EXPECTED}")
        if not bool(torch.isfinite(h_out).all()):
            raise ValueError(f"the states of {type(layer).__name__} are not finite; expected a model that gives finite ones (try float32)")
        if not torch.equal(h + attended, middle) or not torch.equal(middle + added, h_out):
            raise ValueError(f"{type(layer).__name__} adds attention or FFN otherwise than as they are; {EXPECTED}")
    _checked.add(decoder)


@torch.no_grad()
def _seen(decoder: nn.Module, layers: list[Any]) -> list[dict[str, Tensor]]:
    """What goes into and comes out of each layer's parts in a pass over two tokens."""
    seen: list[dict[str, Tensor]] = [{} for _ in layers]
    with contextlib.ExitStack() as hooks, evaluating(decoder):
        for layer, at in zip(layers, seen, strict=True):
            hooks.callback(layer.register_forward_pre_hook(_taker(at, "h"), with_kwargs=True).remove)
            hooks.callback(layer.post_attention_layernorm.register_forward_pre_hook(_taker(at, "middle"), with_kwargs=True).remove)
            for module, name in ((layer.self_attn, "attended"), (layer.mlp, "added"), (layer, "h_out")):
                hooks.callback(module.register_forward_hook(_giver(at, name)).remove)
        weight: Tensor = cast(Any, decoder).get_input_embeddings().weight
        drawn = torch.randn(1, 2, weight.shape[1], generator=torch.Generator().manual_seed(0))  # a token's own row may be padding, zeros
        decoder(inputs_embeds=drawn.to(weight), use_cache=False)
    return seen


def _taker(at: dict[str, Tensor], name: str) -> Any:
    def take(module: nn.Module, args: Any, kwargs: Any) -> None:
        at[name] = args[0] if args else next(iter(kwargs.values()))

    return take


def _giver(at: dict[str, Tensor], name: str) -> Any:
    def give(module: nn.Module, args: Any, output: Any) -> None:
        at[name] = output[0] if isinstance(output, tuple) else output

    return give
