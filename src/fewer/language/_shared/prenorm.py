"""Decoders of pre-norm layers, h' = h + Attn(norm1(h)), h_out = h' + FFN(norm2(h')): told by what they do, not by their names."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fewer.fitting import evaluating

SEEN = ("h", "attended", "middle", "added", "h_out")
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


def decode_bound(model: nn.Module, ratio: float) -> float:
    """By how much faster decoding gets at most where it waits for weights, and a share of the FFNs is skipped: 1 / (1 - r f).

    f is the FFNs' share of the weights that a token reads.
    """
    layers = layers_of(decoder_of(model))
    read = sum(p.numel() for layer in layers for p in layer.parameters()) + cast(Any, model).lm_head.weight.numel()
    return 1 / (1 - ratio * sum(ffn_flops(layer) / 2 for layer in layers) / read)


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
    weight: Tensor = cast(Any, decoder).get_input_embeddings().weight
    drawn = torch.randn(1, 2, weight.shape[1], generator=torch.Generator().manual_seed(0))  # a token's own row may be padding, zeros
    with torch.no_grad(), evaluating(decoder), observed(layers, lambda number, seen: _check_sums(layers[number], seen)):
        decoder(inputs_embeds=drawn.to(weight), use_cache=False)
    _checked.add(decoder)


def _check_sums(layer: nn.Module, seen: Mapping[str, Tensor]) -> None:
    name = type(layer).__name__
    if len(seen) < len(SEEN):
        raise ValueError(f"{name} does not pass its own attention, norm and FFN; {EXPECTED}")
    if not bool(torch.isfinite(seen["h_out"]).all()):
        raise ValueError(f"the states of {name} are not finite; expected a model that gives finite ones (try float32)")
    if not torch.equal(seen["h"] + seen["attended"], seen["middle"]) or not torch.equal(seen["middle"] + seen["added"], seen["h_out"]):
        raise ValueError(f"{name} adds attention or FFN otherwise than as they are; {EXPECTED}")


@contextlib.contextmanager
def observed(layers: list[Any], see: Callable[[int, Mapping[str, Tensor]], None]) -> Iterator[None]:
    """Call `see` after each layer of a pass inside the block, with the layer's number and the states [B, T, H] that went through it.

    They are called h (what came in), attended, middle (h'), added (by the FFN) and h_out.
    """

    def takes(at: dict[str, Tensor], name: str) -> Any:
        return lambda module, args, kwargs: at.update({name: args[0] if args else next(iter(kwargs.values()))})

    def gives(at: dict[str, Tensor], name: str) -> Any:
        return lambda module, args, output: at.update({name: output[0] if isinstance(output, tuple) else output})

    def ends(at: dict[str, Tensor], number: int) -> Any:
        def end(module: nn.Module, args: Any, output: Any) -> None:
            gives(at, "h_out")(module, args, output)
            see(number, dict(at))
            at.clear()

        return end

    with contextlib.ExitStack() as hooks:
        for number, layer in enumerate(layers):
            at: dict[str, Tensor] = {}
            for module, name in ((layer, "h"), (layer.post_attention_layernorm, "middle")):
                hooks.callback(module.register_forward_pre_hook(takes(at, name), with_kwargs=True).remove)
            for module, name in ((layer.self_attn, "attended"), (layer.mlp, "added")):
                hooks.callback(module.register_forward_hook(gives(at, name)).remove)
            hooks.callback(layer.register_forward_hook(ends(at, number)).remove)
        yield


class StandIn:
    """Stands in for a layer's forward between `attach` and `detach`; the module, its name and its weights stay as they are.

    Copies and pickles of the model have stand-ins of their own. A forward that is not the class's is refused, with ValueError.
    """

    def __init__(self, layer: nn.Module) -> None:
        # accelerate keeps the layer's own forward under another name, and moves its arguments to the layer's device before
        self.layer, self.place = layer, "_old_forward" if hasattr(layer, "_hf_hook") else "forward"
        kept = vars(layer).get(self.place)
        if kept is not None and getattr(kept, "__func__", None) is not type(layer).forward:
            raise ValueError(
                f"{type(layer).__name__} has a forward that is not its class's; expected it as transformers made it: undo that first"
            )
        self.had_own = kept is not None

    def attach(self) -> None:
        setattr(self.layer, self.place, self.forward)

    def detach(self) -> None:
        delattr(self.layer, self.place)
        if self.had_own:
            setattr(self.layer, self.place, self.plain)

    @property
    def plain(self) -> Any:
        """The layer's own forward."""
        return type(self.layer).forward.__get__(self.layer)

    def named(self, args: tuple[Any, ...]) -> dict[str, Any]:
        """A layer's arguments after the states by their names: attention has them in another order."""
        return dict(zip(list(inspect.signature(self.plain).parameters)[1:], args, strict=False)) if args else {}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What is done in place of the layer's own."""
        return self.plain(hidden_states, *args, **kwargs)
